"""What the model has passed in this step, known without a hook on every module."""

# Guarantees:
#   - a request for what has passed is known to be late at the moment it is made;
#   - a value is never given out as the first call of a module that had run before it was watched.
#
# A watched module reports each call. Watching all modules would cost a slow call for each of
# them, so only these are watched: what somebody asks for, the modules that contain it, and the
# children of those, which report only that a call has ended. So whatever runs while a worker is
# awake has all its children watched, and what a worker can ask for next is either watched, or
# inside something that has ended (it has passed), or inside something that has not begun.

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol, final

from tracekit.core.site import Site, Slot, Visit


class Modules(Protocol):
    """What Passage needs to know of a model (core.tree.Tree has it)."""

    @property
    def name(self) -> str: ...
    @property
    def shared(self) -> list[str]: ...
    def called_children(self, path: str) -> list[str]: ...
    def ancestors(self, path: str) -> list[str]: ...
    def callers(self, path: str) -> list[str]: ...
    def is_module(self, path: str) -> bool: ...
    def untapped(self, path: str) -> str | None: ...


@dataclass(slots=True)
class Watch:
    """The calls of one module in one step; counts of an earlier step are void."""

    path: str
    input: Site
    output: Site
    is_full: bool = False  # it reports when a call begins, too
    is_asked: bool = False  # somebody may wait for its values
    has_run: bool = False  # in any step
    step: int = 0
    started: int = 0
    ended: int = 0
    running: list[int] = field(default_factory=list[int])  # calls begun and not ended, inner last
    skipped_in: int = -1  # the step in which it was skipped
    missed_in: int = -1  # the step in which it may have run before it was watched

    def align(self, step: int) -> None:
        """Begin to count afresh if a new step has begun."""
        if self.step != step:
            self.step = step
            self.started = self.ended = 0
            self.running.clear()

    def begin(self) -> int:
        """A call begins: the how-manieth of this step."""
        self.running.append(self.started)
        self.started += 1
        self.has_run = True
        return self.running[-1]

    def end(self) -> int | None:
        """A call has ended: which; None if it had begun before it was watched."""
        self.ended += 1
        self.has_run = True
        if not self.running:
            self.started += 1
            return None
        return self.running.pop()

    def has_passed(self, visit: Visit) -> bool:
        """Whether the model is beyond `visit`, which is in the current step."""
        if self.missed_in == visit.step:
            return True
        if visit.site.slot is Slot.INPUT:
            return visit.call < self.started
        return visit.call < self.started and visit.call not in self.running


@final
class Passage:
    """The Watches of a run; `at_end` and `at_begin` put the hooks on a module."""

    def __init__(
        self, modules: Modules, at_end: Callable[[Watch], None], at_begin: Callable[[Watch], None]
    ) -> None:
        self._modules = modules
        self._watch_ends = at_end
        self._watch_begins = at_begin
        self._watches: dict[str, Watch] = {}
        self._opened: set[str] = set()  # paths that are watched fully, with all their children

    def expect(self, path: str, step: int) -> Watch:
        """The Watch of the module at `path`, with everything on the way to it watched as well."""
        if not self._opened:  # their calls can't be counted from where one of them is asked for
            for shared in self._modules.shared:
                self._watch(shared, step)
        for ancestor in reversed(self._modules.ancestors(path)):
            if ancestor not in self._opened:
                self._opened.add(ancestor)
                self._watch_fully(ancestor, step)
                for child in self._modules.called_children(ancestor):
                    self._watch(child, step)
        return self._watch_fully(path, step)

    def watch_inside(self, path: str, step: int) -> None:
        """Watch all that is directly in `path`, and has not begun."""
        for child in self._modules.called_children(path):
            self._watch_fully(child, step)

    def runs_untapped(
        self, visit: Visit, step: int, serving: Visit | None, entering: str
    ) -> str | None:
        """The attention that `visit` is in, if it runs without leading its values to anybody.

        The model is paused at `serving`, or where the call of `entering` begins a step.
        """
        around = self._modules.untapped(visit.site.path) if visit.step == step else None
        if around is None:
            return None
        watch = self.expect(around, step)
        is_beginning = serving is not None and serving.site == watch.input
        return around if len(watch.running) > is_beginning or around == entering else None

    def skipped_above(self, path: str, step: int) -> str | None:
        """The module that contains `path` and was skipped in this step, if one was."""
        for above in self._modules.ancestors(path):
            watch = self._watches.get(above)
            if watch is not None and watch.skipped_in == step:
                return above
        return None

    def was_called_again(self, path: str) -> bool:
        """Whether the module at `path` was called more than once in this step."""
        return self._watches[path].started > 1

    def is_in(self, path: str, above: str) -> bool:
        """Whether the module at `above` contains that at `path`, in one way or another."""
        return above in self._modules.ancestors(path)

    def is_shared(self, path: str) -> bool:
        """Whether several modules hold the one at `path`."""
        return path in self._modules.shared

    def expect_any_call(self, step: int) -> None:
        """Watch the root and its children: one of them is called in every step.

        The root alone would not do: BLIP-2 generates with an inner model, and never calls itself.
        """
        root = self._modules.name
        self._watch_fully(root, step)
        for child in self._modules.called_children(root):
            self._watch_fully(child, step)

    def has_run(self, path: str) -> bool:
        """Whether the module at `path` is known to have been called in any step."""
        watch = self._watches.get(path)
        return watch is not None and watch.has_run

    def ran_in(self, path: str, step: int) -> bool | None:
        """Whether the module at `path` was called in `step`; None if that was not watched."""
        watch = self._watches.get(path)
        if watch is None or watch.step > step:
            return None
        return watch.step == step and watch.started > 0

    def has_begun(self, path: str, step: int) -> bool:
        """Whether the module at `path` has certainly been called in this step."""
        watch = self._watches.get(path)
        return self.has_ended(path, step) or (watch is not None and watch.started > 0)

    def has_ended(self, path: str, step: int) -> bool:
        """Whether the module at `path` has certainly been called in this step, and has ended."""
        watch = self._watches.get(path)
        if watch is not None:
            watch.align(step)
            return watch.missed_in == step or (watch.ended > 0 and not watch.running)
        is_over = self.has_ended if self._modules.untapped(path) is None else self.has_begun
        return any(is_over(caller, step) for caller in self._modules.callers(path))

    def _watch(self, path: str, step: int) -> Watch:
        watch = self._watches.get(path)
        if watch is None:
            watch = Watch(path, Site(path, Slot.INPUT), Site(path, Slot.OUTPUT), step=step)
            if self._may_have_run(path, step):
                watch.missed_in = step
            self._watches[path] = watch
            self._watch_ends(watch)
        watch.align(step)
        return watch

    def _may_have_run(self, path: str, step: int) -> bool:
        """Whether a module that was not watched so far may have been called in this step.

        What calls it may be running, and have called it in an earlier call of its own; but what an
        operation calls may be another function each time, and is counted from where it is opened.
        """
        for caller in self._modules.callers(path):
            watch = self._watches.get(caller)
            if not self._modules.is_module(caller):
                return self.has_ended(path, step)
            if watch is not None:
                watch.align(step)
                if watch.missed_in == step or watch.ended > 0:
                    return True
            elif self._may_have_run(caller, step):
                return True
        return False

    def _watch_fully(self, path: str, step: int) -> Watch:
        watch = self._watch(path, step)
        if not watch.is_full:
            watch.is_full = True
            self._watch_begins(watch)
        return watch

    def callers(self, path: str) -> list[str]:
        """The nearest callable modules that contain `path`."""
        return self._modules.callers(path)
