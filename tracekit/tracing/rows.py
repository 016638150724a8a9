"""The part of each value that belongs to one invoke: narrowed for its block, and put back."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import final

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from tracekit.core.nest import Nest, difference, map_leaves, named_tensors, tensors
from tracekit.core.origins import stands_for
from tracekit.core.site import Site, Slot, Visit
from tracekit.core.versions import changes
from tracekit.errors import RowsError
from tracekit.interleave.duties import Part, Span, Unsettled
from tracekit.tracing.layouts import Layouts


@final
class Copies:
    """Values that were put together in one run: the model goes on with a copy of what it had.

    For whoever put rows into it, the copy is what alone the new value would be; for the others
    it is not, as what they have elsewhere in the memory of the old value is not in the copy.
    """

    def __init__(self) -> None:
        self._made: list[tuple[StorageWeakRef, set[object]]] = []

    def add(self, tensor: Tensor, authors: set[object]) -> None:
        """Remember that `tensor` is one, with rows of these authors."""
        self._made.append((StorageWeakRef(tensor.untyped_storage()), authors))

    def has(self, tensor: Tensor, author: object) -> bool:
        """Whether `tensor` lies in the memory of one, without rows of this author."""
        if not self._made:
            return False
        own = StorageWeakRef(tensor.untyped_storage())
        return any(made.cdata == own.cdata and author not in of for made, of in self._made)


@final
class AllRows:
    """All rows, for one of several blocks: it may keep what later blocks change in place.

    So it gets a copy, and what it changed in that is written where the model has it.
    """

    is_all = True

    def __init__(self, copies: Copies) -> None:
        self._copies = copies

    def narrow(self, visit: Visit, whole: Nest) -> Part:
        """A copy of all of `whole`."""
        whole = whole.settled() if isinstance(whole, Unsettled) else whole
        leaves: list[_Leaf] = []
        for tensor in tensors(whole):
            part = tensor.clone()
            if part.requires_grad and part.dim():
                stands_for(part, tensor, 0, 0, tensor.shape[0])
            leaves.append(_Leaf(tensor, part, None))
        value = _with_tensors(whole, [leaf.part for leaf in leaves])
        return _Whole(visit, _Patched(whole, self._copies), value, leaves)

    @property
    def span(self) -> Span:
        """All of them."""
        return Span(0, 1, 1)


@final
class InvokeRows:
    """Rows `start` to `stop` of a batch of `size`."""

    is_all = False

    def __init__(
        self,
        layouts: Layouts,
        start: int,
        stop: int,
        size: int,
        copies: Copies,
        learn: Callable[[Site], None],
        is_generation: bool = False,
    ) -> None:
        self._learn = learn
        self._is_generation = is_generation
        self._copies = copies
        self._layouts = layouts
        self.start = start
        self.stop = stop
        self._size = size

    def narrow(self, visit: Visit, whole: Nest) -> Part:
        """The part of `whole`, as views; what has no rows passes through.

        Of a value that other blocks have changed it is the part of what that was before them: their
        rows are others, and an edit in place must reach the memory that the model goes on with.
        """
        patched = whole if isinstance(whole, _Patched) else _Patched(whole, self._copies)
        whole = patched.whole
        leaves = [
            self._leaf(tensor, axis)
            for tensor, axis in zip(tensors(whole), self._axes(visit, whole), strict=True)
        ]
        is_tensor = isinstance(whole, Tensor)
        value = (
            leaves[0].part if is_tensor else _with_tensors(whole, [each.part for each in leaves])
        )
        return _Part((self.start, self.stop), visit, patched, value, leaves)

    @property
    def span(self) -> Span:
        """Where they lie in the batch."""
        return Span(self.start, self.stop, self._size)

    def _axes(self, visit: Visit, whole: Nest) -> list[int | None]:
        if visit.site.slot is Slot.RESULT and self._is_generation:  # no forward pass returns it
            return [0 if _has_rows(each, self._size) else None for each in tensors(whole)]
        self._learn(visit.site)
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
        self._version = changes(part)

    def is_edited(self) -> bool:
        """Whether the part was changed in place."""
        return changes(self.part) != self._version

    def is_leaf(self, new: Tensor) -> bool:
        """Whether the block lets gradients begin at `new`."""
        return new.requires_grad and not self.whole.requires_grad

    def is_replaced_by(self, visit: Visit, new: Tensor, is_copy: bool) -> bool:
        """Whether the whole needs `new` in the place of the part; an edit of a view is in it."""
        is_leaf = self.is_leaf(new)
        is_changed = new is not self.part or changes(new) != self._version
        is_there = new is self.part and self.span and new._base is not None
        if (not is_changed or is_there) and not is_leaf:
            if is_changed and is_copy:
                raise _edited_copy(visit)
            return False
        if self.span is None:
            raise RowsError(
                f"{visit} has a tensor of shape {tuple(self.whole.shape)} that belongs to all rows "
                f"alike, and the block of one invoke changed it; change it in "
                f"`with tracer.invoke():`, which stands for all of them."
            )
        return True


def _edited_copy(visit: Visit) -> RowsError:
    return RowsError(
        f"{visit} was edited in place, after another block had put its own rows into this value: "
        f"what the model has elsewhere in the same memory would not be changed, as it is where the "
        f"input is traced alone. Assign instead, as in {visit.site} = {visit.site} + 1."
    )


@final
class _Patched(Unsettled):
    """A value, and what blocks put in the places of their rows of its tensors."""

    def __init__(self, whole: Nest, copies: Copies) -> None:
        self.whole = whole
        self.copies = copies
        self._patches: list[tuple[int, tuple[int, int, int], Tensor, object]] = []

    def patch(self, index: int, span: tuple[int, int, int], new: Tensor, author: object) -> None:
        """Put `new` into the span of the `index`-th tensor."""
        self._patches.append((index, span, new, author))

    def settled(self) -> Nest:
        """The value itself if nothing was replaced, else one with copies of what was."""
        wholes = list(tensors(self.whole))
        for index in {index for index, *_ in self._patches}:
            wholes[index] = wholes[index].clone()
            authors = {author for patched, *_, author in self._patches if patched == index}
            self.copies.add(wholes[index], authors)
        for index, span, new, _ in self._patches:
            wholes[index].narrow(*span).copy_(new)
        return _with_tensors(self.whole, wholes) if self._patches else self.whole


@final
class _Part:
    """What a block sees of a value."""

    def __init__(
        self, author: object, visit: Visit, patched: _Patched, value: Nest, leaves: list[_Leaf]
    ) -> None:
        self._author = author
        self._visit = visit
        self._patched = patched
        self.value = value
        self.whole = patched.whole
        self._leaves = leaves

    def put_back(self, new: Nest) -> _Patched:
        """The whole value, with `new` in the place of the part."""
        if new is self.value and isinstance(new, Tensor):
            [leaf] = self._leaves
            if not leaf.is_edited() and not leaf.is_leaf(new):
                return self._patched
        whole = self._patched.whole
        news = dict(named_tensors(new))
        if news.keys() != dict(named_tensors(whole)).keys():
            raise RowsError(
                f"{self._visit} had {len(self._leaves)} tensors and was left with {len(news)} by "
                f"the block of one invoke, or with others: assign a value of the same structure."
            )
        other = difference(new, whole)
        if other is not None:
            raise RowsError(
                f"{self._visit} was left with another {'.'.join(map(str, other)) or 'structure'} "
                f"by the block of one invoke, and what is no tensor is one for all rows: change "
                f"it in `with tracer.invoke():`, which stands for all of them."
            )
        for index, ((key, _), leaf) in enumerate(
            zip(named_tensors(whole), self._leaves, strict=True)
        ):
            own = news[key]
            is_copy = self._patched.copies.has(leaf.whole, self._author)
            if leaf.is_replaced_by(self._visit, own, is_copy):
                assert leaf.span is not None
                self._patched.patch(index, leaf.span, own, self._author)
        return self._patched


@final
class _Whole:
    """What a block sees of a value, if it sees all of it."""

    def __init__(self, visit: Visit, patched: _Patched, value: Nest, leaves: list[_Leaf]) -> None:
        self._visit = visit
        self._patched = patched
        self.value = value
        self.whole = patched.whole
        self._leaves = leaves

    def put_back(self, new: Nest) -> Nest:
        """The value, with what the block edited; or what it wrote."""
        for leaf in self._leaves:
            if leaf.is_edited():
                if self._patched.copies.has(leaf.whole, None):
                    raise _edited_copy(self._visit)
                leaf.whole.copy_(leaf.part)
        wholes = {id(leaf.part): leaf.whole for leaf in self._leaves if not leaf.is_leaf(leaf.part)}
        whole = map_leaves(lambda own: wholes.get(id(own), own), new)
        is_same = all(map(operator.is_, tensors(whole), tensors(self._patched.whole)))
        is_same = is_same and difference(whole, self._patched.whole) is None
        return self._patched.whole if is_same else whole
