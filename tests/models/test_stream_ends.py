"""However a stream ends, nothing stays: no hook, no thread at work, no tensor; others go on."""

from __future__ import annotations

import contextvars
import gc
import os
import signal
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LogitsProcessorList

from tests.models.test_stream import H0, REPEATING, greedily, joined
from tests.tiny_models import make
from tests.tracing.plain import state_of
from tests.tracing.test_memory import found_by_collecting, living
from tracekit import LanguageModel, Model, settings
from tracekit.errors import StreamError

NEW = 4


@pytest.fixture(scope="module")
def net() -> Any:
    return make("gpt2")[0]


@pytest.fixture
def model(net: nn.Module) -> Iterator[Model]:
    before = state_of(net)
    yield Model(net)
    assert state_of(net) == before


@pytest.fixture(scope="module")
def plain(net: Any) -> Tensor:
    return net.generate(input_ids=REPEATING, max_new_tokens=NEW, do_sample=False)


def stream_of(model: Model, **options: Any) -> Any:
    return greedily(model, new=NEW, **{"capture": "transformer.h.*", **options})


def has_ended_with(items: list[Tensor], plain: Tensor) -> bool:
    return torch.equal(joined(items), plain[:, REPEATING.shape[1] :])


# -- the ways to end ------------------------------------------------------------------------------


def the_end(model: Model) -> None:
    stream = stream_of(model)
    assert len([stream.cache[H0][-1].hidden for _ in stream]) == NEW


def a_break(model: Model) -> None:
    stream = stream_of(model)
    for _ in stream:
        break
    assert len(stream.cache[H0]) == 1


def a_break_out_of_an_unnamed_stream(model: Model) -> None:
    for _ in stream_of(model):
        break


def dropped(model: Model) -> None:
    items = iter(stream_of(model))
    next(items)
    del items


def dropped_before_it_began(model: Model) -> None:
    items = iter(stream_of(model))
    del items


def never_gone_through(model: Model) -> None:
    stream_of(model)


def closed(model: Model) -> None:
    stream = stream_of(model)
    items = iter(stream)
    next(items)
    stream.close()
    assert list(items) == []
    stream.close()


def closed_before_it_began(model: Model) -> None:
    stream = stream_of(model)
    items = iter(stream)
    stream.close()
    assert list(items) == []


def a_with_that_is_left(model: Model) -> None:
    with stream_of(model) as stream:
        items = iter(stream)
        next(items)
    assert list(items) == []


def an_error_in_the_loop(model: Model) -> None:
    with pytest.raises(ZeroDivisionError):
        for _ in stream_of(model):
            1 / 0


def an_error_in_the_with(model: Model) -> None:
    with pytest.raises(ZeroDivisionError):
        with stream_of(model) as stream:
            for _ in stream:
                1 / 0


def a_return_out_of_a_function(model: Model) -> None:
    def first() -> Any:
        for item in stream_of(model):
            return item
        return None

    assert first().shape == (1, 1)


def a_generator_that_is_forgotten(model: Model) -> None:
    def items() -> Iterator[Any]:
        yield from stream_of(model)

    generator = items()
    next(generator)
    del generator


def an_error_in_the_model(model: Model) -> None:
    ids = torch.full((1, 126), 11)  # the positions end at 128
    with pytest.raises((IndexError, RuntimeError)):
        for _ in greedily(model, ids, 9, capture=H0):
            pass


def an_error_in_an_edit(model: Model) -> None:
    with pytest.raises(ZeroDivisionError):
        list(stream_of(model, edits=[(H0, lambda _: 1 / 0)]))


def an_error_in_the_function(model: Model) -> None:
    def fail(tracer: Any) -> None:
        tracer.next(2)
        model.transformer.h[0].output / (1 // 0)

    with pytest.raises(ZeroDivisionError):
        list(stream_of(model, run=fail))


def left_with_a_function_waiting(model: Model) -> None:
    left = []

    def follow(tracer: Any) -> None:
        try:
            for _ in tracer.iter[:]:
                model.transformer.h[0].hidden *= 1.5
        finally:
            left.append(True)

    for _ in stream_of(model, run=follow, edits=[("transformer.h.1", lambda h: h + 1)]):
        break
    assert left


def left_with_a_progress_bar(model: Model) -> None:
    for _ in stream_of(model, progress=True):
        break


def stopped_by_the_function(model: Model) -> None:
    def stop(tracer: Any) -> None:
        tracer.next()
        model.transformer.h[0].hidden.sum()
        tracer.stop()

    assert len(list(stream_of(model, run=stop))) == 1


def with_all_kinds_of_edits(model: Model) -> None:
    def follow(tracer: Any) -> None:
        for _ in tracer.iter[:]:
            model.transformer.h[0].mlp.skip(model.transformer.h[0].mlp.input)
            model.transformer.h[1].attn.source

    with model.edit() as edited:
        edited.transformer.h[0].hidden *= 2
    stream = stream_of(edited, run=follow, edits=[("transformer.h.1", 1.0)], capture=None)
    for step, _ in enumerate(stream):
        if step == 1:
            break


def press() -> None:
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)


