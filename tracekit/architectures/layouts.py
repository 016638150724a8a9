"""How the tensor of a standard name lies in the tensor of a module: each layout gives a view."""

# A view shares the memory of what it is a view of, so an edit in place arrives in the model. The
# same layouts divide a weight: its output features lie as the output does.

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from torch import Tensor

View: TypeAlias = Callable[[Tensor], Tensor]
# Numbers of a stack of layers, by name: "heads", "kv_heads", "head_dim".
Sizes: TypeAlias = Mapping[str, int]


class Layout(Protocol):
    """Which part of a tensor is meant, for the sizes of a model."""

    def view(self, tensor: Tensor, sizes: Sizes) -> Tensor: ...


@dataclass(frozen=True)
class Whole:
    """The tensor itself."""

    def view(self, tensor: Tensor, sizes: Sizes) -> Tensor:
        return tensor


@dataclass(frozen=True)
class Rows:
    """All axes but the last in one: `[rows, features]`."""

    def view(self, tensor: Tensor, sizes: Sizes) -> Tensor:
        return tensor.view(-1, tensor.shape[-1])


@dataclass(frozen=True)
class Grid:
    """`[batch, height, width, features]` with the rows of a picture one after the other."""

    def view(self, tensor: Tensor, sizes: Sizes) -> Tensor:
        return tensor.view(tensor.shape[0], -1, tensor.shape[-1])


@dataclass(frozen=True)
class ChannelsFirst:
    """`[batch, features, height, width]` as `[batch, pos, features]`, a picture row by row."""

    def view(self, tensor: Tensor, sizes: Sizes) -> Tensor:
        return tensor.view(*tensor.shape[:2], -1).transpose(1, 2)


@dataclass(frozen=True)
class Heads:
    """The last axis divided into heads: `[..., heads, head_dim]`."""

    count: str = "heads"

    def view(self, tensor: Tensor, sizes: Sizes) -> Tensor:
        return tensor.unflatten(-1, (sizes[self.count], -1))


@dataclass(frozen=True)
class Chunk:
    """One of several equal parts of the last axis: a gate beside what it is multiplied with."""

    index: int
    of: int = 2

    def view(self, tensor: Tensor, sizes: Sizes) -> Tensor:
        return tensor.chunk(self.of, dim=-1)[self.index]


@dataclass(frozen=True)
class Part:
    """One of several parts of the last axis, whose widths are sizes."""

    index: int
    widths: tuple[str, ...]

    def view(self, tensor: Tensor, sizes: Sizes) -> Tensor:
        widths = [sizes[each] for each in self.widths]
        return tensor.narrow(-1, sum(widths[: self.index]), widths[self.index])


@dataclass(frozen=True)
class Behind:
    """A part of what is behind these widths of the last axis."""

    widths: tuple[str, ...]
    part: Layout

    def view(self, tensor: Tensor, sizes: Sizes) -> Tensor:
        begin = sum(sizes[each] for each in self.widths)
        return self.part.view(tensor.narrow(-1, begin, tensor.shape[-1] - begin), sizes)


@dataclass(frozen=True)
class OfEachHead:
    """A part of each head: `[..., heads, part]`."""

    part: Layout
    count: str = "heads"

    def view(self, tensor: Tensor, sizes: Sizes) -> Tensor:
        return self.part.view(tensor.unflatten(-1, (sizes[self.count], -1)), sizes)


@dataclass(frozen=True)
class OneBehindTheOther:
    """Queries, keys and values of all heads, one behind the other: GPT-2, Phi-3."""

    part: int

    def view(self, tensor: Tensor, sizes: Sizes) -> Tensor:
        counts = (sizes["heads"], sizes["kv_heads"], sizes["kv_heads"])
        width = tensor.shape[-1] // sum(counts)
        begin, count = sum(counts[: self.part]), counts[self.part]
        return tensor.narrow(-1, begin * width, count * width).unflatten(-1, (count, width))


@dataclass(frozen=True)
class HeadByHead:
    """Of each head its query, key and value, then the next head: BLOOM, GPT-NeoX."""

    part: int

    def view(self, tensor: Tensor, sizes: Sizes) -> Tensor:
        return tensor.unflatten(-1, (sizes["heads"], 3, -1)).select(-2, self.part)


@dataclass(frozen=True)
class GroupByGroup:
    """Of each group of heads that share a key: their queries, the key, the value (Falcon).

    Queries are `[..., groups, heads of a group, head_dim]`: no view has them in one axis.
    """

    part: int

    def view(self, tensor: Tensor, sizes: Sizes) -> Tensor:
        groups, per_group = sizes["kv_heads"], sizes["heads"] // sizes["kv_heads"]
        each = tensor.unflatten(-1, (groups, per_group + 2, -1))
        if self.part > 0:
            return each.select(-2, per_group + self.part - 1)
        return each.narrow(-2, 0, per_group)


@dataclass(frozen=True)
class HeadsFirst:
    """`[batch, heads, pos, head_dim]`, as attention functions are given them, positions first."""

    def view(self, tensor: Tensor, sizes: Sizes) -> Tensor:
        return tensor.transpose(1, 2)


@dataclass(frozen=True)
class Viewed:
    """The view of a layout, for the sizes of one model."""

    layout: Layout
    sizes: Sizes

    def __call__(self, tensor: Tensor) -> Tensor:
        return self.layout.view(tensor, self.sizes)


WHOLE = Viewed(Whole(), {})  # the tensor itself
