"""`module.source`: the operations inside a module's forward, listed with their lines."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast, final

from tracekit.capture.functions import unwrap
from tracekit.capture.operations import Listing, operations_of
from tracekit.core.site import Site, Slot
from tracekit.core.tree import Tree
from tracekit.errors import OutsideTraceError, SourceError, UnknownOperationError, did_you_mean
from tracekit.interleave.forwards import own_forward
from tracekit.interleave.mediator import Mediator
from tracekit.interleave.worker import current_mediator
from tracekit.tracing.slots import Calls, Slots, mediator_of, path_in


def source_of(tree: Tree, path: str, call: int) -> Source:
    """The source of the module at `path`; in a trace of its model, ready to be asked for values."""
    module = tree.module(path)
    if call > 0:
        raise SourceError(
            f"operations count their own calls in a step: write {path}.source.NAME.calls[{call}]."
        )
    known = operations_of(unwrap(own_forward(module))[0])
    if not tree.is_called(tree.canonical(path)):
        raise SourceError(
            f"{path} is a {type(module).__name__}, which is never called and has no forward; ask "
            f"one of its modules, as in {path}[0].source."
        )
    source = Source(tree, path, known)
    mediator = current_mediator()
    if mediator is not None and mediator.model.stands_for(tree):
        source.open(mediator)
    return source


@final
class Source:
    """The operations in what a module runs, or in what an operation of it calls.

    An operation is a call that is written there. It is named after what is called, with a number
    in the order in which Python makes the calls: `self.c_proj(x)` is `self_c_proj_0`. Where only
    calls on something have a name, the name alone will do: `F.softmax(x)` is `F_softmax_0` and
    `softmax_0`. Printed, it shows each name beside its line; `list(source)` has them in order.
    """

    __slots__ = ("around", "listing", "path", "tree")

    def __init__(
        self, tree: Tree, path: str, listing: Listing, around: Operation | None = None
    ) -> None:
        self.tree = tree
        self.path = path
        self.listing = listing
        self.around = around

    def open(self, mediator: Mediator) -> tuple[str, Listing]:
        """Make sites of the operations, for the run of `mediator`: under which path, and which."""
        if self.around is None:
            path = path_in(mediator.model, self.tree, self.path)
            return path, cast("Listing", mediator.open_source(Site(path, Slot.INPUT)))
        return self.around.open_call(mediator)

    def line(self, number: int) -> list[Operation]:
        """The operations on a line of the file, in order; a call is where its name stands."""
        return [operation for operation in self if operation.line == number]

    def __getattr__(self, name: str) -> Operation:
        if name.startswith("__") or name in Source.__slots__:  # half-made, in copy or pickle
            raise AttributeError(name)
        return self[name]

    def __getitem__(self, name: str) -> Operation:
        for index, call in enumerate(self.listing.calls):
            if name in (call.name, call.short_name):
                return Operation(self, index)
        known = [call.name for call in self.listing.calls]
        raise UnknownOperationError(
            f"{name!r} is no operation of {self.path}.source (print it to see all of them)"
            f"{did_you_mean(name, known)}"
        )

    def __setattr__(self, name: str, value: object) -> None:
        if name not in Source.__slots__:
            raise UnknownOperationError(
                f"{self.path}.source.{name} can't be assigned; assign to its .output or .input."
            )
        object.__setattr__(self, name, value)

    def __iter__(self) -> Iterator[Operation]:
        return (Operation(self, index) for index in range(len(self.listing.calls)))

    def __len__(self) -> int:
        return len(self.listing.calls)

    def __dir__(self) -> list[str]:
        return sorted({*object.__dir__(self), *(call.name for call in self.listing.calls)})

    def __repr__(self) -> str:
        known = self.listing
        names: dict[int, list[str]] = {}
        for call in known.calls:
            names.setdefault(call.line, []).append(call.name)
        width = max((len(call.name) for call in known.calls), default=0)
        rows = [f"{self.path}.source: {known.name}, {known.filename}"]
        for line, text in enumerate(known.lines, known.first_line):
            first, *others = names.get(line, [""])
            rows.append(f"{first:{width}}  {line:5}  {text}".rstrip())
            rows += [f"{other:{width}}  {line:5}" for other in others]
        return "\n".join(rows)


class Operation(Slots):
    """A call inside a forward: its `.output`, `.input` and `.inputs` are those of what is called.

    The object that a method is called on is not among the inputs. `.skip(value)` keeps the call
    from being made; `.source` has the operations of the function that is called.
    """

    __slots__ = ("_call", "_index", "_path", "_source")

    def __init__(self, source: Source, index: int, call: int = 0) -> None:
        self._source = source
        self._index = index
        self._call = call
        self._path = f"{source.path}.source.{self.name}"

    @property
    def name(self) -> str:
        """The name in the listing, as in `self_c_proj_0`."""
        return self._written.name

    @property
    def path(self) -> str:
        """The module's path, then `source` and the name."""
        return self._path

    @property
    def line(self) -> int:
        """The line of the file on which the name of what is called stands."""
        return self._written.line

    @property
    def calls(self) -> Calls[Operation]:
        """`operation.calls[1]` is its second call within a step, as in a loop."""
        return Calls(lambda call: Operation(self._source, self._index, call))

    @property
    def source(self) -> Source:
        """The operations of the function that is called, in a block: which it is shows there.

        Blocks until the model makes the call. SourceError if what is called is not written in
        Python, or is a module of the model, which has a `.source` of its own.
        """
        if current_mediator() is None:
            raise OutsideTraceError(
                f"which function {self._path} calls shows when the model runs: ask for "
                f"{self._path}.source in the block of a trace; it can be printed there."
            )
        mediator = mediator_of(self._source.tree, self._path, "source")
        _, known = self.open_call(mediator)
        return Source(self._source.tree, self._path, known, around=self)

    def open_call(self, mediator: Mediator) -> tuple[str, Listing]:
        """Make sites of the operations of what is called, for the run of `mediator`."""
        _, site = self._at(Slot.INPUT, "source")
        return site.path, cast("Listing", mediator.open_source(site, self._call))

    def _at(self, slot: Slot, name: str) -> tuple[Mediator, Site]:
        mediator = mediator_of(self._source.tree, self._path, name)
        path, known = self._source.open(mediator)
        if all(call.name != self.name for call in known.calls):
            raise UnknownOperationError(
                f"{self._path} is not there in this call, which is of another function: "
                f"{known.name} ({known.filename}:{known.first_line})."
            )
        return mediator, Site(f"{path}.source.{self.name}", slot)

    @property
    def _written(self) -> Any:
        return self._source.listing.calls[self._index]

    def __repr__(self) -> str:
        return f"{self._path}: {self._written.text}"