def pressed(*_: Any) -> Any:
    press()
    for _ in range(10**8):  # until it comes
        pass


def control_c_in_the_loop(model: Model) -> None:
    with pytest.raises(KeyboardInterrupt):
        for _ in stream_of(model):
            press()


def control_c_in_the_model(model: Model) -> None:
    with pytest.raises(KeyboardInterrupt):
        list(stream_of(model, edits=[(H0, pressed)]))


def control_c_in_generate(model: Model) -> None:
    with pytest.raises(KeyboardInterrupt):
        list(stream_of(model, logits_processor=LogitsProcessorList([pressed])))


def control_c_just_before_an_error(model: Model) -> None:
    def press_and_fail(*_: Any) -> Any:
        press()
        return 1 / 0

    with pytest.raises((KeyboardInterrupt, ZeroDivisionError)):
        list(stream_of(model, logits_processor=LogitsProcessorList([press_and_fail])))


ENDS: list[Callable[[Model], None]] = [
    the_end,
    a_break,
    a_break_out_of_an_unnamed_stream,
    dropped,
    dropped_before_it_began,
    never_gone_through,
    closed,
    closed_before_it_began,
    a_with_that_is_left,
    an_error_in_the_loop,
    an_error_in_the_with,
    a_return_out_of_a_function,
    a_generator_that_is_forgotten,
    an_error_in_the_model,
    an_error_in_an_edit,
    an_error_in_the_function,
    left_with_a_function_waiting,
    left_with_a_progress_bar,
    stopped_by_the_function,
    with_all_kinds_of_edits,
    control_c_in_the_loop,
    control_c_in_the_model,
    control_c_in_generate,
    control_c_just_before_an_error,
]


@pytest.fixture
def without_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("without_collector")
@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts open files in /proc")
@pytest.mark.parametrize("end", ENDS, ids=lambda end: end.__name__)
def test_a_stream_leaves_nothing(end: Callable[[Model], None], net: Any, plain: Tensor) -> None:
    model, untouched = Model(net), state_of(net)
    for _ in range(2):
        end(model)
    gc.collect()
    before = living()
    for _ in range(10):
        end(model)
    assert living() == before
    assert found_by_collecting() == []
    assert state_of(net) == untouched
    assert torch.equal(model.generate(REPEATING, max_new_tokens=NEW, do_sample=False), plain)


@pytest.mark.usefixtures("without_collector")
def test_a_stream_keeps_nothing_but_what_it_is_asked_for(model: Model) -> None:
    seen: list[weakref.ref[Tensor]] = []

    def look(hidden: Tensor) -> None:
        seen.append(weakref.ref(hidden))

    stream = stream_of(model, edits=[(H0, look)], capture=())
    for item in stream:
        assert item.shape == (1, 1)
    assert seen and all(ref() is None for ref in seen)
    result = weakref.ref(stream.result)
    del stream
    assert result() is None


def test_an_error_is_raised_at_the_line_of_the_loop(model: Model) -> None:
    with pytest.raises(ZeroDivisionError) as caught:
        list(stream_of(model, edits=[(H0, lambda _: 1 / 0)]))
    files = [str(entry.path) for entry in caught.traceback]
    assert files[0].endswith("test_stream_ends.py")
    assert not [file for file in files if "/tracekit/" in file and "/tests/" not in file]


def test_after_an_error_a_stream_has_ended(model: Model) -> None:
    items = iter(stream_of(model, edits=[(H0, lambda _: 1 / 0)]))
    with pytest.raises(ZeroDivisionError):
        next(items)
    assert list(items) == []


# -- beside others --------------------------------------------------------------------------------


