"""What PyTorch's streams are asked for, and in which order; the device itself is not needed."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from tracekit.core.streams import TorchLane, lane_of


class Told:
    """In the place of `torch.cuda`: writes down what it is asked, and computes at once."""

    def __init__(self) -> None:
        self.acts: list[str] = []
        self.now = "default"

    def current_stream(self, device: Any) -> Stream:
        return Stream(self, self.now)

    def Stream(self, device: Any) -> Stream:
        return Stream(self, "beside")

    def Event(self) -> Mark:
        return Mark(self)

    @contextmanager
    def stream(self, stream: Stream) -> Generator[None]:
        before, self.now = self.now, stream.name
        self.acts.append(f"on {stream.name}")
        yield
        self.now = before


class Stream:
    def __init__(self, told: Told, name: str) -> None:
        self.told, self.name = told, name

    def wait_event(self, event: Mark) -> None:
        self.told.acts.append(f"{self.name} waits for {event.place}")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream) and other.name == self.name

    __hash__ = None  # type: ignore[assignment]


class Mark:
    def __init__(self, told: Told) -> None:
        self.told, self.place = told, ""

    def record(self, stream: Stream) -> None:
        self.place = f"a place on {stream.name}"
        self.told.acts.append(f"marked {self.place}")

    def query(self) -> bool:
        return False

    def synchronize(self) -> None:
        self.told.acts.append(f"the host waits for {self.place}")


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Told:
    found = Told()
    monkeypatch.setattr(torch, "cuda", found)
    return found


def test_a_copy_is_made_beside_the_model_and_behind_the_mark(told: Told) -> None:
    lane = TorchLane(torch.device("cuda", 0))
    staging, pinned = torch.zeros(16, dtype=torch.uint8), torch.zeros(16, dtype=torch.uint8)
    told.now = "another"  # whoever asks, what is gathered goes to the stream of the model
    lane.gather([torch.arange(16, dtype=torch.uint8)], staging)
    end = lane.copy(staging, pinned, lane.mark())
    assert pinned.tolist() == list(range(16))
    assert not end.is_done()
    end.wait()
    assert told.acts == [
        "on default",
        "marked a place on default",
        "beside waits for a place on default",
        "on beside",
        "marked a place on beside",
        "the host waits for a place on beside",
    ]


def test_a_lane_knows_whether_the_model_left_its_stream(told: Told) -> None:
    lane = TorchLane(torch.device("cuda", 0))
    assert lane.is_current()
    told.now = "another"
    assert not lane.is_current()


def test_devices_without_streams_or_pinned_memory_have_no_lane() -> None:
    assert [lane_of(torch.device(name)) for name in ("cpu", "meta", "mps")] == [None] * 3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a real device is needed")
def test_values_come_from_a_real_device() -> None:
    from tracekit.core.ring import Parcel, Ring

    lane = lane_of(torch.device("cuda", torch.cuda.current_device()))
    assert lane is not None
    ring = Ring(lane, 2**20)
    values = [torch.randn(size, device="cuda") for size in (10, 1000, 500_000)]
    load = [(value, Parcel(value)) for value in values]
    ring.send(load)
    expected = [value.cpu() for value in values]
    for value in values:
        value.zero_()
    ring.fence()
    came = [parcel.value for _, parcel in load]
    pairs = zip(came, expected, strict=True)
    assert all(one is not None and torch.equal(one, other) for one, other in pairs)
