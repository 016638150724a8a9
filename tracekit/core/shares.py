"""What one rank has of a tensor that several divide among them: gathered, and cut again."""

# Guarantees:
#   - what is gathered is the same on all ranks, bit for bit, and cutting it gives back each share;
#   - gradients come whole where the whole is looked at, and as shares where the model goes on.

from __future__ import annotations

from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn

from tracekit.errors import UnsupportedError


class Ranks(NamedTuple):
    """The processes that have one model among them."""

    group: Any  # a torch.distributed process group on the model's devices
    rank: int  # of this one, among them
    size: int


class Share(NamedTuple):
    """A tensor lies divided along `axis`, counted from the end, in parts of these `sizes`.

    With `packed` above 1 each share is so many pieces, one of each of as many tensors that lie one
    behind the other in the whole: gate and up in one projection.
    """

    axis: int
    sizes: tuple[int, ...]
    packed: int = 1

    def fits(self, shape: torch.Size, rank: int) -> bool:
        """Whether a tensor of that shape can be the share of `rank`."""
        return len(shape) >= -self.axis and shape[self.axis] == self.sizes[rank]

    def gathered(self, local: Tensor, ranks: Ranks) -> Tensor:
        """The whole, from what each rank has; all of them have to come here."""
        if torch.is_grad_enabled() and local.requires_grad:
            return _Gathered.apply(local, self, ranks)  # pyright: ignore[reportReturnType] - a tensor
        return _gathered(local.detach(), self, ranks)

    def cut(self, whole: Tensor, ranks: Ranks) -> Tensor:
        """This rank's share of the whole, in memory of its own."""
        if torch.is_grad_enabled() and whole.requires_grad:
            return _Cut.apply(whole, self, ranks)  # pyright: ignore[reportReturnType] - a tensor
        return _cut(whole.detach(), self, ranks)


def all_gathered(
    local: Tensor, ranks: Ranks, shapes: list[torch.Size] | None = None
) -> list[Tensor]:
    """What each rank has, in their order, where it is of these shapes (by default, the same)."""
    import torch.distributed as dist

    shapes = shapes or [local.shape] * ranks.size
    numbers = max(shape.numel() for shape in shapes)
    own = (
        local.detach().contiguous().view(-1).view(torch.uint8)
    )  # of any dtype, one that the group knows
    sent = own.new_zeros(numbers * local.itemsize)
    sent[: own.numel()] = own
    came = [torch.empty_like(sent) for _ in range(ranks.size)]
    dist.all_gather(came, sent, group=ranks.group)
    sized = zip(came, shapes, strict=True)
    return [each[: s.numel() * local.itemsize].view(local.dtype).view(s) for each, s in sized]


def _gathered(local: Tensor, share: Share, ranks: Ranks) -> Tensor:
    shapes = [_sized(local.shape, share.axis, size) for size in share.sizes]
    parts = all_gathered(local, ranks, shapes)
    if share.packed == 1:
        return torch.cat(parts, share.axis)
    pieces = [part.chunk(share.packed, share.axis) for part in parts]
    return torch.cat([each[of] for of in range(share.packed) for each in pieces], share.axis)


def _cut(whole: Tensor, share: Share, ranks: Ranks) -> Tensor:
    start = sum(share.sizes[: ranks.rank]) // share.packed
    size = share.sizes[ranks.rank] // share.packed
    parts = whole.chunk(share.packed, share.axis)
    cut = [part.narrow(share.axis, start, size) for part in parts]
    return (
        cut[0].clone(memory_format=torch.contiguous_format)
        if len(cut) == 1
        else torch.cat(cut, share.axis)
    )


def _sized(shape: torch.Size, axis: int, size: int) -> torch.Size:
    sizes = list(shape)
    sizes[axis] = size
    return torch.Size(sizes)


# Every rank computes the same loss of the whole, so the gradient of a share is a part of the
# whole's; behind a cut each rank goes on with its share, so the whole's gradient is put together.
@final
class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: Tensor, share: Share, ranks: Ranks) -> Tensor:
        ctx.share, ctx.ranks = share, ranks
        return _gathered(local, share, ranks)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return _cut(gradients[0], ctx.share, ctx.ranks), None, None


@final
class _Cut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, whole: Tensor, share: Share, ranks: Ranks) -> Tensor:
        ctx.share, ctx.ranks = share, ranks
        return _cut(whole, share, ranks)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return _gathered(gradients[0], ctx.share, ctx.ranks), None, None


# -- weights --------------------------------------------------------------------------------------


def whole_weight(weight: Any) -> Any:
    """`weight`, put together if it lies on several ranks: then all of them have to come here."""
    return weight.full_tensor() if is_divided(weight) else weight


def is_divided(weight: Any) -> bool:
    """Whether a weight lies on several ranks (a DTensor that is not the same on all)."""
    placements = getattr(weight, "placements", None)
    if placements is None or not hasattr(weight, "device_mesh"):
        return False
    return weight.device_mesh.size() > 1 and not all(each.is_replicate() for each in placements)


def divided_weights(module: nn.Module) -> list[Any]:
    """The module's own weights of which each rank has a part."""
    return [each for _, each in module.named_parameters(recurse=False) if is_divided(each)]


def is_gathered_to_compute(module: nn.Module) -> bool:
    """Whether weights are put together whenever it runs (FSDP2's fully_shard)."""
    return hasattr(module, "_get_fsdp_state")


def is_on_several_ranks(root: nn.Module) -> bool:
    """Whether ranks have the weights of the model among them."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return False
    return any(divided_weights(module) for module in root.modules())


def check_copyable(root: nn.Module) -> None:
    """UnsupportedError for a model of which no copy can be made, as it lies on several ranks."""
    if is_on_several_ranks(root):
        raise UnsupportedError(
            f"this needs a copy of {type(root).__name__}, or a way round some of its layers, and "
            f"it lies on several ranks (tensor parallel, or FSDP): trace it without scan(), "
            f"invokes or start_at_layer=, or load it on one rank."
        )
