"""Stored reads of a whole block, filled by one hook: no request is made, and nobody waits."""

# Of some blocks all is known that they will ask. They need nothing of the interleaver, if the model
# serves them in that order; whether it does shows in a run with requests (ahead.py). So the first
# run makes them, and what went well is remembered with the model. From then on a hook notes what
# passes, and the order is checked behind the run.

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias, final

import torch
from torch import Tensor, nn

from tracekit.core.nest import tensors
from tracekit.core.origins import note_visit
from tracekit.core.site import Line, Site, Slot, Visit
from tracekit.core.tree import Tree
from tracekit.core.versions import Versions, version
from tracekit.interleave import unserved
from tracekit.interleave.answers import Answers
from tracekit.interleave.hooks import Hooks, is_elsewhere
from tracekit.interleave.mediator import Mediator
from tracekit.interleave.protocol import Reply, Unwind

# What a block will ask, in order, and the lines that ask it.
Asked: TypeAlias = "Sequence[tuple[Visit, Line]]"

_KEPT = 512  # blocks that are remembered with a model


class _Seen(NamedTuple):
    """What passed first at one place."""

    place: int  # in the order of the model
    value: Any
    versions: int | tuple[int, ...]


@final
class Glance:
    """What one block asks, in one run; made before it."""

    def __init__(self, tree: Tree, kind: object, asked: Asked) -> None:
        self._tree = tree
        self._asked = asked
        self._key = (kind, tuple([visit for visit, _ in asked]))
        self._thread = 0
        self._seen: dict[tuple[nn.Module, Slot], _Seen] = {}

    @property
    def is_proven(self) -> bool:
        """Whether the model has served the block in an earlier run of this kind."""
        return self._key in self._tree.proven and not torch.is_inference_mode_enabled()

    def prove(self) -> None:
        """The model has served all that was asked."""
        if len(self._tree.proven) >= _KEPT:
            self._tree.proven.clear()
        self._tree.proven.add(self._key)

    def place(self, hooks: Hooks) -> None:
        """Put the hooks on, in front of the user's own: a block sees what the module gave."""
        self._thread = hooks.thread
        for site in dict.fromkeys([visit.site for visit, _ in self._asked]):
            if site.slot is Slot.OUTPUT:
                hooks.look(self._tree.modules[site.path], Slot.OUTPUT, self._see_output)
            elif site.slot is Slot.INPUT:
                hooks.look(self._tree.modules[site.path], Slot.INPUT, self._see_inputs)

    def _see_output(self, module: nn.Module, args: Any, output: Any) -> None:
        if not is_elsewhere(self._thread):
            self._see(module, Slot.OUTPUT, output)

    def _see_inputs(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if not is_elsewhere(self._thread):
            self._see(module, Slot.INPUT, (args, kwargs))

    def _see(self, module: nn.Module, slot: Slot, value: Any) -> None:
        if (module, slot) not in self._seen:
            self._seen[module, slot] = _Seen(len(self._seen), value, _versions(value))

    def answer(
        self, mediator: Mediator, results: list[Any], versions: Versions, has_grad: bool
    ) -> None:
        """Give the block of `mediator` what it will ask, as far as it came.

        `results` holds what the call returned, and nothing if it failed: then the block is left
        where it would still have waited.
        """
        answers = Answers(0, is_all=True)
        last = -1
        for visit, line in self._asked:
            seen = self._at(visit.site, results)
            if seen is None or seen.place < last:
                missed = unserved.unlike_before(visit) if results else Unwind(mediator)
                answers.put(visit, Reply(error=missed))
                break
            last = seen.place
            answers.put(visit, Reply(seen.value))
            note_visit(visit, seen.value, has_grad)
            if _versions(seen.value) != seen.versions:
                versions.note_overwritten(visit, seen.value)
            if mediator.note is not None:
                mediator.note("read", visit, seen.value, line, True)
        self._seen.clear()
        mediator.remember(answers)

    def _at(self, site: Site, results: list[Any]) -> _Seen | None:
        if site.slot is Slot.RESULT:
            place = len(self._seen)  # behind all else
            return _Seen(place, results[0], _versions(results[0])) if results else None
        return self._seen.get((self._tree.modules[site.path], site.slot))


def _versions(value: Any) -> int | tuple[int, ...]:
    if isinstance(value, Tensor):
        return version(value)
    return tuple([version(tensor) for tensor in tensors(value)])
