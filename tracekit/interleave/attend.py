"""A call of an attention function, with q, k, v, scores, pattern and z led through modules."""

# Guarantees:
#   - only what somebody asks for is computed, and only in the attention that it is asked of;
#   - as long as nobody writes, the attention gives what it gives untapped, bit for bit.
#
# Fused attention has no scores and no pattern. Where they are asked for, the model's own eager
# function runs beside it, on the same q, k, v and mask, and its softmax is stopped at. What it
# returns counts only if something was written. Where gradients are wanted it runs to its end, and
# the value of the fused one goes on with the gradient of this one.

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, Protocol, TypeAlias, cast, final

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from tracekit.core.nest import is_fake
from tracekit.core.versions import UNKNOWN, version
from tracekit.errors import AttentionError

SOFTMAX: Final = (F.softmax, torch.softmax, Tensor.softmax)
_GIVEN: Final = ("module", "query", "key", "value", "attention_mask")

# An attention function: of module, query, key, value, mask and options, to (z, ...).
Function: TypeAlias = Callable[..., Any]
# Takes the same, and gives what runs the eager function on that.
Beside: TypeAlias = Callable[..., Callable[[], Any]]


class Pieces(Protocol):
    """The modules that stand for the values of one attention, in one run."""

    is_recomputed: bool  # by backward, without anything beside it

    def is_wanted(self, name: str) -> bool:
        """Whether anybody has a hook on it."""
        ...

    def passed(self, name: str, value: Any) -> Any:
        """What came out of the module, or `value` if nobody wants it."""
        ...


class _Enough(BaseException):
    """What was asked for has been seen; the rest of the eager function is not needed."""


def attend(
    pieces: Pieces,
    function: Function,
    eager: Beside | None,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """What `function` gives, led through `pieces`; `eager` does the same with a softmax.

    It is None if `function` itself has one.
    """
    others = dict(kwargs)
    given = [*args[: len(_GIVEN)], *(others.pop(name) for name in _GIVEN[len(args) :])]
    for place, name in enumerate("qkv", 1):
        given[place] = pieces.passed(name, given[place])
    output = _with_pattern(pieces, function, eager, (*given, *args[len(_GIVEN) :]), others)
    if not pieces.is_wanted("z"):
        pieces.passed("z", None)
        return output
    z = pieces.passed("z", own(output[0]))
    if z is not output[0] and output[0].is_contiguous():
        z = z.contiguous()  # the model may view it in another shape
    return output if z is output[0] else (z, *output[1:])


def _with_pattern(
    pieces: Pieces,
    function: Function,
    eager: Beside | None,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    if not (pieces.is_wanted("scores") or pieces.is_wanted("pattern")):
        pieces.passed("scores", None)
        pieces.passed("pattern", None)
        return function(*args, **kwargs)
    query, key = args[1], args[2]
    tap = _SoftmaxTap(pieces, query.dtype, key.shape[-2], is_beside=eager is not None)
    if eager is None:
        with tap:
            output = function(*args, **kwargs)
        tap.check_came(args[0])
        return output
    tap.is_random = bool(kwargs.get("dropout"))
    runs = eager(*args, **kwargs)
    has_gradients = torch.is_grad_enabled() and not pieces.is_recomputed
    try:
        with tap, torch.set_grad_enabled(has_gradients):
            output = runs()
    except _Enough:
        return function(*args, **kwargs)
    tap.check_came(args[0])
    if tap.is_written:
        return output
    with torch.no_grad():
        real = function(*args, **kwargs)
    return (cast("Tensor", RealWithGradients.apply(output[0], real[0])), *real[1:])


def through_softmax(
    pieces: Pieces, softmax: Callable[..., Tensor], scores: Tensor, dtype: torch.dtype, keys: int
) -> tuple[Tensor, bool]:
    """The pattern that `softmax` makes of `scores`, both led through `pieces`; was one written?

    They are handed out in `dtype`, and over the first `keys` alone: what is behind is a sink's.
    """
    scores, are_scores = _led(pieces, "scores", scores, dtype, keys)
    pattern, is_pattern = _led(pieces, "pattern", softmax(scores), dtype, keys)
    return pattern, are_scores or is_pattern


def _led(
    pieces: Pieces, name: str, whole: Tensor, dtype: torch.dtype, keys: int
) -> tuple[Tensor, bool]:
    if not pieces.is_wanted(name):
        pieces.passed(name, None)
        return whole, False
    given = whole if whole.shape[-1] == keys else whole[..., :keys]
    given = given.to(dtype)
    given = own(given) if name == "pattern" else given  # its softmax needs it in backward
    was = Was(given)
    new = pieces.passed(name, given)
    is_written = new is not given or was.changed()
    is_seen = is_written or given.requires_grad  # what was handed out has to be what is used
    return _put_back(new, whole) if is_seen else whole, is_written


@final
class _SoftmaxTap(TorchFunctionMode):
    """Leads what goes into the first softmax, and what comes out, through the pieces.

    Of a function that runs beside the real one, the rest is left out if nothing was written and no
    gradient can come.
    """

    def __init__(self, pieces: Pieces, dtype: torch.dtype, keys: int, is_beside: bool) -> None:
        super().__init__()
        self._pieces = pieces
        self._dtype = dtype
        self._keys = keys
        self._is_beside = is_beside
        self._has_come = False
        self.is_random = False  # by dropout: its gradients are not those of another call
        self.is_written = False

    def check_came(self, module: Any) -> None:
        """Raise if the function made no softmax."""
        if not self._has_come:
            raise AttentionError(
                f"the attention function of {type(module).__name__} makes no softmax, so it has "
                f"no scores and no pattern; q, k, v and z can be had."
            )

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        is_idle = self._is_beside and not self.is_written
        if func is F.dropout and self._has_come and is_idle:
            return args[0] if args else kwargs["input"]  # the random numbers are the model's
        if func not in SOFTMAX or self._has_come:
            return func(*args, **kwargs)
        self._has_come = True
        scores, softmax = softmax_of(func, args, kwargs)
        pattern, self.is_written = through_softmax(
            self._pieces, softmax, scores, self._dtype, self._keys
        )
        is_idle = self._is_beside and not self.is_written
        if is_idle and not (pattern.requires_grad and not self.is_random):
            raise _Enough
        return pattern


def softmax_of(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """What a call of a softmax takes, and the softmax of anything else."""
    options = dict(kwargs)
    scores, *others = args or (options.pop("input"),)
    return scores, lambda other: func(other, *others, **options)


@final
class Was:
    """What a tensor was, to tell whether it was written into."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor
        self._version = version(tensor)
        is_counted = self._version != UNKNOWN or is_fake(tensor)
        self._copy = None if is_counted else tensor.clone()

    def changed(self) -> bool:
        """Whether it is something else now."""
        if self._copy is not None:
            return not torch.equal(self._copy, self._tensor)
        return version(self._tensor) != self._version


def own(tensor: Tensor) -> Tensor:
    """`tensor`, copied if the operation that made it may want it unchanged in backward."""
    return tensor.clone() if tensor.requires_grad else tensor


def _put_back(new: Tensor, whole: Tensor) -> Tensor:
    """`new` as the model had it: in its dtype, and with the column of a sink."""
    new = new.to(whole.dtype)
    keys = new.shape[-1]
    return new if keys == whole.shape[-1] else torch.cat([new, whole[..., keys:]], -1)


@final
class RealWithGradients(torch.autograd.Function):
    """The value that the model computed, with the gradient through the pattern."""

    @staticmethod
    def forward(ctx: Any, eager: Tensor, real: Tensor) -> Tensor:
        return real.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None
