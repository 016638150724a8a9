"""Run a model without computing: fake tensors, which know all of a tensor but its numbers."""

from __future__ import annotations

from typing import Any, cast, final

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily

from tracekit.core.nest import Nest, map_leaves

# Integers and booleans are computed all the same, up to this many: token ids, masks and image
# grids decide which way a forward goes, and cost nothing beside it.
MOST_KNOWN_INTEGERS = 1 << 22

_GROUPED_MM: Any = getattr(torch.ops.aten, "_grouped_mm", None)


@final
class DryMode(FakeTensorMode):
    """Makes every tensor of the thread fake while it is entered.

    With `knows_integers`, integers and booleans that follow from the inputs keep their values, so
    that `ids.max()` and `mask.nonzero()` mean what they say. A float has no number to look at.
    """

    def __init__(self, knows_integers: bool = True) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self._knows_integers = knows_integers

    def fake(self, nest: Nest) -> Nest:
        """`nest` with fake tensors in the place of its tensors, which are left alone."""
        return map_leaves(self._fake_leaf, nest)

    def fake_tensor(self, tensor: Tensor) -> Tensor:
        """A fake tensor of the same kind; one on meta, which has no numbers anyway, is on CPU."""
        if isinstance(tensor, FakeTensor):
            return tensor
        if tensor.is_meta:
            return self._instead_of_meta(tensor)
        if self.may_turn_const(tensor) and not isinstance(tensor, nn.Parameter):
            with unset_fake_temporarily():
                known = tensor.detach().clone()  # operations in place write into it
            return self.fake_tensor_converter.from_real_tensor(self, known, make_constant=True)
        return self.from_tensor(tensor, static_shapes=True)

    def may_turn_const(self, t: Tensor) -> bool:
        """Whether the numbers of `t` are worth knowing (FakeTensorMode asks)."""
        if not self._knows_integers or t.is_floating_point() or t.is_complex():
            return super().may_turn_const(t)
        is_plain = t.layout is torch.strided and not t.is_meta and not isinstance(t, FakeTensor)
        return is_plain and t.numel() <= MOST_KNOWN_INTEGERS

    def dispatch(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """One operation (FakeTensorMode calls it)."""
        if _GROUPED_MM is not None and func is _GROUPED_MM.default:
            return self._grouped_mm(*args, **(kwargs or {}))
        return super().dispatch(func, types, args, kwargs or {})

    def _fake_leaf(self, leaf: Any) -> Any:
        return self.fake_tensor(leaf) if isinstance(leaf, Tensor) else leaf

    def _instead_of_meta(self, tensor: Tensor) -> Tensor:
        with self:
            fake: Tensor = torch.empty_strided(
                tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu"
            )
        if isinstance(tensor, nn.Parameter):
            return nn.Parameter(fake, tensor.requires_grad)
        return fake.requires_grad_(tensor.requires_grad)

    def _grouped_mm(
        self, a: Tensor, b: Tensor, offs: Tensor | None = None, *_: Any, **__: Any
    ) -> Any:
        # torch's own rule for it (2.13) wants bfloat16, though the operation takes more
        if a.dim() == 2 and b.dim() == 2:
            assert offs is not None
            return a.new_empty(len(offs), a.shape[0], b.shape[1])
        if a.dim() == 3 and b.dim() == 2:
            return a.new_empty(a.shape[1], b.shape[1])
        return a.new_empty(*a.shape[:-1], b.shape[-1])


def is_fake(value: object) -> bool:
    """Whether `value` is a tensor without numbers."""
    return isinstance(value, FakeTensor)


def to_meta(nest: Nest) -> Nest:
    """`nest` with its fake tensors on meta: what is safe to keep when the run is over.

    Outside of its mode a fake tensor computes and prints as if it were real.
    """
    return map_leaves(_meta_leaf, nest)


def _meta_leaf(leaf: Any) -> Any:
    if not isinstance(leaf, FakeTensor):
        return leaf
    fake = cast("Any", leaf)
    return torch.empty_strided(fake.shape, fake.stride(), dtype=fake.dtype, device="meta")
