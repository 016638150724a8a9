"""A generation that a host streams, on every transport, against the stream of this process."""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.distributed.test_blocks import assert_same
from tracekit import LanguageModel
from tracekit.distributed import ModelHost, SocketHost
from tracekit.errors import StreamError, TimeLimitError, UnknownPathError

EIFFEL = "The Eiffel Tower is in the city of"
MODULE = "transformer.h.1"


def recorded(cache: Any) -> list[Tensor]:
    return [each.output.as_subclass(Tensor) for each in cache[MODULE]]


def test_items_cache_and_result_are_those_of_the_local_stream(
    model: LanguageModel, host: ModelHost
) -> None:
    here = model.generate_stream(EIFFEL, max_new_tokens=5, capture=MODULE)
    there = model.generate_stream(EIFFEL, max_new_tokens=5, capture=MODULE, on=host)
    assert_same(list(here), list(there))
    assert_same(here.result, there.result)
    assert_same(recorded(here.cache), recorded(there.cache))
    assert len(recorded(there.cache)) == 5 and there.value is None


def test_ids_of_several_rows_come_as_tensors(model: LanguageModel, host: ModelHost) -> None:
    given: Any = {"max_new_tokens": 4, "return_type": "tokens"}
    prompts = [EIFFEL, "The Big Ben is in"]
    there = list(host.generate_stream(prompts, **given))
    assert_same(list(model.generate_stream(prompts, **given)), there)
    assert len(there) == 4 and there[0].shape == (2, 1)


def test_edits_and_a_function_beside_the_steps_run_there(
    model: LanguageModel, host: ModelHost
) -> None:
    def program(**on: Any) -> Any:
        seen: list[Tensor] = []

        def beside(tracer: Any) -> int:
            for _ in tracer.iter[:]:
                seen.append(model.transformer.h[2].output[:, -1])
            return len(seen)

        edits = [(MODULE, lambda hidden: hidden * 0.5)]
        found = model.generate_stream(EIFFEL, max_new_tokens=3, edits=edits, run=beside, **on)
        return list(found), found.value, seen

    there = program(on=host)
    assert_same(program(), there)
    assert there[1] == 3


def test_an_item_comes_while_the_host_goes_on(model: LanguageModel, host: ModelHost) -> None:
    found = model.generate_stream(EIFFEL, max_new_tokens=3, capture=MODULE, on=host)
    items = iter(found)
    first = next(items)
    with pytest.raises(StreamError, match="comes with the end of the stream"):
        found.cache
    with pytest.raises(StreamError, match="the host is at work on a stream"):
        model.generate(EIFFEL, max_new_tokens=1, on=host)
    assert_same(list(model.generate_stream(EIFFEL, max_new_tokens=3)), [first, *items])
    assert len(recorded(found.cache)) == 3


def test_a_loop_that_is_left_stops_the_host_and_leaves_it_free(
    model: LanguageModel, host: ModelHost
) -> None:
    found = model.generate_stream(EIFFEL, max_new_tokens=100, capture=MODULE, on=host)
    with found:
        for _ in found:
            break
    assert 1 <= len(recorded(found.cache)) < 100
    with pytest.raises(StreamError, match="left before"):
        found.result
    with model.trace(EIFFEL, on=host):
        logits = model.lm_head.output
    assert_same(model(EIFFEL).logits.detach(), logits.detach())


def test_a_stream_that_is_dropped_leaves_the_host_free(
    model: LanguageModel, host: ModelHost
) -> None:
    for _ in host.generate_stream(EIFFEL, max_new_tokens=100):
        break
    assert_same(
        list(model.generate_stream(EIFFEL, max_new_tokens=2)),
        list(host.generate_stream(EIFFEL, max_new_tokens=2)),
    )


def line_of(marker: str) -> int:
    """The number of the line of this file that ends in a comment."""
    lines = Path(__file__).read_text("utf-8").splitlines()
    return next(number for number, line in enumerate(lines, 1) if line.endswith(f"# {marker}"))


def test_an_error_is_raised_at_the_line_of_the_loop(model: LanguageModel, host: ModelHost) -> None:
    def beside(tracer: Any) -> None:
        for step in tracer.iter[:]:
            model.transformer.h[0].output / (1 - step) if step < 1 else 1 // 0  # the faulty line

    items: list[str] = []
    found = model.generate_stream(EIFFEL, max_new_tokens=4, run=beside, on=host)
    with pytest.raises(ZeroDivisionError) as caught:
        for text in found:  # the loop
            items.append(text)
    text = "".join(traceback.format_exception(caught.value))
    own = {line_of("the loop"), line_of("the faulty line")}
    told = {each.lineno for each in traceback.extract_tb(caught.value.__traceback__)}
    assert own <= told
    assert "tracekit/" not in text.replace(str(Path(__file__).parent), "")
    assert len(items) == 1
    assert len(list(host.generate_stream(EIFFEL, max_new_tokens=2))) == 2


def test_what_the_host_refuses_is_told_at_the_loop(model: LanguageModel, host: ModelHost) -> None:
    with pytest.raises(UnknownPathError):
        list(model.generate_stream(EIFFEL, max_new_tokens=2, capture="transformer.x", on=host))


def test_a_time_limit_ends_a_stream(model: LanguageModel, host: ModelHost) -> None:
    def endless() -> None:
        model.transformer.h[0].output
        while True:
            pass

    with pytest.raises(TimeLimitError):
        list(model.generate_stream(EIFFEL, max_new_tokens=2, run=endless, on=host.within(1)))
    assert len(list(host.generate_stream(EIFFEL, max_new_tokens=2))) == 2


def test_prints_come_between_the_items(
    model: LanguageModel, host: ModelHost, capsys: pytest.CaptureFixture[str]
) -> None:
    if not isinstance(host, SocketHost):
        pytest.skip("prints of this process, or in the log of Ray")

    def beside(tracer: Any) -> None:
        for step in tracer.iter[:]:
            model.lm_head.output
            print("step", step)

    found = model.generate_stream(EIFFEL, max_new_tokens=2, run=beside, on=host)
    for number, _ in enumerate(found):
        print("item", number)
    assert capsys.readouterr().out == "step 0\nitem 0\nstep 1\nitem 1\n"


def test_the_modes_of_the_place_where_it_was_made_hold_there(
    model: LanguageModel, host: ModelHost
) -> None:
    with torch.inference_mode():
        found = host.generate_stream(EIFFEL, max_new_tokens=2, run=torch.is_inference_mode_enabled)
    list(found)
    assert found.value is True
