"""A call of an attention function, with q, k, v, scores, pattern and z led through modules."""

# Guarantees:
#   - only what somebody asks for is computed, and only in the attention that it is asked of;
#   - as long as nobody writes, the attention gives what it gives untapped, bit for bit.
#
# Fused attention has no scores and no pattern. Where they are asked for, the model's own eager
# function runs beside it, on the same q, k, v and mask, and its softmax is stopped at. What it
# returns counts only if something was written.

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, Protocol, cast, final

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from tracekit.core.nest import is_fake
from tracekit.core.versions import UNKNOWN, version
from tracekit.interleave.masks import additive_mask

_SOFTMAX: Final = (F.softmax, torch.softmax, Tensor.softmax)
_GIVEN: Final = ("module", "query", "key", "value", "attention_mask")


class Pieces(Protocol):
    """The modules that stand for the values of one attention, in one run."""

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
    eager: Callable[..., Any],
    call: Callable[..., Any],
    runs: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """One call of the attention function `call`, which is made by `runs`, led through `pieces`."""
    others = dict(kwargs)
    given = [*args[: len(_GIVEN)], *(others.pop(name) for name in _GIVEN[len(args) :])]
    for place, name in enumerate("qkv", 1):
        given[place] = pieces.passed(name, given[place])
    more = args[len(_GIVEN) :]
    output = _with_pattern(pieces, eager, call, runs, (*given, *more), others)
    z = pieces.passed("z", _own(output[0]) if pieces.is_wanted("z") else output[0])
    return output if z is output[0] else (z, *output[1:])


def _with_pattern(
    pieces: Pieces,
    eager: Callable[..., Any],
    call: Callable[..., Any],
    runs: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    if not (pieces.is_wanted("scores") or pieces.is_wanted("pattern")):
        pieces.passed("scores", None)
        pieces.passed("pattern", None)
        return runs(*args, **kwargs)
    module, query, key, value, mask, *more = args
    tap = SoftmaxTap(pieces, query, key.shape[-2])
    if call is eager:
        with tap:
            return runs(*args, **kwargs)
    tap.is_beside, tap.is_random = True, bool(kwargs.get("dropout"))
    mask = additive_mask(module, query, key, mask, kwargs)
    output: Any = None
    try:
        with tap:
            output = eager(module, query, key, value, mask, *more, **kwargs)
    except _Enough:
        return runs(*args, **kwargs)
    if tap.is_written:
        return output
    with torch.no_grad():
        real = runs(*args, **kwargs)
    return (_with_gradients_of(output[0], real[0]), *real[1:])


@final
class SoftmaxTap(TorchFunctionMode):
    """Leads what goes into the first softmax, and what comes out, through the pieces.

    Of a function that runs beside the real one, the rest is left out if nothing was written and no
    gradient can come.
    """

    def __init__(self, pieces: Pieces, query: Tensor, keys: int) -> None:
        super().__init__()
        self._pieces = pieces
        self._dtype = query.dtype
        self._keys = keys
        self.is_beside = False
        self.is_random = False  # by dropout: its gradients are not those of another call
        self.has_come = False
        self.is_written = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.dropout and self.has_come and self.is_beside and not self.is_written:
            return args[0] if args else kwargs["input"]  # the random numbers are the model's
        if func not in _SOFTMAX or self.has_come:
            return func(*args, **kwargs)
        self.has_come = True
        scores, *others = args or (kwargs.pop("input"),)
        scores = self._passed("scores", scores)
        pattern = self._passed("pattern", func(scores, *others, **kwargs))
        is_done = self.is_beside and not self.is_written
        if is_done and not (pattern.requires_grad and not self.is_random):
            raise _Enough
        return pattern

    def _passed(self, name: str, whole: Tensor) -> Tensor:
        if not self._pieces.is_wanted(name):
            self._pieces.passed(name, None)
            return whole
        given = whole if whole.shape[-1] == self._keys else whole[..., : self._keys]  # no sink
        given = given.to(self._dtype)
        given = _own(given) if name == "pattern" else given
        was = _Was(given)
        new = self._pieces.passed(name, given)
        if new is given and not was.changed():
            return _put_back(given, whole) if given.requires_grad else whole
        self.is_written = True
        return _put_back(new, whole)


@final
class _Was:
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


def _own(tensor: Tensor) -> Tensor:
    """`tensor`, copied if the operation that made it will want it unchanged in backward."""
    return tensor.clone() if tensor.requires_grad else tensor


def _put_back(new: Tensor, whole: Tensor) -> Tensor:
    """`new` as the model had it: in its dtype, and with the column of a sink."""
    new = new.to(whole.dtype)
    keys = new.shape[-1]
    return new if keys == whole.shape[-1] else torch.cat([new, whole[..., keys:]], -1)


@final
class _RealWithGradients(torch.autograd.Function):
    """The value that the model computed, with the gradient through the pattern."""

    @staticmethod
    def forward(ctx: Any, eager: Tensor, real: Tensor) -> Tensor:
        return real.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def _with_gradients_of(eager: Tensor, real: Tensor) -> Tensor:
    return cast("Tensor", _RealWithGradients.apply(eager, real))
