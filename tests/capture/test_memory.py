"""Nothing stays alive after a block, with the garbage collector off."""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.capture.fake_tracer import FakeTracer, load
from tracekit.capture import block, locate
from tracekit.errors import CaptureError


class Value:
    """Something whose end can be seen."""


@pytest.fixture(autouse=True)
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def plain(watch: list[weakref.ref[Value]]) -> None:
    outer = Value()
    with FakeTracer() as tracer:
        inner = Value()
        kept = (outer, inner, tracer)
    watch += [weakref.ref(outer), weakref.ref(kept[1])]


def with_closures(watch: list[weakref.ref[Value]]) -> None:
    shared = Value()
    with FakeTracer() as tracer:
        inner = Value()

        def read() -> object:
            return shared, inner, tracer

        pairs = [lambda: read() for _ in range(2)]
    watch += [weakref.ref(shared), weakref.ref(inner)]
    assert pairs[0]() == read()


def with_an_error(watch: list[weakref.ref[Value]]) -> None:
    outer = Value()
    watch.append(weakref.ref(outer))
    try:
        with FakeTracer() as tracer:
            inner = (Value(), tracer, outer)
            watch.append(weakref.ref(inner[0]))
            raise ValueError
    except ValueError:
        pass


def nested(watch: list[weakref.ref[Value]]) -> None:
    outer = Value()
    with FakeTracer() as one:
        with FakeTracer() as two:
            inner = (Value(), one, two, outer)
    watch += [weakref.ref(outer), weakref.ref(inner[0])]


def refused(watch: list[weakref.ref[Value]]) -> None:
    outer = Value()
    watch.append(weakref.ref(outer))
    for _ in range(1):
        try:
            with FakeTracer() as tracer:
                watch.append((outer, tracer))  # never runs
                break
        except CaptureError:
            pass


@pytest.mark.parametrize("run", [plain, with_closures, with_an_error, nested, refused])
def test_nothing_of_a_block_outlives_its_function(
    run: Callable[[list[weakref.ref[Value]]], None],
) -> None:
    watch: list[weakref.ref[Value]] = []
    for _ in range(3):
        run(watch)
    assert len(watch) >= 3
    assert [reference() for reference in watch] == [None] * len(watch)


def test_what_the_function_deletes_after_the_block_is_freed_at_once() -> None:
    value = Value()
    watch = weakref.ref(value)
    with FakeTracer():
        copy = value
    del value, copy
    assert watch() is None


def test_what_the_block_leaves_unbound_is_freed_at_once() -> None:
    watch: list[weakref.ref[Value]] = []
    with FakeTracer() as tracer:
        value = Value()
        watch.append(weakref.ref(value))
        del value
    assert tracer is not None
    assert watch[0]() is None


def test_the_dictionary_that_locals_gave_stays_as_it_is() -> None:
    x = 1
    mine = locals()
    with FakeTracer():
        y = x + 1
    assert mine["x"] == 1
    assert y == 2


def test_blocks_are_forgotten_with_their_code(tmp_path: Path) -> None:
    def sizes() -> tuple[int, ...]:
        return len(block._blocks), len(locate._made_here)

    def rerun(n: int) -> None:
        text = f"with trace():\n    x = {n}\n    def f():\n        return x\n"
        names = load(text, tmp_path / f"cell_{n}.py", trace=FakeTracer)
        assert names["f"]() == n
        names.clear()

    rerun(0)
    before = sizes()
    for n in range(1, 20):
        rerun(n)
    assert sizes() == before


def test_a_cell_that_runs_again_with_another_text_runs_that_text(tmp_path: Path) -> None:
    path = tmp_path / "cell.py"
    results: list[Any] = []
    for n in range(3):
        names = load(f"with trace():\n    x = {n}\n", path, trace=FakeTracer)
        results.append(names["x"])
    assert results == [0, 1, 2]


def test_a_body_runs_once_and_lets_go() -> None:
    value = Value()
    watch = weakref.ref(value)
    bodies: list[Any] = []

    def keep(body: Any) -> None:
        bodies.append(body)
        body()

    with FakeTracer(run=keep):
        seen = value
    del value, seen
    assert watch() is None
    with pytest.raises(Exception, match="has run already"):
        bodies[0]()
    assert sys.getrefcount(bodies[0]) <= 3
