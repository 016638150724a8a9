"""The protocol, without threads and without torch."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.interleave.stage import Actor, Block, Module, Stage, input_, output
from tracekit.core.site import Site, Slot
from tracekit.errors import MisfitError, NeverRanError, SiteOrderError, StepError
from tracekit.interleave.protocol import TRANSITIONS, Move, State


def three_layers() -> Stage:
    layers = [Module(name, [Module("attn"), Module("mlp")]) for name in ("a", "b", "c")]
    return Stage(Module("model", layers))


def test_a_read_gives_what_the_module_returned_and_the_model_goes_on() -> None:
    stage, seen = three_layers(), []

    def block(actor: Actor) -> Block:
        seen.append((yield from actor.read(output("model.b"))))

    stage.add_block(block)
    stage.run()
    assert seen == ["x0>attn>mlp>a>attn>mlp>b"]
    assert stage.result == "x0>attn>mlp>a>attn>mlp>b>attn>mlp>c>model"


def test_a_write_before_the_visit_replaces_what_the_model_goes_on_with() -> None:
    stage = three_layers()

    def block(actor: Actor) -> Block:
        yield from actor.write(output("model.b"), "new")

    stage.add_block(block)
    stage.run()
    assert stage.result == "new>attn>mlp>c>model"


def test_a_later_block_reads_what_an_earlier_block_wrote_at_the_same_visit() -> None:
    stage, seen = three_layers(), []

    def writer(actor: Actor) -> Block:
        yield from actor.write(output("model.b"), "new")

    def reader(actor: Actor) -> Block:
        seen.append((yield from actor.read(output("model.b"))))

    stage.add_block(writer)
    stage.add_block(reader)
    stage.run()
    assert seen == ["new"]


def test_a_skipped_module_does_not_run_its_children() -> None:
    stage = three_layers()

    def block(actor: Actor) -> Block:
        value = yield from actor.read(output("model.a"))
        yield from actor.skip(output("model.b"), value)

    stage.add_block(block)
    stage.run()
    assert stage.result == "x0>attn>mlp>a>attn>mlp>c>model"


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (output("model.b"), output("model.a")),  # a sibling that ended
        (output("model.b"), output("model.b.mlp")),  # inside what ended
        (output("model.b"), output("model.a.mlp")),  # inside a sibling that ended
        (output("model.b.mlp"), output("model.b.attn")),  # a sibling inside what runs
        (output("model.b.mlp"), input_("model.b")),  # the input of what runs
        (output("model.b.mlp"), input_("model")),
        (output("model.b"), input_("model.b")),
    ],
)
def test_what_has_passed_is_refused_at_the_moment_it_is_asked_for(
    first: Site, second: Site
) -> None:
    stage, seen = three_layers(), []

    def block(actor: Actor) -> Block:
        yield from actor.read(first)
        with pytest.raises(SiteOrderError, match=str(second.path)):
            yield from actor.read(second)
        seen.append((yield from actor.read(output("model.c"))))

    mediator = stage.add_block(block)
    stage.run()
    assert mediator.error is None
    assert len(seen) == 1


def test_a_module_that_did_not_run_is_named_with_the_one_that_contains_it() -> None:
    stage = three_layers()

    def block(actor: Actor) -> Block:
        yield from actor.skip(output("model.b"), "skipped")
        yield from actor.read(output("model.b.mlp"))

    mediator = stage.add_block(block)
    stage.run()
    assert isinstance(mediator.error, (NeverRanError, SiteOrderError))


def test_a_step_that_did_not_happen_says_how_many_there_were() -> None:
    stage = three_layers()

    def block(actor: Actor) -> Block:
        assert (yield from actor.go_to_step(1))
        yield from actor.read(output("model.b"))
        assert not (yield from actor.go_to_step(5))
        yield from actor.read(output("model.b"))

    mediator = stage.add_block(block)
    stage.run(steps=3)
    assert isinstance(mediator.error, SiteOrderError)


def test_steps_go_forward_alone() -> None:
    stage = three_layers()

    def block(actor: Actor) -> Block:
        assert (yield from actor.go_to_step(2))
        with pytest.raises(StepError, match="ascending"):
            yield from actor.go_to_step(1)

    mediator = stage.add_block(block)
    stage.run(steps=3)
    assert mediator.error is None


def test_a_value_that_does_not_fit_is_refused_where_it_was_written() -> None:
    stage = three_layers()

    def block(actor: Actor) -> Block:
        with pytest.raises(MisfitError, match="was written"):
            yield from actor.write(output("model.b"), 3)
        assert (yield from actor.read(output("model.c"))) is not None

    mediator = stage.add_block(block)
    stage.run()
    assert mediator.error is None


def test_the_result_is_what_the_call_returned() -> None:
    stage, seen = three_layers(), []

    def block(actor: Actor) -> Block:
        seen.append((yield from actor.read(Site("model", Slot.RESULT))))

    stage.add_block(block)
    stage.run()
    assert seen == [stage.result]


def test_an_illegal_move_is_a_key_error_in_the_table() -> None:
    with pytest.raises(KeyError):
        TRANSITIONS[State.DONE, Move.ASK]


def test_the_protocol_needs_neither_torch_nor_threads() -> None:
    code = (
        "import sys; import tracekit.interleave.interleaver as _; "
        "bad = {'torch', '_thread.worker', 'tracekit.interleave.worker', "
        "'tracekit.interleave.baton'} & set(sys.modules); assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