def test_two_streams_of_one_model_take_turns(model: Model, plain: Tensor) -> None:
    edited = list(stream_of(model, edits=[(H0, lambda h: h.flip(-1))]))
    one = stream_of(model, capture=H0)
    other = stream_of(model, capture=H0, edits=[(H0, lambda h: h.flip(-1))])
    pairs = list(zip(one, other, strict=True))
    assert has_ended_with([pair[0] for pair in pairs], plain)
    assert torch.equal(joined([pair[1] for pair in pairs]), joined(edited))
    assert len(one.cache[H0]) == len(other.cache[H0]) == NEW
    assert not torch.equal(one.cache[H0][0].hidden, other.cache[H0][0].hidden)


@pytest.mark.parametrize("first", [0, 1])
def test_streams_end_in_any_order(first: int, net: Any, model: Model, plain: Tensor) -> None:
    def follow(tracer: Any) -> None:
        for _ in tracer.iter[:]:
            model.transformer.h[0].mlp.skip(model.transformer.h[0].mlp.input)
            model.transformer.h[1].attn.source

    before = state_of(net)
    streams = [iter(stream_of(model, run=follow, capture=None)) for _ in range(2)]
    expected = [next(each) for each in streams]
    assert torch.equal(*expected)
    del streams[first]
    rest = list(streams.pop())
    assert len(rest) == NEW - 1
    assert state_of(net) == before
    assert has_ended_with(list(stream_of(model)), plain)


def test_a_stream_within_the_loop_of_another(model: Model, plain: Tensor) -> None:
    items = []
    for item in stream_of(model):
        assert has_ended_with(list(stream_of(model)), plain)
        items.append(item)
    assert has_ended_with(items, plain)


def test_a_trace_in_the_loop_sees_its_own_run_alone(model: Model, plain: Tensor) -> None:
    with torch.no_grad(), model.trace(REPEATING + 1):
        expected = model.transformer.h[0].hidden
    items, stream = [], stream_of(model)
    for count, item in enumerate(stream):
        with torch.no_grad(), model.trace(REPEATING + 1) as tracer:
            cache = tracer.cache(model.transformer.h)
            seen = model.transformer.h[0].hidden
            model.transformer.h[1].hidden = model.transformer.h[1].hidden * 0
        assert torch.equal(seen, expected)
        assert len(cache[H0]) == 1
        assert len(stream.cache[H0]) == count + 1
        model.module(REPEATING)
        items.append(item)
    assert has_ended_with(items, plain)


def test_a_trace_while_an_abandoned_stream_stands_still(model: Model, plain: Tensor) -> None:
    items = iter(stream_of(model, edits=[(H0, lambda h: h * 0)]))
    next(items)
    with model.generate(REPEATING, max_new_tokens=NEW, do_sample=False) as tracer:
        cache = tracer.cache()
        result = tracer.result
    assert torch.equal(result, plain)
    assert len(cache[H0]) == NEW
    assert len(list(items)) == NEW - 1


@pytest.mark.parametrize("is_lifted", [True, False])
def test_a_stream_in_the_block_of_a_trace(is_lifted: bool, model: Model, plain: Tensor) -> None:
    def follow(tracer: Any) -> None:
        for _ in tracer.iter[:]:
            model.transformer.h[0].hidden += 0

    with torch.no_grad(), settings.changed(lift_blocks=is_lifted), model.trace(REPEATING):
        hidden = model.transformer.h[0].hidden
        items = list(stream_of(model, run=follow))
        later = model.transformer.h[1].hidden
    assert has_ended_with(items, plain)
    assert hidden.shape == later.shape


def test_a_forgotten_stream_is_closed_wherever_the_collector_runs(
    net: Any, model: Model, plain: Tensor
) -> None:
    before = state_of(net)
    circle: list[Any] = [iter(stream_of(model, capture=None))]
    next(circle[0])
    circle.append(circle)
    del circle
    assert state_of(net) != before

    def collect(_: Tensor) -> None:
        gc.collect()

    items = list(stream_of(model, edits=[(H0, collect)]))
    assert has_ended_with(items, plain)
    assert state_of(net) == before


