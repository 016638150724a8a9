"""A dry run that goes on where numbers decide: it supposes which, so that no size is too small."""

# What is supposed:
#   - a choice among all (argmax, multinomial: the next token) is FIRST_TOKEN;
#   - what a mask chooses is all there is (`mask.nonzero()`, `x[mask]`): an upper bound of the
#     tokens that a router sends to one expert.

from __future__ import annotations

from typing import Any, Final, final

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily

from tracekit.core.dry import MOST_KNOWN_INTEGERS, DryMode
from tracekit.core.ledger import Ledger
from tracekit.core.nest import tensors

FIRST_TOKEN: Final = 1
_ATEN: Final[Any] = torch.ops.aten
_INTEGERS: Final = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)


@final
class SupposingMode(DryMode):
    """Makes every tensor fake, and writes down in `ledger` what an operation makes.

    `is_bounded` says whether a size was supposed. Tensors on meta are taken to be on the CPU, if
    `homes` has no other device for one (by its id).
    """

    def __init__(self, ledger: Ledger) -> None:
        super().__init__()
        self.ledger = ledger
        self.homes: dict[int, torch.device] = {}
        self.is_bounded = False
        self._depth = 0

    def fake_tensor(self, tensor: Tensor) -> Tensor:
        """A fake tensor of the same kind."""
        if not isinstance(tensor, FakeTensor) and tensor.is_meta:
            return self._instead_of_meta(tensor, self.homes.get(id(tensor), "cpu"))
        return super().fake_tensor(tensor)

    def dispatch(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """One operation; what operations inside of it make is not there in a real run."""
        self._depth += 1
        try:
            found = self._dispatched(func, types, args, kwargs or {})
        finally:
            self._depth -= 1
        if not self._depth:
            self.ledger.see(found)
        return found

    def _dispatched(self, func: Any, types: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if func in _CHOICES:
            return self._supposed(super().dispatch(func, types, args, kwargs))
        if func is _ATEN.nonzero.default and _is_unknown(args[0]):
            return self._all_of(args[0])
        if func is _ATEN.index.Tensor:
            args = (args[0], self._without_masks(args[1]))
        if func is _ATEN.masked_select.default and _is_unknown(args[1]):
            self.is_bounded = True
            return args[0].new_empty(torch.broadcast_tensors(*args)[0].numel())
        if func in _FACTORIES and not any(True for _ in tensors((args, kwargs))):
            return self._made(func, types, args, kwargs)
        return super().dispatch(func, types, args, kwargs)

    def _made(self, func: Any, types: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """A tensor made of nothing: its numbers are known, if they are few and integers."""
        found = super().dispatch(func, types, args, kwargs)
        is_small = found.dtype in _INTEGERS and found.numel() <= MOST_KNOWN_INTEGERS
        if not is_small or found.device.type == "meta":
            return found
        with unset_fake_temporarily():
            real = func(*args, **{**kwargs, "device": _real(found.device)})
        return self._known(real) if real.device == found.device else found

    def _supposed(self, chosen: Tensor) -> Tensor:
        with unset_fake_temporarily():
            device = _real(chosen.device)
            real = torch.full(chosen.shape, FIRST_TOKEN, dtype=chosen.dtype, device=device)
        return self._known(real) if real.device == chosen.device else chosen

    def _all_of(self, mask: Tensor) -> Tensor:
        self.is_bounded = True
        return mask.new_empty((mask.numel(), mask.dim()), dtype=torch.int64)

    def _without_masks(self, indices: Any) -> list[Any]:
        found: list[Any] = []
        for index in indices:
            if _is_unknown(index) and index.dtype in (torch.bool, torch.uint8):
                found += self._all_of(index).unbind(1)
            else:
                found.append(index)
        return found


def _is_unknown(value: Any) -> bool:
    return isinstance(value, FakeTensor) and value.constant is None


def _real(device: torch.device) -> torch.device:
    """Where numbers of tensors on `device` can be known."""
    is_there = device.type != "cuda" or torch.cuda.is_available()
    return device if is_there else torch.device("cpu")


_CHOICES: Final = (_ATEN.argmax.default, _ATEN.multinomial.default)
_FACTORIES: Final = (
    _ATEN.full.default,
    _ATEN.ones.default,
    _ATEN.zeros.default,
    _ATEN.arange.default,
    _ATEN.arange.start,
    _ATEN.arange.start_step,
    _ATEN.scalar_tensor.default,
)
