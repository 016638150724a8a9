"""A Site is a value of a module; a Visit is that value at a step and a call; both read aloud."""

from __future__ import annotations

import pickle

from tracekit.core.site import Site, Slot, Visit

OUTPUT = Site("model.layers.3", Slot.OUTPUT)


def test_a_site_reads_as_the_user_writes_it() -> None:
    assert str(OUTPUT) == "model.layers.3.output"
    assert str(Site("model.layers.3", Slot.INPUT)) == "model.layers.3.input"
    assert str(Site("model", Slot.RESULT)) == "model.result"


def test_a_visit_names_its_step_and_a_later_call() -> None:
    assert str(Visit(OUTPUT)) == "model.layers.3.output (step 0)"
    assert str(Visit(OUTPUT, 2, 1)) == "model.layers.3.output (step 2, call 1)"


def test_visits_are_equal_by_what_they_name() -> None:
    assert Visit(Site("model.layers.3", Slot.OUTPUT), 1) == Visit(OUTPUT, 1, 0)
    assert len({Visit(OUTPUT), Visit(OUTPUT, 0), Visit(OUTPUT, 1), Visit(OUTPUT, 0, 1)}) == 3
    assert Site("model", Slot.INPUT) != Site("model", Slot.OUTPUT)


def test_a_slot_survives_pickling_as_itself() -> None:
    assert pickle.loads(pickle.dumps(Slot.OUTPUT)) is Slot.OUTPUT
    assert pickle.loads(pickle.dumps(Visit(OUTPUT, 2))) == Visit(OUTPUT, 2)
