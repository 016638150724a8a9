"""Values come out of the ring as they went in, within its bound; each of its guards is needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.fake_lane import Accelerator, FakeEvent, FakeLane
from tracekit.core import ring as rings
from tracekit.core.ring import Parcel, Ring, Slab
from tracekit.core.streams import write_in_a_row

DTYPES = (
    torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int8,
    torch.uint8, torch.bool, torch.complex64, torch.float8_e5m2,
)  # fmt: skip

Sent = list[tuple[Tensor, Parcel]]


def value(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Random bytes, so that no two are alike."""
    generator = torch.Generator().manual_seed(seed)
    if dtype is torch.bool:
        return torch.rand(shape, generator=generator) > 0.5
    count = torch.Size(shape).numel() * dtype.itemsize
    return torch.randint(256, (count,), generator=generator).to(torch.uint8).view(dtype).view(shape)


def as_bytes(tensor: Tensor) -> list[int]:
    plain = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach())
    return plain.view(-1).view(torch.uint8).tolist()


def send(ring: Ring, *values: Tensor) -> Sent:
    """What was sent, as it was then; the values themselves are let go of."""
    load = [(each, Parcel(each)) for each in values]
    sent = [(each.clone(), parcel) for each, parcel in load]
    ring.send(load)
    return sent


def check(accelerator: Accelerator, sent: Sent) -> None:
    """All is there, as it was, though the device and pinned memory were used again."""
    accelerator.check()
    for was, parcel in sent:
        came = parcel.value
        assert came is not None
        assert came.shape == was.shape and came.dtype == was.dtype
        assert as_bytes(came) == as_bytes(was)
        assert came.untyped_storage().nbytes() == came.nbytes  # in memory of its own


# -- any sequence ---------------------------------------------------------------------------------

ACTS = st.one_of(
    st.tuples(
        st.just("send"),
        st.lists(
            st.tuples(st.lists(st.integers(0, 7), max_size=3).map(tuple), st.sampled_from(DTYPES)),
            max_size=6,
        ),
    ),
    st.tuples(st.just("go on"), st.integers(0, 12)),
    st.tuples(st.just("fence"), st.none()),
    st.tuples(st.just("interrupt"), st.integers(1, 40)),
)


@settings(max_examples=150, deadline=None)
@given(acts=st.lists(ACTS, max_size=25), capacity=st.integers(16, 1200), seed=st.integers(0, 9999))
def test_any_sequence_gives_exactly_what_was_sent_within_the_bound(
    acts: list[tuple[str, Any]], capacity: int, seed: int
) -> None:
    accelerator = Accelerator(seed)
    ring = Ring(FakeLane(accelerator, 0), capacity)
    sent: Sent = []
    for name, how in acts:
        if name == "send":
            sent += send(ring, *[value(*each, seed + number) for number, each in enumerate(how)])
        elif name == "go on":
            accelerator.go_on(how)
        elif name == "fence":
            ring.fence()
        else:
            interrupted(ring, accelerator, after=how)
        assert accelerator.live["pinned"] <= capacity
        assert accelerator.live["staging"] <= capacity
    ring.fence()
    assert accelerator.peak["pinned"] <= capacity
    check(accelerator, sent)


def interrupted(ring: Ring, accelerator: Accelerator, after: int) -> None:
    """A fence that Ctrl-C comes into, at one of the host's questions or copies."""
    count = 0
    put, put_whole = Parcel.put, Parcel.put_whole

    def put_or_not(parcel: Parcel, start: int, arrived: Tensor) -> None:
        nonlocal count
        count += 1
        if count == after:
            arrived = arrived[: arrived.numel() // 2]
        if arrived.numel():
            put(parcel, start, arrived)
        if count == after:
            raise KeyboardInterrupt

    def put_whole_or_not(parcel: Parcel, arrived: Tensor) -> None:
        nonlocal count
        count += 1
        if count == after:
            raise KeyboardInterrupt
        put_whole(parcel, arrived)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Parcel, "put", put_or_not)
        patch.setattr(Parcel, "put_whole", put_whole_or_not)
        with suppress(KeyboardInterrupt):
            ring.fence()


# -- one at a time --------------------------------------------------------------------------------


@pytest.fixture(params=range(8))
def accelerator(request: pytest.FixtureRequest) -> Accelerator:
    return Accelerator(request.param)


