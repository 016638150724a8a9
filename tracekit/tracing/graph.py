"""The intervention graph: what the blocks of a run asked for, in order, each with its line."""

from __future__ import annotations

import html
import json
import linecache
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from typing import Any, Final, NamedTuple, final, overload

from torch import Tensor

from tracekit.core.nest import describe
from tracekit.core.site import Line, Visit
from tracekit.interleave.mediator import Mediator

_COLUMNS: Final = ("", "kind", "what", "step", "call", "invoke", "value", "line", "source")


@final
@dataclass(frozen=True)
class Node:
    """One request: what was asked for, by which line, and what came."""

    kind: str  # read, write, edit (in place), skip, step, cache, stop
    what: str  # the site, as in "model.layers.3.output"
    step: int
    call: int
    invoke: int | None  # the how-manieth block; None: a lasting edit, or a cache around all blocks
    file: str
    line: int
    value: str  # as in "Tensor float32" or "tuple of 2"
    shape: tuple[int, ...] | None  # of a tensor
    dtype: str | None  # of a tensor
    is_deferred: bool  # asked for ahead of the block, which only stores it

    @property
    def source(self) -> str:
        """The line itself, where it can be found."""
        return linecache.getline(self.file, self.line).strip()

    @property
    def where(self) -> tuple[str, str, int, int, int | None]:
        """What makes it the same node in another run."""
        return self.kind, self.what, self.step, self.call, self.invoke


@final
class Graph(Sequence[Node]):
    """The nodes of a run. Shows as a table, in a notebook too."""

    def __init__(self, nodes: Sequence[Node]) -> None:
        self._nodes = tuple(nodes)

    @overload
    def __getitem__(self, index: int) -> Node: ...
    @overload
    def __getitem__(self, index: slice) -> Graph: ...
    def __getitem__(self, index: int | slice) -> Node | Graph:
        return Graph(self._nodes[index]) if isinstance(index, slice) else self._nodes[index]

    def __len__(self) -> int:
        return len(self._nodes)

    def __iter__(self) -> Iterator[Node]:
        return iter(self._nodes)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Graph) and self._nodes == other._nodes

    def __hash__(self) -> int:
        return hash(self._nodes)

    def __repr__(self) -> str:
        rows = [_COLUMNS, *self._rows()]
        widths = [max(len(row[column]) for row in rows) for column in range(len(_COLUMNS))]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        )

    def _repr_html_(self) -> str:
        return self.to_html()

    def to_html(self) -> str:
        """The same table as HTML; a notebook shows it."""
        head = "".join(f"<th>{name}</th>" for name in _COLUMNS)
        body = "".join(
            "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>"
            for row in self._rows()
        )
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"

    def to_json(self) -> str:
        """The nodes as a JSON list of objects."""
        return json.dumps([asdict(node) for node in self._nodes], indent=1)

    @classmethod
    def from_json(cls, text: str) -> Graph:
        """What to_json() wrote."""
        names = {field.name for field in fields(Node)}
        nodes: list[dict[str, Any]] = json.loads(text)
        return cls([_node(node, names) for node in nodes])

    def difference(self, other: Graph) -> list[str]:
        """Where another run differs, in words: of a scan and a run, or of two runs.

        Nodes that one has alone, other values, and what comes in another order. Lines, and which
        reads were deferred, may differ.
        """
        ours, theirs = _by_place(self), _by_place(other)
        here = [at for at in ours if at in theirs]
        there = [at for at in theirs if at in ours]
        found = [f"only in this one: {_told(ours[at])}" for at in ours if at not in theirs]
        found += [f"only in the other: {_told(theirs[at])}" for at in theirs if at not in ours]
        for at in here:
            own, match = _value(ours[at]), _value(theirs[at])
            if own != match:
                found.append(f"{_told(ours[at])}: {own} here, {match} in the other")
        for at, instead in zip(here, there, strict=True):
            if at != instead:
                told = f"{_told(ours[at])} here, {_told(theirs[instead])} in the other"
                return [*found, f"in another order: {told}"]
        return found

    def _rows(self) -> list[tuple[str, ...]]:
        return [
            (
                str(index),
                f"{node.kind} (deferred)" if node.is_deferred else node.kind,
                node.what,
                str(node.step),
                str(node.call),
                _asked_by(node),
                _value(node),
                str(node.line),
                node.source,
            )
            for index, node in enumerate(self._nodes)
        ]


def _node(told: dict[str, Any], names: set[str]) -> Node:
    known: dict[str, Any] = {name: value for name, value in told.items() if name in names}
    shape = known.pop("shape")
    return Node(**known, shape=None if shape is None else tuple(shape))


def _by_place(graph: Graph) -> dict[tuple[object, int], Node]:
    """Each node, by what makes it the same in another run, and the how-manieth such it is."""
    counts: Counter[object] = Counter()
    found: dict[tuple[object, int], Node] = {}
    for node in graph:
        found[node.where, counts[node.where]] = node
        counts[node.where] += 1
    return found


def _told(node: Node) -> str:
    return f"{node.kind} of {node.what} (step {node.step}, line {node.line})"


def _asked_by(node: Node) -> str:
    if node.invoke is not None:
        return str(node.invoke)
    return "all" if node.kind == "cache" else "edit"


def _value(node: Node) -> str:
    return node.value if node.shape is None else f"{list(node.shape)} {node.dtype}"


class _Noted(NamedTuple):
    """As it is noted while the model runs: no value, and nothing formatted."""

    kind: str
    visit: Visit | str
    invoke: int | None
    line: str
    shape: Any
    dtype: Any
    value: str
    is_deferred: bool


@final
class Log:
    """Takes note of what is asked in a run; holds no value."""

    def __init__(self) -> None:
        self._noted: list[_Noted] = []

    def of(self, mediator: Mediator, invoke: int | None) -> None:
        """Take note of what `mediator` carries."""
        mediator.note = partial(self.note, invoke)

    def note(
        self,
        invoke: int | None,
        kind: str,
        visit: Visit | str,
        value: object,
        line: str,
        is_deferred: bool = False,
    ) -> None:
        """One more node."""
        if isinstance(value, Tensor):
            told: tuple[Any, Any, str] = (value.shape, value.dtype, "Tensor")
        else:
            told = (None, None, describe(value) if value is not None else "")
        self._noted.append(_Noted(kind, visit, invoke, line, *told, is_deferred))

    def edited(self, visit: Visit) -> None:
        """What was read last, at `visit`, was changed in place."""
        for noted in reversed(self._noted):
            if noted.visit == visit:
                self._noted.append(noted._replace(kind="edit", is_deferred=False))
                return

    def graph(self) -> Graph:
        """What was noted so far."""
        return Graph([_made(noted) for noted in self._noted])


def _made(noted: _Noted) -> Node:
    visit, line = noted.visit, noted.line
    what, step, call = visit if isinstance(visit, Visit) else (visit, 0, 0)
    return Node(
        noted.kind,
        str(what),
        step,
        call,
        noted.invoke,
        line.file if isinstance(line, Line) else "",
        line.number if isinstance(line, Line) else 0,
        noted.value,
        tuple(noted.shape) if noted.shape is not None else None,
        str(noted.dtype).removeprefix("torch.") if noted.dtype is not None else None,
        noted.is_deferred,
    )