def test_streams_in_threads(model: Model, plain: Tensor) -> None:
    right: list[bool] = []

    def go() -> None:
        for _ in range(5):
            right.append(has_ended_with(list(stream_of(model)), plain))

    threads = [threading.Thread(target=go) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert right == [True] * 15


def test_a_stream_may_be_handed_to_another_thread(model: Model, plain: Tensor) -> None:
    items = iter(stream_of(model))
    got = [next(items)]
    thread = threading.Thread(target=lambda: got.extend(items))
    thread.start()
    thread.join()
    assert has_ended_with(got, plain)


def test_a_stream_cannot_ask_itself(model: Model) -> None:
    caught: list[str] = []
    streams: list[Any] = []

    def ask(tracer: Any) -> None:
        model.transformer.h[0].hidden.sum()
        for act in (lambda: next(streams[1]), streams[0].close):
            with pytest.raises(StreamError) as error:
                act()
            caught.append(str(error.value))

    streams.append(stream_of(model, run=ask))
    streams.append(iter(streams[0]))
    assert len(list(streams[1])) == NEW
    assert len(caught) == 2


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_process_leaves_the_stream_to_its_parent(model: Model, plain: Tensor) -> None:
    items = iter(stream_of(model))
    got = [next(items)]
    child = os.fork()
    if not child:
        try:
            next(items)
        except StreamError:
            del items
            os._exit(7)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    got.extend(items)
    assert has_ended_with(got, plain)


# -- the state of the thread ----------------------------------------------------------------------


VARIABLE: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="unset")


def test_the_model_runs_under_the_state_in_which_the_stream_was_made(model: Model) -> None:
    seen: list[tuple[Any, ...]] = []

    def look(_: Tensor) -> None:
        made = torch.empty(1)
        seen.append((torch.is_autocast_enabled("cpu"), VARIABLE.get(), made.device.type))

    token = VARIABLE.set("here")
    with torch.autocast("cpu", torch.bfloat16), torch.device("cpu"):
        stream = stream_of(model, edits=[(H0, look)])
    VARIABLE.reset(token)
    for _ in stream:
        assert not torch.is_autocast_enabled("cpu")
        assert torch.is_grad_enabled()
    assert seen == [(True, "here", "cpu")] * NEW


def test_in_inference_mode_too(model: Model, plain: Tensor) -> None:
    with torch.inference_mode():
        stream = stream_of(model)
        kept, items = [], []
        for item in stream:
            kept.append(stream.cache[H0][-1].hidden.clone())
            items.append(item)
    assert has_ended_with(items, plain)
    assert all(
        torch.equal(one, entry.hidden) for one, entry in zip(kept, stream.cache[H0], strict=True)
    )


@pytest.mark.filterwarnings("ignore:.*was compiled by torch")
def test_between_two_items_what_is_compiled_runs_compiled(plain: Tensor) -> None:
    net: Any = make("gpt2")[0]
    net.compile(backend="eager")
    model = Model(net)
    ran: list[str] = []

    def backend(graph: Any, _: Any) -> Any:
        ran.append("compiled")
        return graph.forward

    other = torch.compile(lambda x: x + 1, backend=backend)
    streams = [stream_of(model, capture=H0), stream_of(model, capture=H0)]
    got = []
    for one, _ in zip(*streams, strict=True):
        other(torch.ones(len(got) + 2))
        got.append(one)
    assert ran
    assert has_ended_with(got, plain)
    assert [len(each.cache[H0]) for each in streams] == [NEW, NEW]
    from torch._dynamo import eval_frame

    assert eval_frame._stance.stance == "default"


def test_a_stream_that_is_left_tells_nothing_more(net: Any) -> None:
    class Bytes:
        pad_token_id = 0

        def decode(self, ids: list[int], **_: Any) -> str:
            return "\N{REPLACEMENT CHARACTER}" * len(ids)

        def convert_ids_to_tokens(self, _: int) -> str:
            return "?"

    model = LanguageModel(net, tokenizer=Bytes())
    options: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False}
    held = "\N{REPLACEMENT CHARACTER}" * 3
    assert list(model.generate_stream([11], **options)) == ["", "", "", held]
    stream = model.generate_stream([11], **options)
    items = iter(stream)
    assert next(items) == ""
    stream.close()
    assert list(items) == []


def test_a_text_that_cannot_be_decoded_closes_the_stream(net: Any) -> None:
    class Broken:
        pad_token_id = 0

        def decode(self, *_: Any, **__: Any) -> str:
            raise ZeroDivisionError

    before = state_of(net)
    model = LanguageModel(net, tokenizer=Broken())
    items = iter(model.generate_stream([11], max_new_tokens=3))
    with pytest.raises(ZeroDivisionError):
        next(items)
    assert state_of(net) == before
    assert list(items) == []
