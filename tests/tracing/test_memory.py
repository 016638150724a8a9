"""With the garbage collector off, nothing of any kind of trace stays alive."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from tests.tiny_models import make
from tests.tracing.plain import X, small, state_of
from tracekit import Model
from tracekit.errors import (
    MisfitError,
    NeverRanError,
    OverwrittenError,
    SiteOrderError,
    TracekitError,
)

TIMES = 100


def plain(model: Model) -> None:
    with model.trace(X) as tracer:
        value = model[0].output
        result = tracer.result
    assert value.shape == result.shape


def empty(model: Model) -> None:
    with model.trace(X):
        pass


def cached(model: Model) -> None:
    with model.trace(X) as tracer:
        cache = tracer.cache(include_inputs=True)
    assert len(cache) == 4


def cached_and_edited(model: Model) -> None:
    with torch.no_grad(), model.trace(X) as tracer:
        tracer.cache()
        model[0].output[:] = 0
        model[1].output = model[1].output * 2


def cached_for_gradients(model: Model) -> None:
    with model.trace(X) as tracer:
        cache = tracer.cache(detach=False)
    cache["model"].output.sum().backward()


def early_stop(model: Model) -> None:
    with model.trace(X) as tracer:
        tracer.cache()
        value = model[1].output
        tracer.stop()
    assert value.shape == X.shape


def error_in_the_block(model: Model) -> None:
    with pytest.raises(ZeroDivisionError):
        with model.trace(X) as tracer:
            tracer.cache()
            value = model[1].output
            value / (1 / 0)


def error_in_the_model(model: Model) -> None:
    with pytest.raises(RuntimeError):
        with model.trace(torch.zeros(3, 5)) as tracer:
            tracer.cache()
            given = model[0].input
            model[1].output
    assert given.shape == (3, 5)


def error_in_the_model_caught_by_a_name(model: Model) -> None:
    try:
        with model.trace(torch.zeros(3, 5)):
            given = model[0].input
            given + 1
            model[1].output
    except RuntimeError as error:
        assert error.__traceback__ is not None  # noqa: PT017 - caught as a user would


def order_error(model: Model) -> None:
    with pytest.raises(SiteOrderError):
        with model.trace(X):
            late = model[1].output
            late + model[0].output


def misfit(model: Model) -> None:
    with pytest.raises(MisfitError):
        with model.trace(X):
            model[0].output = torch.zeros(1)


def misfit_at_once(model: Model) -> None:
    with pytest.raises(MisfitError):
        with model.trace(X):
            value = model[0].output
            model[0].output = value[0]


def never_ran(model: Model) -> None:
    with pytest.raises(NeverRanError):
        with model.trace(X):
            model[0].calls[3].output


def backward_in_the_block(model: Model) -> None:
    with model.trace(X) as tracer:
        value = model[0].output
        value.retain_grad()
        tracer.result.sum().backward()
    assert value.grad is not None


def backward_after_the_block(model: Model) -> None:
    with model.trace(X) as tracer:
        value = model[0].output
        value.retain_grad()
        result = tracer.result
    result.sum().backward()
    assert value.grad is not None


def nested(model: Model) -> None:
    with model.trace(X):
        outer = model[0].output
        with model.trace(X * 2) as tracer:
            cache = tracer.cache()
            inner = model[0].output
        both = outer + inner + model[1].output
    assert both.shape == X.shape and len(cache) == 4


def error_in_a_nested_block(model: Model) -> None:
    with pytest.raises(ZeroDivisionError):
        with model.trace(X):
            outer = model[0].output
            with model.trace(X):
                model[0].output + outer
                1 / 0


def skip(model: Model) -> None:
    with model.trace(X) as tracer:
        model[1].skip(model[0].output)
        result = tracer.result
    assert result.shape == X.shape


def skip_after_an_error(model: Model) -> None:
    with pytest.raises(ZeroDivisionError):
        with model.trace(X):
            model[1].skip(model[0].output)
            1 / 0


def cache_of_what_never_ran(model: Model) -> None:
    model.module.spare = torch.nn.Identity()
    model.module.forward = lambda value: model.module[0](value)
    try:
        with pytest.raises(NeverRanError):
            with model.trace(X) as tracer:
                tracer.cache(modules="spare")
    finally:
        del model.module.spare, model.module.forward


def overwritten(model: Model) -> None:
    with pytest.raises(OverwrittenError), torch.no_grad():
        with model.trace(X) as tracer:
            value = model[0].output
            tracer.result.sum()
            value += 1


def caught_in_the_block(model: Model) -> None:
    with model.trace(X) as tracer:
        late = model[1].output
        try:
            model[0].output
        except TracekitError:
            late = late + 1
        tracer.result.sum()


def edited(model: Model) -> None:
    with model.edit() as changed:
        model[0].output = model[0].output * 2
    with changed.trace(X) as tracer:
        changed[1].output
        result = tracer.result
    assert torch.equal(changed(X), result)


def an_edit_that_was_never_made(model: Model) -> None:
    with model.edit() as changed:
        model[0].calls[3].output
    with pytest.raises(NeverRanError):
        changed(X)
    with pytest.raises(NeverRanError):
        with changed.trace(X):
            model[1].output


def left_early(model: Model) -> None:
    def returned() -> torch.Tensor:
        with model.trace(X) as tracer:
            tracer.cache()
            return model[0].output

    def suspended() -> Iterator[torch.Tensor]:
        with model.trace(X):
            yield model[0].output
            yield model[1].output

    def failing() -> None:
        with model.trace(torch.zeros(3, 5)):
            model[1].output
            return

    assert torch.equal(returned(), next(suspended()))
    with pytest.raises(RuntimeError):
        failing()


def without_a_block(model: Model) -> None:
    value = model.trace(X).run(lambda tracer: model[0].output + tracer.result)
    outcome = model.run(X, capture="*", edits=[("1", lambda hidden: hidden * 2)])
    assert value.shape == outcome.result.shape
    with pytest.raises(ZeroDivisionError):
        model.trace(X).run(lambda: model[0].output / (1 // 0))
    with pytest.raises(ZeroDivisionError):
        model.run(X, edits=[("1", lambda hidden: hidden / (1 // 0))])


KINDS = [
    edited,
    an_edit_that_was_never_made,
    plain,
    empty,
    cached,
    cached_and_edited,
    cached_for_gradients,
    early_stop,
    error_in_the_block,
    error_in_the_model,
    error_in_the_model_caught_by_a_name,
    order_error,
    misfit,
    misfit_at_once,
    never_ran,
    backward_in_the_block,
    backward_after_the_block,
    nested,
    error_in_a_nested_block,
    skip,
    skip_after_an_error,
    cache_of_what_never_ran,
    overwritten,
    caught_in_the_block,
    left_early,
    without_a_block,
]


def living() -> tuple[int, int, int]:
    """Tensors, threads and open files."""
    tensors = sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())
    return tensors, threading.active_count(), len(os.listdir("/proc/self/fd"))


def found_by_collecting() -> list[Any]:
    """What only the collector could free, as far as it is of tracekit or of torch."""
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        gc.collect()
        return [thing for thing in gc.garbage if _is_ours(thing)]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()


def _is_ours(thing: Any) -> bool:
    kind = type(thing)  # isinstance() would ask lazy modules for their __class__
    return issubclass(kind, (BaseException, torch.Tensor)) or kind.__module__.startswith("tracekit")


@pytest.mark.usefixtures("without_collector")
@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts open files in /proc")
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_hundred_traces_leave_nothing(kind: Callable[[Model], None]) -> None:
    check_that_nothing_is_left(kind, TIMES)


@pytest.mark.usefixtures("without_collector", "in_place")
@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts open files in /proc")
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_traces_with_their_blocks_in_place_leave_nothing(kind: Callable[[Model], None]) -> None:
    check_that_nothing_is_left(kind, 5)


def check_that_nothing_is_left(kind: Callable[[Model], None], times: int) -> None:
    model = Model(small())
    untouched = state_of(model.module)
    for _ in range(3):  # compiles the block, starts the workers, makes the gradients' tensors
        kind(model)
    gc.collect()
    before = living()
    for _ in range(times):
        kind(model)
    assert living() == before
    assert found_by_collecting() == []
    assert state_of(model.module) == untouched


@pytest.mark.usefixtures("without_collector")
def test_traced_generations_leave_nothing() -> None:
    model, inputs = make("gpt2")
    traced = Model(model)
    untouched = state_of(model)

    def generation() -> None:
        with traced.generate(**inputs, max_new_tokens=3, do_sample=False) as tracer:
            cache = tracer.cache()
            for _ in tracer.iter[:]:
                traced.transformer.h[0].output[:] += 1
        assert len(cache["model.lm_head"]) == 3

    def stopped() -> None:
        with traced.generate(**inputs, max_new_tokens=3, do_sample=False) as tracer:
            tracer.next()
            traced.transformer.h[0].output.sum()
            tracer.stop()

    for kind in (generation, stopped):
        for _ in range(3):
            kind()
        gc.collect()
        before = living()
        for _ in range(20):
            kind()
        assert living() == before, kind.__name__
        assert state_of(model) == untouched


@pytest.mark.usefixtures("without_collector")
def test_a_read_value_dies_with_the_users_name() -> None:
    import weakref

    model = Model(small())
    with model.trace(X):
        value = model[0].output
    alive = weakref.ref(value)
    del value
    assert alive() is None


@pytest.mark.usefixtures("without_collector")
def test_a_model_dies_with_its_wrapper() -> None:
    import weakref

    net = small()
    model = Model(net)
    with model.trace(X) as tracer:
        cache = tracer.cache()
        model[0].output
    alive = weakref.ref(net)
    del net, model, tracer
    assert alive() is None
    assert len(cache) == 4
