"""Blocks that stay in place: how they are left, whom a request is for, and what is said of them."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import threading
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.tiny_models import make
from tests.tracing.plain import X, state_of
from tracekit import Model, Tracer, settings
from tracekit.errors import CacheError, OutsideTraceError, SiteOrderError
from tracekit.interleave import worker

IDS = torch.arange(10, 16).reshape(2, 3)
GREEDY = {"max_new_tokens": 3, "do_sample": False}


@pytest.fixture
def model(net: nn.Sequential) -> Iterator[Model]:
    before = state_of(net)
    model = Model(net)
    yield model
    assert state_of(net) == before
    with model.trace(X):
        value = model[2].output
    assert torch.equal(value, net(X))


def lines_of(error: BaseException) -> list[str]:
    """The lines of this file in a traceback; no line of tracekit is in it."""
    entries = traceback.extract_tb(error.__traceback__)
    assert not [entry for entry in entries if "/tracekit/tracing/" in entry.filename]
    assert not [entry for entry in entries if "/tracekit/interleave/" in entry.filename]
    return [entry.line or "" for entry in entries if entry.filename == __file__]


# -- what is said of it ----------------------------------------------------------------------------


def test_a_tracer_tells_in_which_way_its_block_ran_and_why(model: Model) -> None:
    with model.trace(X) as lifted:
        model[0].output
    with model.trace(X) as quiet:
        quiet.cache()

    def returned() -> Tracer:
        with model.trace(X) as tracer:
            return tracer

    with settings.changed(lift_blocks=False), model.trace(X) as switched:
        pass
    assert lifted.explain().startswith("The block was lifted out of its place")
    assert "model[0].output" in lifted.explain()
    assert quiet.explain().startswith("The block ran in place, before the model")
    assert "on another thread" in returned().explain()
    assert f"{__file__}:" in returned().explain()
    assert "`return` cannot be lifted" in returned().explain()
    assert "settings.lift_blocks is False" in switched.explain()


def test_there_is_nothing_to_tell_before_the_block(model: Model) -> None:
    with pytest.raises(CacheError, match="nothing to explain"):
        model.trace(X).explain()


# -- how it is left --------------------------------------------------------------------------------


def test_the_model_runs_to_its_end_after_an_early_return(model: Model, net: nn.Sequential) -> None:
    seen: list[Tensor] = []
    handle = net[2].register_forward_hook(lambda _module, _args, output: seen.append(output))

    def first() -> tuple[Any, Tensor]:
        with model.trace(X) as tracer:
            return tracer.cache(), model[0].output

    cache, value = first()
    handle.remove()
    assert torch.equal(value, net[0](X))
    assert torch.equal(cache["model"].output, net(X))
    assert len(seen) == 1


def test_a_block_that_asks_for_nothing_has_its_caches(model: Model, net: nn.Sequential) -> None:
    def cached() -> Any:
        with model.trace(X) as tracer:
            return tracer.cache()

    assert torch.equal(cached()["model"].output, net(X))


def test_an_error_of_the_model_is_raised_at_the_with(model: Model) -> None:
    ran = []

    def failing() -> Tensor:
        with model.trace(torch.zeros(3, 5)):
            ran.append(model[0].input)
            return model[1].output

    with pytest.raises(RuntimeError, match="mat1 and mat2") as caught:
        failing()
    assert lines_of(caught.value)[1:] == ["with model.trace(torch.zeros(3, 5)):"]
    assert caught.value.__context__ is None
    assert len(ran) == 1


def test_an_error_of_the_model_is_not_lost_to_a_block_that_goes_on(model: Model) -> None:
    seen = []
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        with settings.changed(lift_blocks=False), model.trace(torch.zeros(3, 5)):
            for index in range(3):
                try:
                    model[index].output
                except BaseException as error:
                    seen.append(type(error).__name__)
    assert seen == ["Unwind"] * 3


def test_an_error_of_the_users_on_the_way_out_has_the_models_as_its_context(model: Model) -> None:
    def failing() -> None:
        with model.trace(torch.zeros(3, 5)):
            try:
                model[1].output
                return
            finally:
                raise KeyError("in the finally")

    with pytest.raises(KeyError, match="in the finally") as caught:
        failing()
    assert isinstance(caught.value.__context__, RuntimeError)


def test_an_error_in_the_block_leaves_the_rest_of_the_model_uncomputed(
    model: Model, net: nn.Sequential
) -> None:
    computed: list[Tensor] = []
    handle = net[2].register_forward_hook(lambda _module, _args, output: computed.append(output))

    def failing() -> None:
        with model.trace(X):
            model[0].output
            return 1 / 0

    with pytest.raises(ZeroDivisionError) as caught:
        failing()
    handle.remove()
    assert lines_of(caught.value)[1:] == ["return 1 / 0"]
    assert computed == []


def test_an_order_error_in_an_exit_stack_names_the_users_lines(model: Model) -> None:
    with pytest.raises(SiteOrderError) as caught:
        with ExitStack() as stack:
            stack.enter_context(model.trace(X))
            model[1].output  # the line before
            model[0].output
    first = caught.value.__traceback__
    assert first is not None
    assert f"(line {first.tb_lineno - 1})" in str(caught.value)
    assert lines_of(caught.value) == ["model[0].output"]


def test_a_generator_that_is_closed_or_forgotten_unwinds_the_model(
    model: Model, net: nn.Sequential
) -> None:
    before = state_of(net)

    def values() -> Iterator[Tensor]:
        with model.trace(X) as tracer:
            tracer.cache()
            yield model[0].output
            yield model[1].output

    next(values())
    idle, gone = len(worker._idle), threading.active_count()
    gc.collect()
    gc.disable()
    try:
        closed, forgotten = values(), values()
        next(closed)
        next(forgotten)
        assert state_of(net) != before
        closed.close()
        del forgotten
        assert state_of(net) == before
    finally:
        gc.enable()
    assert len(worker._idle) >= idle
    assert threading.active_count() <= gone + 1


def test_a_task_that_is_cancelled_unwinds_the_model(model: Model) -> None:
    async def task() -> None:
        with model.trace(X):
            model[0].output
            await asyncio.sleep(3600)

    async def main() -> None:
        running = asyncio.create_task(task())
        await asyncio.sleep(0)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running

    asyncio.run(main())


def test_a_block_that_is_left_on_another_thread_ends_as_well(
    model: Model, net: nn.Sequential
) -> None:
    def values() -> Iterator[Tensor]:
        with model.trace(X):
            yield model[0].output

    generator = values()
    got = next(generator)
    thread = threading.Thread(target=generator.close)
    thread.start()
    thread.join()
    assert torch.equal(got, net[0](X))


def test_stop_computes_nothing_more(model: Model, net: nn.Sequential) -> None:
    computed: list[Tensor] = []
    handle = net[1].register_forward_hook(lambda _module, _args, output: computed.append(output))

    def stopped(first: bool) -> Any:
        value = None
        with model.trace(X) as tracer:
            if not first:
                value = model[0].output
            tracer.stop()
            return "not reached"
        return value

    assert stopped(first=True) is None
    assert torch.equal(stopped(first=False), net[0](X))
    handle.remove()
    assert computed == []


# -- whom a request is for -------------------------------------------------------------------------


def test_what_could_be_meant_for_several_suspended_blocks_is_refused(model: Model) -> None:
    def values() -> Iterator[Tensor]:
        with model.trace(X):
            yield model[0].output
            yield model[1].output

    one, other = values(), values()
    next(one)
    next(other)
    with pytest.raises(OutsideTraceError, match="2 blocks are open and suspended"):
        model[1].output
    assert torch.equal(next(one), next(other))


def test_a_lifted_block_is_not_given_the_values_of_a_suspended_one(
    model: Model, net: nn.Sequential
) -> None:
    def values() -> Iterator[Tensor]:
        with model.trace(X * 2):
            yield model[0].output
            yield model[1].output

    with model.trace(X) as tracer:
        generator = values()
        inner = [next(generator)]
        mine = model[0].output
        inner.append(next(generator))
        generator.close()
        result = tracer.result
    assert torch.equal(mine, net[0](X))
    assert torch.equal(result, net(X))
    assert torch.equal(inner[1], net[1](net[0](X * 2)))


def test_tasks_that_a_block_waits_for_ask_its_run(model: Model, net: nn.Sequential) -> None:
    async def read(index: int) -> Tensor:
        return model[index].output

    async def task(scale: int) -> list[Tensor]:
        with model.trace(X * scale):
            return await asyncio.gather(read(0), read(2))

    async def both() -> list[list[Tensor]]:
        return await asyncio.gather(task(1), task(2))

    for scale, (first, last) in enumerate(asyncio.run(both()), start=1):
        assert torch.equal(first, net[0](X * scale))
        assert torch.equal(last, net(X * scale))


def test_another_thread_has_no_part_in_a_block_in_place(model: Model) -> None:
    caught: list[BaseException] = []

    def ask() -> None:
        try:
            model[0].output
        except OutsideTraceError as error:
            caught.append(error)

    with settings.changed(lift_blocks=False), model.trace(X):
        thread = threading.Thread(target=ask)
        thread.start()
        thread.join()
        model[0].output
    assert len(caught) == 1


def test_a_fixture_of_a_frameworks_own_may_hold_the_block(model: Model, net: nn.Sequential) -> None:
    def fixture() -> Iterator[Tracer]:
        with model.trace(X) as tracer:
            yield tracer

    driven = fixture()
    tracer = next(driven)
    value = model[0].output
    result = tracer.result
    assert next(driven, None) is None
    assert torch.equal(value, net[0](X))
    assert torch.equal(result, net(X))


# -- save() ----------------------------------------------------------------------------------------


def test_a_tensor_is_saved_in_a_block_in_place_as_in_a_captured_one(
    model: Model, net: nn.Sequential
) -> None:
    space: dict[str, Any] = {"model": model, "X": X}
    exec(
        "with model.trace(X) as tracer:\n"
        "    first = model[0].output.save()\n"
        "    both = [model[2].output.save()]\n"
        "    weight = model[2].weight.save()\n",
        space,
    )
    assert torch.equal(space["first"], net[0](X))
    assert torch.equal(space["both"][0], net(X))
    assert space["weight"] is net[2].weight
    assert not hasattr(Tensor, "save")


def test_a_function_that_returns_out_of_its_block_saves_a_tensor(
    model: Model, net: nn.Sequential
) -> None:
    def read() -> Any:
        with model.trace(X):
            return model[0].output.save()  # type: ignore[attr-defined]

    assert torch.equal(read(), net[0](X))
    assert torch.equal(model.trace(X).run(lambda: model[0].output.save()), net[0](X))
    assert not hasattr(Tensor, "save")


def test_no_other_thread_has_save_while_a_block_in_place_has_it(
    model: Model, in_place: None
) -> None:
    seen: list[bool] = []

    def look() -> None:
        seen.append(hasattr(torch.ones(1), "save"))

    model.module.register_forward_hook(lambda *_: look())  # the model runs on another thread
    with model.trace(X):
        thread = threading.Thread(target=look)
        thread.start()
        thread.join()
        assert hasattr(X, "save")
        with pytest.raises(RuntimeError, match="on the way out"), model.trace(X):
            raise RuntimeError("on the way out")
        assert hasattr(X, "save")
    model.module._forward_hooks.clear()
    assert seen == [False, False]
    assert not hasattr(X, "save")
    assert not hasattr(Tensor, "save")


def test_a_tensor_with_a_save_of_its_own_keeps_it(model: Model, in_place: None) -> None:
    class Own(Tensor):
        def save(self) -> str:
            return "own"

    lent: Any = torch.ones(1)
    lent.save = lambda: "lent"
    with model.trace(X):
        kept = torch.ones(1).as_subclass(Own).save(), lent.save()
    assert kept == ("own", "lent")


@pytest.mark.parametrize("value", [(1, 2), [1], {"a": 1}, 1])
def test_what_is_no_tensor_names_the_cure_where_it_is_saved_in_place(
    value: Any, model: Model, in_place: None
) -> None:
    with pytest.raises(AttributeError, match=r"tracekit\.save\(x\)") as caught:
        with model.trace(X):
            value.save()
    assert lines_of(caught.value)[-1] == "value.save()"
    with pytest.raises(AttributeError, match=r"tracekit\.save\(x\)"):
        model.trace(X).run(lambda: value.save())


# -- the torch state -------------------------------------------------------------------------------


def test_the_model_has_the_state_of_the_with_and_not_that_of_the_line_that_asks(
    model: Model, net: nn.Sequential
) -> None:
    def inside() -> tuple[Tensor, Tensor]:
        with model.trace(X):
            with torch.no_grad():
                first = model[0].output
                computed = first * 2
            return first, computed

    def around() -> Tensor:
        with torch.no_grad():
            with model.trace(X):
                return model[0].output

    first, computed = inside()
    assert first.requires_grad
    assert not computed.requires_grad
    assert not around().requires_grad


def test_steps_of_a_generation_in_place() -> None:
    llama = make("llama")[0]
    model = Model(llama)
    plain = llama.generate(IDS, **GREEDY)

    def steps() -> Iterator[Any]:
        with model.generate(IDS, **GREEDY) as tracer:
            for step in tracer.iter[:]:
                yield step, model.lm_head.output[:, -1].argmax(-1)
            yield tracer.result

    *tokens, result = list(steps())
    assert torch.equal(result, plain)
    assert [step for step, _ in tokens] == [0, 1, 2]
    assert torch.equal(torch.stack([token for _, token in tokens], 1), plain[:, -3:])
    assert torch.is_grad_enabled()


def test_gradients_are_off_in_a_generation_and_on_after_it() -> None:
    model = Model(make("llama")[0])

    def computed() -> Tensor:
        with model.generate(IDS, **GREEDY):
            return model.lm_head(model.model.layers[0].output)

    def failing() -> None:
        with model.generate(IDS, **GREEDY):
            return 1 / 0

    assert not computed().requires_grad
    with contextlib.suppress(ZeroDivisionError):
        failing()
    assert torch.is_grad_enabled()


@contextmanager
def traced(model: Model) -> Iterator[Tracer]:
    with model.trace(X) as tracer:
        yield tracer


def test_an_error_in_the_block_of_a_users_manager_shows_the_users_lines(model: Model) -> None:
    with pytest.raises(SiteOrderError, match=r"model\.0\.output") as caught:
        with traced(model):
            model[1].output
            model[0].output
    assert lines_of(caught.value)[:1] == ["model[0].output"]
