"""Run a model without computing: fake tensors, which know all of a tensor but its numbers."""

from __future__ import annotations

import logging
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
    unset_fake_temporarily,
)

from tracekit.core.nest import Nest, map_leaves
from tracekit.errors import DryRunError

# Integers and booleans are computed all the same, up to this many: token ids, masks and image
# grids decide which way a forward goes, and cost nothing beside it.
MOST_KNOWN_INTEGERS = 1 << 22

_GROUPED_MM: Any = getattr(torch.ops.aten, "_grouped_mm", None)
_WORDS = {
    "_local_scalar_dense": "`.item()`, or a tensor in an `if`,",
    "nonzero": "choosing by a mask",
    "index": "choosing by a mask",
    "masked_select": "choosing by a mask",
    "equal": "comparing tensors",
}
_log: Final = logging.getLogger("torch._subclasses.fake_tensor")


class DryMode(FakeTensorMode):
    """Makes every tensor of the thread fake while it is entered.

    With `knows_integers`, integers and booleans that follow from the inputs keep their values, so
    that `ids.max()` and `mask.nonzero()` mean what they say. A float has no number to look at.
    """

    def __init__(self, knows_integers: bool = True) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self._knows_integers = knows_integers
        self._entered = 0
        self.places: dict[int, torch.device] = {}  # where those on meta are used, by identity

    def fake(self, nest: Nest) -> Nest:
        """`nest` with fake tensors in the place of its tensors, which are left alone."""
        return map_leaves(self._fake_leaf, nest)

    def fake_tensor(self, tensor: Tensor) -> Tensor:
        """A fake tensor of the same kind; one on meta, which has no numbers anyway, is on
        the CPU, or where accelerate would bring it."""
        if isinstance(tensor, FakeTensor):
            return tensor
        if tensor.is_meta:
            return self._instead_of_meta(tensor)
        if self._is_known(tensor):
            return self._known(tensor)
        if tensor.is_leaf:
            return self.from_tensor(tensor, static_shapes=True)
        with unset_fake_temporarily():
            leaf = tensor.detach()
        return self.from_tensor(leaf, static_shapes=True).requires_grad_(tensor.requires_grad)

    def may_turn_const(self, t: Tensor) -> bool:
        """Whether the numbers of `t` are worth knowing (FakeTensorMode asks)."""
        if not self._knows_integers or t.is_floating_point() or t.is_complex():
            return super().may_turn_const(t)
        is_plain = t.layout is torch.strided and not t.is_meta and not isinstance(t, FakeTensor)
        return is_plain and t.numel() <= MOST_KNOWN_INTEGERS

    def validate_and_convert_non_fake_tensors(
        self, func: Any, converter: Any, flat_args: Any, args_spec: Any
    ) -> Any:
        """The arguments of an operation, none of them real (FakeTensorMode asks)."""
        known = [self._known(arg) if self._is_known(arg) else arg for arg in flat_args]
        return super().validate_and_convert_non_fake_tensors(func, converter, known, args_spec)

    def dispatch(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """One operation (FakeTensorMode calls it)."""
        if _GROUPED_MM is not None and func is _GROUPED_MM.default:
            return _grouped_mm(*args, **(kwargs or {}))
        try:
            return super().dispatch(func, types, args, kwargs or {})
        except (DataDependentOutputException, DynamicOutputShapeException):
            raise DryRunError(
                f"{_WORDS.get(func.overloadpacket.__name__, func)} needs numbers, and a dry run "
                f"has none: ask for shapes, dtypes and devices, or write trace() for scan()."
            ) from None
        except (UnsupportedOperatorException, UnsupportedFakeTensorException) as error:
            raise DryRunError(
                f"{func} can't be run dry, as torch does not know the shape of what it returns "
                f"({type(error).__name__}): write trace() for scan()."
            ) from None

    def __enter__(self) -> DryMode:
        self._entered += 1
        if self._entered == 1:  # an operation may enter it again
            _log.addFilter(self._is_news)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        self._entered -= 1
        if self._entered == 0:
            _log.removeFilter(self._is_news)
        super().__exit__(*error)

    def _is_news(self, record: logging.LogRecord) -> bool:
        """Whether a line of torch's log is worth printing: its errors are raised as well."""
        return not str(record.msg).startswith("failed while attempting to run meta")

    def _fake_leaf(self, leaf: Any) -> Any:
        return self.fake_tensor(leaf) if isinstance(leaf, Tensor) else leaf

    def _is_known(self, value: object) -> bool:
        """Whether `value` is a real tensor whose numbers a dry run keeps."""
        return type(value) is Tensor and self.may_turn_const(value)

    def _known(self, tensor: Tensor) -> Tensor:
        with unset_fake_temporarily():
            copied = tensor.detach().clone()  # operations in place write into it
        return self.fake_tensor_converter.from_real_tensor(self, copied, make_constant=True)

    def _instead_of_meta(self, tensor: Tensor, device: torch.device | str = "cpu") -> Tensor:
        with self:
            fake: Tensor = torch.empty_strided(
                tensor.shape,
                tensor.stride(),
                dtype=tensor.dtype,
                device=self.places.get(id(tensor), device),
            )
        if isinstance(tensor, nn.Parameter):
            return nn.Parameter(fake, tensor.requires_grad)
        return fake.requires_grad_(tensor.requires_grad)


def _grouped_mm(a: Tensor, b: Tensor, offs: Tensor | None = None, *_: Any, **__: Any) -> Tensor:
    # torch's own rule for it (2.13) wants bfloat16, though the operation takes more
    if a.dim() == 2 and b.dim() == 2:
        assert offs is not None
        return a.new_empty(len(offs), a.shape[0], b.shape[1])
    if a.dim() == 3 and b.dim() == 2:
        return a.new_empty(a.shape[1], b.shape[1])
    return a.new_empty(*a.shape[:-1], b.shape[-1])
