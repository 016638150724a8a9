"""Where the tensors that blocks hold came from: their visits, and whose rows they are."""

# Held weakly and for the whole process: a trace may be over when its values are asked for their
# gradients. An entry goes when its tensor does.

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Final, NamedTuple, final
from weakref import ReferenceType, ref

from torch import Tensor

from tracekit.core.nest import Nest, tensors


@final
@dataclass(frozen=True)
class Part:
    """Entries `start` to `stop` along `axis`."""

    axis: int
    start: int
    stop: int

    def of(self, whole: Tensor) -> Tensor:
        """This part of a tensor; a view."""
        return whole.narrow(self.axis, self.start, self.stop - self.start)


@final
@dataclass(frozen=True, eq=False)
class Rows:
    """A part of `base`, which is of the whole batch."""

    base: Tensor
    part: Part


class Origin(NamedTuple):  # one is made for each tensor that is read: a dataclass costs more
    """What is known of one tensor."""

    tensor: ReferenceType[Tensor]
    label: object = None  # the visit where a block got it
    had_grad: bool = True  # whether the model computed under grad mode then
    rows: Rows | None = None


_origins: Final[dict[int, Origin]] = {}


def note_visit(label: object, nest: Nest, had_grad: bool) -> None:
    """Remember that a block got every tensor in `nest` at `label`."""
    for tensor in (nest,) if isinstance(nest, Tensor) else tensors(nest):
        key = id(tensor)
        known = origin_of(tensor)
        if known is None:
            _origins[key] = Origin(ref(tensor, partial(_forget, key)), label, had_grad)
        else:
            _origins[key] = known._replace(label=label, had_grad=had_grad)


def stands_for(view: Tensor, base: Tensor, axis: int, start: int, stop: int) -> None:
    """Remember that a block gets `view` as rows `start` to `stop` of `base`, along `axis`.

    The gradient of `view` then means these rows of the gradient of `base`, which the model goes
    on with. Keeps `base` alive as long as `view`.
    """
    _put(view, _entry(view)._replace(rows=Rows(base, Part(axis, start, stop))))


def origin_of(tensor: Tensor) -> Origin | None:
    """What is known of `tensor`, if a block got it from a model."""
    found = _origins.get(id(tensor))
    return found if found is not None and found.tensor() is tensor else None


def known_origins() -> list[tuple[Tensor, object]]:
    """The tensors that blocks got and that somebody holds now, each with its label."""
    found = [(origin.tensor(), origin.label) for origin in list(_origins.values())]
    return [(tensor, label) for tensor, label in found if tensor is not None]


def _entry(tensor: Tensor) -> Origin:
    key = id(tensor)
    return origin_of(tensor) or Origin(ref(tensor, partial(_forget, key)))


def _put(tensor: Tensor, origin: Origin) -> None:
    _origins[id(tensor)] = origin


def _forget(key: int, gone: ReferenceType[Tensor]) -> None:
    found = _origins.get(key)
    if found is not None and found.tensor is gone:
        del _origins[key]
