"""An accelerator that is not there: copies are late and out of order, and every misuse shows.

Its memory is the host's, and its model computes at once. What is given to its streams is done when
somebody asks how far they are, some of it, in any order that real streams allow. Memory that holds
nothing yet, or nothing any more, has POISON in it; what no device would notice is a fault.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import cast
from unittest import mock
from weakref import finalize, ref

import torch
from torch import Tensor

from tracekit.core import streams
from tracekit.core.streams import Event, Lane

POISON = 0xCB
FAILED = "CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be …"

HERE = "cpu:0"  # a device to which values of the processor are moved, though it is the same


class FakeEvent:
    """An Event of an Accelerator."""

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self.has_come = False
        self.was_seen = False  # by the host, which may rely on it from then on

    def is_done(self) -> bool:
        self._accelerator.go_on(self._accelerator.random.randrange(4))
        self.was_seen = self.has_come
        return self.has_come

    def wait(self) -> None:
        self._accelerator.waits += not self.has_come
        while not self.has_come:
            self._accelerator.go_on(1)
        self.was_seen = True


class Copy:
    """A copy to the host that was asked for."""

    def __init__(self, staging: int, pinned: int, size: int, after: FakeEvent, end: FakeEvent):
        self.staging, self.pinned, self.size, self.after, self.end = (
            staging, pinned, size, after, end
        )  # fmt: skip


class Accelerator:
    """Two kinds of streams and two kinds of memory; `faults` are for `check` at the end."""

    def __init__(self, seed: int = 0) -> None:
        self.random = random.Random(seed)
        self.current = 0  # the stream that its model computes on now
        self.faults: list[str] = []
        self.copies = 0  # that were asked for
        self.waits = 0  # of the host, for what had not come yet
        self.live = {"staging": 0, "pinned": 0}  # bytes
        self.peak = {"staging": 0, "pinned": 0}
        self.room = {"staging": 1 << 40, "pinned": 1 << 40}
        self.fails_after: int | None = None  # copies
        self._home: dict[int, deque[Callable[[], None]]] = {}
        self._beside: list[Copy] = []
        self._unseen: list[Copy] = []
        self._memory: dict[int, ref[Tensor]] = {}  # by address: who has it
        self._pinned: list[Tensor] = []  # views of all there was

    def lane(self, device: torch.device) -> Lane:
        """In the place of `streams.lane_of`."""
        return FakeLane(self, self.current)

    @contextmanager
    def at_work(self) -> Generator[Accelerator]:
        """Let the caches of this process find it."""
        with (
            mock.patch.object(streams, "lane_of", self.lane),
            mock.patch.object(streams, "has_lanes", return_value=True),
        ):
            yield self

    def check(self) -> None:
        """AssertionError for what would be wrong on a real one; pinned memory is lost by then."""
        assert not self._beside, "copies are still under way"
        for pinned in self._pinned:
            pinned.fill_(POISON)  # whoever still has it, has it no more
        assert not self.faults, self.faults

    # -- memory ---------------------------------------------------------------------------------

    def memory(self, kind: str, size: int) -> Tensor:
        if self.live[kind] + size > self.room[kind]:
            raise torch.OutOfMemoryError(f"no room for {size} bytes of {kind} memory")
        found = torch.full((size,), POISON, dtype=torch.uint8)
        self.live[kind] += size
        self.peak[kind] = max(self.peak[kind], self.live[kind])
        self._memory[found.data_ptr()] = ref(found)
        finalize(found, self._released, kind, size, found.data_ptr())
        if kind == "pinned":
            self._pinned.append(found.detach())
        return found

    def _released(self, kind: str, size: int, address: int) -> None:
        self.live[kind] -= size
        if any(address in (copy.staging, copy.pinned) for copy in self._beside):
            self.faults.append(f"{kind} memory was released under a copy")

    def _at(self, address: int) -> Tensor:
        found = self._memory[address]()
        return torch.empty(1 << 20, dtype=torch.uint8) if found is None else found

    # -- streams --------------------------------------------------------------------------------

    def gather(self, stream: int, sources: Sequence[Tensor], into: Tensor) -> None:
        if any(copy.staging == into.data_ptr() for copy in self._unseen_now()):
            self.faults.append("a buffer was written again before its copy had ended")
        assert sum(source.nbytes for source in sources) == into.numel()
        whole = torch.empty(into.numel(), dtype=torch.uint8)
        streams.write_in_a_row(sources, whole)  # in the order of the stream: what is there now …
        address, held = into.data_ptr(), [ref(source) for source in sources]
        sizes = [source.nbytes for source in sources]

        def run() -> None:  # … whenever it comes to it, if nobody gave the memory away meanwhile
            for part, source in zip(whole.split(sizes), held, strict=True):
                if source() is None:
                    part.fill_(POISON)
            self._at(address)[: len(whole)] = whole

        self._queue(stream).append(run)

    def mark(self, stream: int) -> FakeEvent:
        event = FakeEvent(self)
        self._queue(stream).append(lambda: setattr(event, "has_come", True))
        return event

    def copy(self, staging: Tensor, pinned: Tensor, after: Event) -> FakeEvent:
        ours = cast("FakeEvent", after)
        end = FakeEvent(self)
        if any(copy.pinned == pinned.data_ptr() for copy in self._unseen_now()):
            self.faults.append("pinned memory was given away before its copy had ended")
        pinned.fill_(POISON)  # there is no telling what is in it until the copy has ended
        found = Copy(staging.data_ptr(), pinned.data_ptr(), pinned.numel(), ours, end)
        self._beside.append(found)
        self._unseen.append(found)
        self.copies += 1
        return end

    def go_on(self, steps: int) -> None:
        """Do some of what the streams were given; those beside in any order."""
        for _ in range(steps):
            ready = [copy for copy in self._beside if copy.after.has_come]
            waiting = [queue for queue in self._home.values() if queue]
            chosen = self.random.choice([*ready, *waiting, None])
            if isinstance(chosen, Copy):
                self._end(chosen)
            elif chosen is not None:
                chosen.popleft()()

    def _end(self, copy: Copy) -> None:
        if self.fails_after is not None:
            self.fails_after -= 1
            if self.fails_after < 0:
                raise RuntimeError(FAILED)
        self._at(copy.pinned)[: copy.size] = self._at(copy.staging)[: copy.size]
        self._beside.remove(copy)
        copy.end.has_come = True

    def _unseen_now(self) -> list[Copy]:
        """Copies that the host has not seen end: it may not touch their memory, ended or not."""
        self._unseen = [copy for copy in self._unseen if not copy.end.was_seen]
        return self._unseen

    def _queue(self, stream: int) -> deque[Callable[[], None]]:
        return self._home.setdefault(stream, deque())


class FakeLane:
    """A Lane of an Accelerator."""

    def __init__(self, accelerator: Accelerator, stream: int) -> None:
        self.accelerator = accelerator
        self.stream = stream

    def is_current(self) -> bool:
        return self.accelerator.current == self.stream

    def computing(self) -> AbstractContextManager[object]:
        return nullcontext()

    def staging(self, size: int) -> Tensor:
        return self.accelerator.memory("staging", size)

    def pinned(self, size: int) -> Tensor:
        return self.accelerator.memory("pinned", size)

    def gather(self, sources: Sequence[Tensor], into: Tensor) -> None:
        self.accelerator.gather(self.stream, sources, into)

    def mark(self) -> Event:
        return self.accelerator.mark(self.stream)

    def copy(self, staging: Tensor, pinned: Tensor, after: Event) -> Event:
        return self.accelerator.copy(staging, pinned, after)