def test_a_value_larger_than_the_whole_ring_comes_in_pieces(accelerator: Accelerator) -> None:
    ring = Ring(FakeLane(accelerator, 0), 256)
    sent = send(ring, value((7, 31), torch.float32, 0), value((3,), torch.int8, 1))
    ring.fence()
    check(accelerator, sent)
    assert accelerator.peak["pinned"] <= 256
    assert accelerator.copies == -(-(7 * 31 * 4 + 3) // 16)


def test_many_small_values_are_one_copy(accelerator: Accelerator) -> None:
    ring = Ring(FakeLane(accelerator, 0), 1 << 20)
    sent = send(ring, *[value((16, 1, 8), torch.float32, seed) for seed in range(100)])
    ring.fence()
    check(accelerator, sent)
    assert accelerator.copies == 1


def test_to_send_waits_only_when_the_ring_is_full(accelerator: Accelerator) -> None:
    ring = Ring(FakeLane(accelerator, 0), 16 * 64)
    sent: Sent = []
    for seed in range(16):
        sent += send(ring, value((16,), torch.float32, seed))
        assert accelerator.waits == 0
    while accelerator.waits == 0:  # what ended meanwhile made room
        sent += send(ring, value((16,), torch.float32, len(sent)))
    ring.fence()
    check(accelerator, sent)


def test_values_that_are_no_rows_of_bytes_come_as_they_are_meant() -> None:
    accelerator = Accelerator()
    ring = Ring(FakeLane(accelerator, 0), 4096)
    whole = value((4, 6), torch.complex64, 0)
    with torch.inference_mode():
        inference = torch.ones(3)
    values = [
        whole.t(), whole[1:, ::2], whole.conj(), whole.conj().imag, torch.ones(1).expand(5),
        torch.tensor(3.5), torch.empty(0, 4), inference, torch.rand(10)[::5][:1],
    ]  # fmt: skip
    sent = send(ring, *values)
    ring.fence()
    check(accelerator, sent)
    came = [parcel.value for _, parcel in sent]
    assert not any(each is None or each.is_inference() for each in came)


def test_the_ring_is_used_in_inference_mode_and_out_of_it(accelerator: Accelerator) -> None:
    ring = Ring(FakeLane(accelerator, 0), 64)
    with torch.inference_mode():
        sent = send(ring, torch.rand(40))
    sent += send(ring, torch.rand(40, requires_grad=True))
    with torch.inference_mode():
        ring.fence()
    check(accelerator, [(was.detach(), parcel) for was, parcel in sent])
    assert not any(p.value is None or p.value.is_inference() for _, p in sent)


@pytest.mark.parametrize("kind", ["staging", "pinned"])
@pytest.mark.parametrize("room", [0, 100])
def test_without_room_for_the_ring_it_makes_do_with_what_there_is(
    accelerator: Accelerator, kind: str, room: int
) -> None:
    accelerator.room[kind] = room
    ring = Ring(FakeLane(accelerator, 0), 1024)
    sent = send(ring, *[value((30,), torch.float32, seed) for seed in range(9)])
    ring.fence()
    check(accelerator, sent)
    assert accelerator.peak[kind] <= room


def test_what_is_interrupted_between_the_copy_and_its_note_is_sent_again() -> None:
    accelerator = Accelerator()
    lane = FakeLane(accelerator, 0)
    ring = Ring(lane, 64)
    values = [torch.rand(9), torch.rand(4)]
    load = [(each, Parcel(each)) for each in values]

    def copy_and_stop(*args: Any) -> Any:
        FakeLane.copy(lane, *args)
        accelerator.go_on(100)
        raise KeyboardInterrupt

    lane.copy = copy_and_stop  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        ring.send(load)
    del lane.copy
    load = [(each, Parcel(each)) for each in values]
    ring.send(load)
    ring.fence()
    assert [as_bytes(each) for each in values] == [
        as_bytes(parcel.value) for _, parcel in load if parcel.value is not None
    ]


def test_a_ring_says_how_far_it_is() -> None:
    accelerator = Accelerator()
    ring = Ring(FakeLane(accelerator, 0), 1600)
    send(ring, torch.zeros(25))
    assert "1 slabs of 96 bytes, 1 sent" not in repr(ring)
    assert repr(ring).endswith("2 slabs of 96 bytes, 2 sent)")
    ring.fence()
    assert repr(ring).endswith("2 slabs of 96 bytes, 0 sent)")


# -- a guard less ---------------------------------------------------------------------------------


def without_waiting(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(FakeEvent, "wait", lambda self: None)


def without_asking_whether_it_arrived(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(FakeEvent, "is_done", lambda self: True)
    patch.setattr(FakeEvent, "wait", lambda self: None)


def without_the_event_of_the_computing_stream(patch: pytest.MonkeyPatch) -> None:
    def mark(lane: FakeLane) -> FakeEvent:
        event = FakeEvent(lane.accelerator)
        event.has_come = True
        return event

    patch.setattr(FakeLane, "mark", mark)


def without_holding_the_values(patch: pytest.MonkeyPatch) -> None:
    depart = Ring._depart

    def forgetful(ring: Ring, slab: Slab, pieces: list[Any]) -> None:
        depart(ring, slab, pieces)
        for piece in pieces:
            piece.flat = torch.empty_like(piece.flat)

    patch.setattr(Ring, "_depart", forgetful)


def without_emptying_slabs_before_they_are_written_again(patch: pytest.MonkeyPatch) -> None:
    def vacant(ring: Ring) -> Slab | None:
        return ring._slabs[0] if ring._slabs else ring._another()

    patch.setattr(Ring, "_vacant", vacant)


def without_ordinary_memory(patch: pytest.MonkeyPatch) -> None:
    def put_whole(parcel: Parcel, arrived: Tensor) -> None:
        parcel.value = arrived.view(parcel._shape)

    patch.setattr(Parcel, "put_whole", put_whole)


def without_a_bound(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Ring, "_oldest", Ring._another)


def without_the_last_fence(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Ring, "fence", lambda self: None)


def with_slabs_that_are_dropped_while_they_are_copied_from(patch: pytest.MonkeyPatch) -> None:
    depart = Ring._depart

    def forgetful(ring: Ring, slab: Slab, pieces: list[Any]) -> None:
        depart(ring, slab, pieces)
        slab.staging = torch.empty(0, dtype=torch.uint8)

    patch.setattr(Ring, "_depart", forgetful)


SABOTAGE: list[Callable[[pytest.MonkeyPatch], None]] = [
    without_waiting,
    without_asking_whether_it_arrived,
    without_the_event_of_the_computing_stream,
    without_holding_the_values,
    without_emptying_slabs_before_they_are_written_again,
    without_ordinary_memory,
    without_a_bound,
    without_the_last_fence,
    with_slabs_that_are_dropped_while_they_are_copied_from,
]


def run(seed: int) -> None:
    """A run with values that are dropped when they were sent, in a ring for four."""
    accelerator = Accelerator(seed)
    ring = Ring(FakeLane(accelerator, 0), 16 * 64)
    sent: Sent = []
    for number in range(40):
        sent += send(ring, value((4, 4), torch.float32, number))
        assert accelerator.live["pinned"] <= 16 * 64, "over the bound"
    ring.fence()
    check(accelerator, sent)


@pytest.fixture
def patched() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.mark.parametrize("sabotage", SABOTAGE, ids=lambda it: it.__name__)
def test_without_one_of_its_guards_values_are_wrong_or_memory_is(
    patched: pytest.MonkeyPatch, sabotage: Callable[[pytest.MonkeyPatch], None]
) -> None:
    for seed in range(5):
        run(seed)
    sabotage(patched)
    failures = 0
    for seed in range(5):
        try:
            run(seed)
        except AssertionError:
            failures += 1
    assert failures


# -- bytes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("skipped", [0, 1, 8])
def test_bytes_are_written_in_a_row_however_they_are_aligned(skipped: int) -> None:
    whole = value((64,), torch.uint8, 0)
    sources = [whole[skipped : skipped + 16], whole[24:48], whole[48:64]]
    into = torch.zeros(sum(map(len, sources)), dtype=torch.uint8)
    write_in_a_row(sources, into)
    assert into.tolist() == torch.cat(sources).tolist()


def test_slabs_are_parts_of_the_capacity() -> None:
    lane = FakeLane(Accelerator(), 0)
    assert Ring(lane, 256 * 2**20).size * rings.SLABS == 256 * 2**20
    assert Ring(lane, 1).size == rings.ALIGNED
