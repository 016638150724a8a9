"""A stage for the protocol, without threads or torch: a model as a tree of calls on strings.

A block is a generator that yields wherever a worker would be suspended.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any

from tracekit.core.site import Site, Slot, Visit
from tracekit.interleave.interleaver import Interleaver
from tracekit.interleave.mediator import Mediator
from tracekit.interleave.passage import Passage, Watch
from tracekit.interleave.protocol import NextStep, Read, Request, Skip, State, Unwind, Write

Block = Generator[None, None, None]


@dataclass
class Module:
    """Calls its children in order on its input, and puts its own name behind the result."""

    name: str
    children: list[Module] = field(default_factory=list)


class Modules:
    """What Passage needs to know of a model."""

    def __init__(self, root: Module) -> None:
        self.name = root.name
        self.shared: list[str] = []
        self._children: dict[str, list[str]] = {}
        self._ancestors: dict[str, list[str]] = {}
        self._add(root, root.name, [])

    def _add(self, module: Module, path: str, above: list[str]) -> None:
        self._ancestors[path] = above
        self._children[path] = [f"{path}.{child.name}" for child in module.children]
        for child in module.children:
            self._add(child, f"{path}.{child.name}", [path, *above])

    @property
    def paths(self) -> list[str]:
        return list(self._children)

    def called_children(self, path: str) -> list[str]:
        return self._children[path]

    def ancestors(self, path: str) -> list[str]:
        return self._ancestors[path]

    def callers(self, path: str) -> list[str]:
        return self._ancestors[path][:1]

    def untapped(self, path: str) -> None:
        """There are no values inside modules here."""

    def is_module(self, path: str) -> bool:
        return True


class Stage:
    """Runs a tree of Modules beside blocks, as hooks would; only watched modules report."""

    def __init__(self, root: Module) -> None:
        self.modules = Modules(root)
        self.watches: dict[str, Watch] = {}
        self.interleaver = Interleaver(
            Passage(self.modules, self.watch_ends, self.watch_begins), self, self, lambda: 3
        )
        self.begins: set[str] = set()
        self.mediators: list[Mediator] = []
        self.result: str | None = None

    def watch_ends(self, watch: Watch) -> None:
        self.watches[watch.path] = watch

    def watch_begins(self, watch: Watch) -> None:
        self.begins.add(watch.path)

    def untapped(self, path: str) -> None:
        """There are no values inside modules here."""

    def make_skippable(self, path: str) -> None:
        """Every module of the stage can be skipped."""

    def show(self, visit: Visit, value: object) -> None:
        """No observers here."""

    def look(self, visit: Visit, value: object) -> list[Any]:
        """Nobody wants to know what becomes of a string."""
        return []

    def hand_out(self, visit: Visit, value: object, whole: object, is_own: bool) -> None:
        """Strings are never overwritten in place."""

    def take_back(self, visit: Visit, value: object, is_other: bool) -> object:
        """Strings are never overwritten in place."""
        return value

    def add_block(self, script: Callable[[Actor], Block]) -> Mediator:
        mediator = Mediator(None, self.interleaver, misfit, lambda: "line 0")
        mediator.channel = Scripted(mediator, script(Actor(self.interleaver, mediator)))
        self.interleaver.mediators.append(mediator)
        self.mediators.append(mediator)
        return mediator

    def run(self, steps: int = 1) -> None:
        """What an Execution does, in its order."""
        try:
            self.interleaver.start()
            for step in range(steps):
                self.result = self._call(self.modules.name, f"x{step}")
                if steps > 1:
                    self.interleaver.end_step()
            self.interleaver.finish(self.result)
        except Unwind:
            pass
        finally:
            self.interleaver.close()
        assert all(mediator.state is State.DONE for mediator in self.mediators)

    def _call(self, path: str, value: Any) -> Any:
        watch = self.watches.get(path)
        skip = None
        if watch is not None and path in self.begins:
            value = self.interleaver.before(watch, value)
            skip = self.interleaver.instead(watch)
        if skip is None:
            for child in self.modules.called_children(path):
                value = self._call(child, value)
            value = f"{value}>{path.rpartition('.')[2]}"
        else:
            value = skip.value
        watch = self.watches.get(path)
        return value if watch is None else self.interleaver.after(watch, value)


class Scripted:
    """A Channel on one thread: resuming runs the generator to its next yield."""

    def __init__(self, mediator: Mediator, script: Block) -> None:
        self._mediator = mediator
        self._script = script

    def resume_worker(self) -> None:
        try:
            next(self._script)
        except StopIteration:
            self._mediator.end(None)
        except BaseException as error:
            self._mediator.end(error)

    def suspend_worker(self) -> None:
        raise AssertionError("a generator yields instead")


class Actor:
    """The worker's side of a Mediator, with `yield` in the place of the hand-over."""

    def __init__(self, interleaver: Interleaver, mediator: Mediator) -> None:
        self._interleaver = interleaver
        self._mediator = mediator
        self._at: Visit | None = None

    def visit(self, site: Site) -> Visit:
        return Visit(site, self._mediator.step)

    def read(self, site: Site) -> Generator[None, None, object]:
        visit = self.visit(site)
        if visit == self._at:
            return self._mediator.read(site)
        self._interleaver.expect(self._mediator, visit)
        return (yield from self._ask(Read(visit)))

    def write(self, site: Site, value: object) -> Generator[None, None, None]:
        visit = self.visit(site)
        if visit == self._at:
            self._mediator.write(site, value)
            return
        self._interleaver.expect(self._mediator, visit)
        yield from self._ask(Write(visit, value))

    def skip(self, site: Site, value: object) -> Generator[None, None, None]:
        visit = self.visit(site)
        self._interleaver.expect_skip(self._mediator, visit)
        yield from self._ask(Skip(visit, value))

    def go_to_step(self, step: int) -> Generator[None, None, bool]:
        begun = self._interleaver.expect_step(step)
        if begun is None:
            begun = bool((yield from self._ask(NextStep(step))))
        if begun:
            self._mediator.step = step
        return begun

    def _ask(self, request: Request) -> Generator[None, None, object]:
        self._at = None
        self._mediator.submit(request)
        yield
        value = self._mediator.collect(request, "line 0")
        if not isinstance(request, NextStep):
            self._at = request.visit
        return value


def misfit(new: object, old: object) -> str | None:
    """On this stage, strings fit strings."""
    return None if isinstance(new, str) else f"the value was {old!r}, and {new!r} was written"


def output(path: str) -> Site:
    return Site(path, Slot.OUTPUT)


def input_(path: str) -> Site:
    return Site(path, Slot.INPUT)
