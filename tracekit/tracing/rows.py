"""The part of each value that belongs to one invoke: narrowed for its block, and put back."""

from __future__ import annotations

from typing import final

from torch import Tensor

from tracekit.core.nest import Nest, map_leaves, tensors
from tracekit.core.origins import stands_for
from tracekit.core.site import Slot, Visit
from tracekit.core.versions import version
from tracekit.errors import RowsError
from tracekit.interleave.duties import Part, Unsettled
from tracekit.tracing.layouts import Layouts


@final
class InvokeRows:
    """Rows `start` to `stop` of a batch of `size`."""

    def __init__(self, layouts: Layouts, start: int, stop: int, size: int) -> None:
        self._layouts = layouts
        self.start = start
        self.stop = stop
        self._size = size

    def narrow(self, visit: Visit, whole: Nest) -> Part:
        """The part of `whole`, as views; what has no rows passes through.

        Of a value that other blocks have changed it is the part of what that was before them: their
        rows are others, and an edit in place must reach the memory that the model goes on with.
        """
        patched = whole if isinstance(whole, _Patched) else _Patched(whole)
        whole = patched.whole
        leaves = [
            self._leaf(tensor, axis)
            for tensor, axis in zip(tensors(whole), self._axes(visit, whole), strict=True)
        ]
        return _Part(visit, patched, _with_tensors(whole, [leaf.part for leaf in leaves]), leaves)

    def _axes(self, visit: Visit, whole: Nest) -> list[int | None]:
        if visit.site.slot is Slot.RESULT:  # the tokens of a generation, or the root's output
            return [0 if _has_rows(each, self._size) else None for each in tensors(whole)]
        layouts = self._layouts.of(visit.site, whole, self._size, visit.call)
        return [None if layout is None else layout.axis for layout in layouts]

    def _leaf(self, whole: Tensor, axis: int | None) -> _Leaf:
        if axis is None:
            return _Leaf(whole, whole, None)
        per_row = whole.shape[axis] // self._size
        span = (axis, self.start * per_row, (self.stop - self.start) * per_row)
        part = whole.narrow(*span)
        if whole.stride(axis) == 0 and whole.shape[axis] > 1:  # all rows are one in memory
            part = part.clone()
        if part.requires_grad:
            stands_for(part, whole, axis, span[1], span[1] + span[2])
        return _Leaf(whole, part, span)


def _has_rows(tensor: Tensor, size: int) -> bool:
    return tensor.dim() > 0 and tensor.shape[0] > 0 and tensor.shape[0] % size == 0


def _with_tensors(nest: Nest, news: list[Tensor]) -> Nest:
    """`nest`, with its tensors replaced in order."""
    following = iter(news)
    return map_leaves(lambda leaf: next(following) if isinstance(leaf, Tensor) else leaf, nest)


@final
class _Leaf:
    """One tensor of a value: the whole, and the part of it."""

    def __init__(self, whole: Tensor, part: Tensor, span: tuple[int, int, int] | None) -> None:
        self.whole = whole
        self.part = part
        self.span = span  # axis, start, length; None: it has no rows
        self._version = version(part)

    def is_replaced_by(self, visit: Visit, new: Tensor) -> bool:
        """Whether the whole needs `new` in the place of the part; an edit of a view is in it."""
        is_leaf = new.requires_grad and not self.whole.requires_grad  # the block made it one
        is_changed = new is not self.part or version(new) != self._version
        is_there = new is self.part and self.span and new._base is not None
        if (not is_changed or is_there) and not is_leaf:
            return False
        if self.span is None:
            raise RowsError(
                f"{visit} has a tensor of shape {tuple(self.whole.shape)} that belongs to all rows "
                f"alike, and the block of one invoke changed it; change it in "
                f"`with tracer.invoke():`, which stands for all of them."
            )
        return True


@final
class _Patched(Unsettled):
    """A value, and what blocks put in the places of their rows of its tensors."""

    def __init__(self, whole: Nest) -> None:
        self.whole = whole
        self._patches: list[tuple[int, tuple[int, int, int], Tensor]] = []

    def patch(self, index: int, span: tuple[int, int, int], new: Tensor) -> None:
        """Put `new` into the span of the `index`-th tensor."""
        self._patches.append((index, span, new))

    def settled(self) -> Nest:
        """The value itself if nothing was replaced, else one with copies of what was."""
        wholes = list(tensors(self.whole))
        for index in {index for index, _, _ in self._patches}:
            wholes[index] = wholes[index].clone()
        for index, span, new in self._patches:
            wholes[index].narrow(*span).copy_(new)
        return _with_tensors(self.whole, wholes) if self._patches else self.whole


@final
class _Part:
    """What a block sees of a value."""

    def __init__(self, visit: Visit, patched: _Patched, value: Nest, leaves: list[_Leaf]) -> None:
        self._visit = visit
        self._patched = patched
        self.value = value
        self._leaves = leaves

    def put_back(self, new: Nest) -> _Patched:
        """The whole value, with `new` in the place of the part."""
        news = list(tensors(new))
        if len(news) != len(self._leaves):
            raise RowsError(
                f"{self._visit} had {len(self._leaves)} tensors and was left with {len(news)} by "
                f"the block of one invoke: assign a value of the same structure."
            )
        for index, (leaf, own) in enumerate(zip(self._leaves, news, strict=True)):
            if leaf.is_replaced_by(self._visit, own):
                assert leaf.span is not None
                self._patched.patch(index, leaf.span, own)
        return self._patched
