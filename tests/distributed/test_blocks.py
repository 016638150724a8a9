"""The same blocks on every transport, each held against the run of this process, bit by bit."""

from __future__ import annotations

import threading
import traceback
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.distributed.helpers import OddError, doubled
from tracekit import LanguageModel, Model
from tracekit.distributed import ModelHost
from tracekit.errors import (
    CaptureError,
    OtherModelError,
    RemoteError,
    TimeLimitError,
    UnsendableError,
)

EIFFEL = "The Eiffel Tower is in the city of"
BEN = "The Big Ben is in"


def assert_same(here: Any, there: Any) -> None:
    """Equal values of equal types, tensors bit by bit."""
    assert type(here) is type(there)
    if isinstance(here, Tensor):
        assert there.device.type == "cpu" and torch.equal(here, there)
    elif isinstance(here, dict):
        assert list(here) == list(there)
        for key, value in here.items():
            assert_same(value, there[key])
    elif isinstance(here, (list, tuple)):
        assert len(here) == len(there)
        for one, other in zip(here, there, strict=True):
            assert_same(one, other)
    else:
        assert here == there


def on_both(program: Callable[..., Any], host: ModelHost) -> Any:
    """What a program gives here and on the host, which must be the same."""
    there = program(on=host)
    assert_same(program(), there)
    return there


def test_what_a_block_reads_comes_back(model: LanguageModel, host: ModelHost) -> None:
    def program(**on: Any) -> Any:
        with model.trace(EIFFEL, **on) as tracer:
            first = model.transformer.h[0].output
            late = model.transformer.h[3].mlp.output.save()
            logits = tracer.result.logits
        return first, late, logits

    on_both(program, host)


def test_edits_are_made_and_values_from_around_the_block_go_along(
    model: LanguageModel, host: ModelHost
) -> None:
    direction = torch.randn(128, generator=torch.Generator().manual_seed(0)).t()
    layer = model.transformer.h[1]
    scale = 3.5

    def program(**on: Any) -> Any:
        with model.trace(EIFFEL, **on):
            layer.output[:] += scale * direction
            model.transformer.h[2].mlp.output = doubled(model.transformer.h[2].mlp.output)
            logits = model.lm_head.output
        return logits

    edited = on_both(program, host)
    assert not torch.equal(edited, model(EIFFEL).logits)


def test_a_cache_comes_back_whole(model: LanguageModel, host: ModelHost) -> None:
    def program(**on: Any) -> Any:
        with model.trace(EIFFEL, **on) as tracer:
            cache = tracer.cache("transformer.h.*.mlp", include_inputs=True)
            named = tracer.cache(names="resid_post")
        values = {path: (entry.output, entry.input) for path, entry in cache.items()}
        return values, {name: named[name] for name in named}

    values, named = on_both(program, host)
    assert len(values) == 4 and len(named) == 4


def test_each_step_of_a_generation_is_seen(model: LanguageModel, host: ModelHost) -> None:
    def program(**on: Any) -> Any:
        with model.generate(EIFFEL, max_new_tokens=4, **on) as tracer:
            cache = tracer.cache("transformer.h.0")
            chosen = []
            for step in tracer.iter[:]:
                chosen.append((step, model.lm_head.output[:, -1].argmax(-1)))
            tokens = tracer.result
        return chosen, tokens, cache.sequence("transformer.h.0").as_subclass(Tensor)

    chosen, _, _ = on_both(program, host)
    assert len(chosen) == 4


def test_each_invoke_sees_its_rows(model: LanguageModel, host: ModelHost) -> None:
    def program(**on: Any) -> Any:
        with model.trace(**on) as tracer:
            with tracer.invoke(EIFFEL):
                hidden = model.transformer.h[1].output[:, -1]
            with tracer.invoke(BEN):
                model.transformer.h[1].output[:, -1] = hidden
                patched = model.lm_head.output
        return hidden, patched

    on_both(program, host)


def test_gradients_are_taken_in_the_block(model: LanguageModel, host: ModelHost) -> None:
    def program(**on: Any) -> Any:
        probe = torch.ones(128, requires_grad=True)
        with model.trace(EIFFEL, **on):
            hidden = model.transformer.h[2].output
            loss = (model.lm_head.output[:, -1] ** 2).sum() + (hidden * probe).sum()
            with loss.backward():
                gradient = hidden.grad
        return gradient, probe.grad

    _, of_probe = on_both(program, host)
    assert of_probe is not None


@dataclass
class Notes:
    """A user's own object."""

    seen: list[Tensor] = field(default_factory=list)
    count: int = 0


def test_containers_that_the_block_changes_change_here(
    model: LanguageModel, host: ModelHost
) -> None:
    def program(**on: Any) -> Any:
        acts: list[Tensor] = []
        by_layer: dict[int, list[Tensor]] = defaultdict(list)
        total = torch.zeros(128)
        notes = Notes()
        untouched = {"a": [1]}
        inner = untouched["a"]
        same = acts
        before = total
        with model.trace(EIFFEL, **on):
            for layer in range(3):
                hidden = model.transformer.h[layer].output
                acts.append(hidden)
                by_layer[layer].append(hidden.mean())
                total += hidden[0, -1]
                notes.seen.append(hidden[0, 0])
                notes.count += 1
            is_one = untouched["a"] is inner and same is acts
            again = acts
        assert is_one
        assert again is acts and same is acts and total is before and untouched["a"] is inner
        return acts, dict(by_layer), total, notes.seen, notes.count, untouched

    on_both(program, host)


def test_names_that_the_block_unbinds_are_unbound(model: LanguageModel, host: ModelHost) -> None:
    spent = 1
    kept = 2
    with model.trace(EIFFEL, on=host):
        found = model.lm_head.output.argmax(-1)[0, -1].item() + spent
        if found < 0:
            del kept
        try:
            raise ValueError("of the block")
        except ValueError as error:
            told = str(error)
    assert told == "of the block" and kept == 2
    assert found == model(EIFFEL).logits[0, -1].argmax().item() + 1
    with pytest.raises(NameError):
        error  # noqa: F821 - it is gone behind its handler, as in Python


def test_functions_and_classes_of_the_block_s_own_scope_go_along_as_text(
    model: LanguageModel, host: ModelHost
) -> None:
    power = 2

    def raised(value: Tensor) -> Tensor:
        return value**power

    class Scale:
        by = 3

        def __call__(self, value: Tensor) -> Tensor:
            return raised(value) * self.by

    def program(**on: Any) -> Any:
        scale = Scale()
        nearby = lambda value: raised(value) + 1  # noqa: E731 - a lambda is what is tested
        with model.trace(EIFFEL, **on):
            hidden = nearby(scale(model.transformer.h[0].output))
        return hidden

    on_both(program, host)


def test_a_function_in_the_place_of_a_block(model: LanguageModel, host: ModelHost) -> None:
    def program(**on: Any) -> Any:
        return model.trace(EIFFEL, **on).run(lambda: model.transformer.h[0].output + 1)

    on_both(program, host)


def test_calls_without_a_block_run_there(model: LanguageModel, host: ModelHost) -> None:
    tokens = host.generate(EIFFEL, max_new_tokens=3)
    assert_same(model.generate(EIFFEL, max_new_tokens=3), tokens)
    logits, cache = host.run(lambda it, text: it.run_with_cache(text), EIFFEL)
    expected, _ = model.run_with_cache(EIFFEL)
    assert_same(expected.detach(), logits)
    assert ("resid_post", 3) in cache


def test_a_user_without_the_weights_traces_the_host_s_model(
    model: LanguageModel, host: ModelHost
) -> None:
    there = host.model
    assert all(weight.is_meta for weight in there.module.parameters())
    with host.trace(EIFFEL):
        short = host.model.lm_head.output
    with there.trace(EIFFEL, on=host):
        long = there.transformer.h[2].output
    assert_same(model(EIFFEL).logits.detach(), short.detach())
    assert long.shape == (1, 9, 128)


def test_a_model_that_was_not_loaded_stands_for_the_host_s(
    model: LanguageModel, host: ModelHost
) -> None:
    empty = LanguageModel("tracekit/tiny", dispatch=False)
    with empty.trace(EIFFEL, on=host):
        logits = empty.lm_head.output
    assert_same(model(EIFFEL).logits.detach(), logits)
    assert all(weight.is_meta for weight in empty.module.parameters())


def test_torch_modes_of_the_user_hold_there(model: LanguageModel, host: ModelHost) -> None:
    with torch.no_grad(), model.trace(EIFFEL, on=host):
        needs = model.lm_head.output.requires_grad
    with model.trace(EIFFEL, on=host):
        needs_with = model.lm_head.output.requires_grad
    assert (needs, needs_with) == (False, True)


def test_a_verified_trace_binds_what_it_reads(model: LanguageModel, host: ModelHost) -> None:
    def program(**on: Any) -> Any:
        with model.trace(EIFFEL, verify=True, **on):
            model.transformer.h[1].output[:] = 0
            logits = model.lm_head.output
        return logits

    on_both(program, host)


# -- what goes wrong ------------------------------------------------------------------------------


def line_of(marker: str) -> int:
    """The number of the line of this file that ends in a comment."""
    lines = Path(__file__).read_text("utf-8").splitlines()
    return next(number for number, line in enumerate(lines, 1) if line.endswith(f"# {marker}"))


def test_an_error_shows_the_user_s_own_line_and_loses_nothing(
    model: LanguageModel, host: ModelHost
) -> None:
    hidden = None
    acts: list[Tensor] = []
    with pytest.raises(ZeroDivisionError) as caught, model.trace(EIFFEL, on=host):
        hidden = model.transformer.h[0].output
        acts.append(hidden)
        len(acts) / (len(acts) - 1)  # the faulty line
    text = "".join(traceback.format_exception(caught.value))
    assert f'{__file__}", line {line_of("the faulty line")}, in test_an_error' in text
    assert "len(acts) / (len(acts) - 1)  # the faulty line" in text
    assert "tracekit/" not in text.replace(str(Path(__file__).parent), "")
    assert hidden is not None and acts[0] is hidden
    with model.trace(EIFFEL, on=host):
        logits = model.lm_head.output
    assert_same(model(EIFFEL).logits.detach(), logits.detach())


def test_an_error_in_a_function_of_the_user_shows_its_line(
    model: LanguageModel, host: ModelHost
) -> None:
    def deep(value: Tensor) -> Tensor:
        raise OddError(1, 2) from KeyError("why")  # the deep line

    with pytest.raises(OddError, match="1 and 2") as caught, model.trace(EIFFEL, on=host):
        deep(model.transformer.h[0].output)
    lines = traceback.extract_tb(caught.value.__traceback__)
    assert lines[-1].lineno == line_of("the deep line") and lines[-1].name == "deep"
    assert caught.value.two == 2 and isinstance(caught.value.__cause__, (KeyError, RemoteError))


def test_an_error_of_tracekit_comes_back_as_itself(model: LanguageModel, host: ModelHost) -> None:
    from tracekit.errors import SiteOrderError

    with pytest.raises(SiteOrderError), model.trace(EIFFEL, on=host):
        late = model.transformer.h[3].output
        late + model.transformer.h[0].output


def test_an_error_in_the_input_is_told_at_the_with(model: LanguageModel, host: ModelHost) -> None:
    from tracekit.errors import InputError

    with pytest.raises(InputError), model.trace(EIFFEL, num_beams=3, on=host):
        model.lm_head.output


def test_an_endless_loop_ends_at_its_time_limit(model: LanguageModel, host: ModelHost) -> None:
    count = 0
    with pytest.raises(TimeLimitError) as caught, model.trace(EIFFEL, on=host.within(1)):
        hidden = model.transformer.h[0].output
        while True:
            count += 1
    assert hidden.shape == (1, 9, 128) and count > 0
    lines = traceback.extract_tb(caught.value.__traceback__)
    assert lines[-1].filename == __file__
    with model.trace(EIFFEL, on=host):
        logits = model.lm_head.output
    assert_same(model(EIFFEL).logits.detach(), logits.detach())


def test_a_value_that_can_not_be_sent_is_named(model: LanguageModel, host: ModelHost) -> None:
    guard = threading.Lock()
    with pytest.raises(UnsendableError, match="'guard', a lock"), model.trace(EIFFEL, on=host):
        with guard:
            model.lm_head.output


def test_a_value_that_can_not_come_back_says_so_when_it_is_used(
    model: LanguageModel, host: ModelHost
) -> None:
    with model.trace(EIFFEL, on=host):
        numbers = (each for each in range(3))
        logits = model.lm_head.output
    assert logits.shape == (1, 9, 356)
    with pytest.raises(RemoteError, match="numbers stayed on the host"):
        list(numbers)


def test_a_big_result_comes_back(model: LanguageModel, host: ModelHost) -> None:
    with model.trace(EIFFEL, on=host):
        hidden = model.transformer.h[0].output
        big = hidden[0, 0, 0].detach() + torch.arange(17 * 2**20, dtype=torch.float32)
    assert big.nbytes > 2**26
    assert_same(hidden[0, 0, 0].detach() + torch.arange(17 * 2**20, dtype=torch.float32), big)


def test_another_model_is_refused(host: ModelHost) -> None:
    other = Model(torch.nn.Sequential(torch.nn.Linear(2, 2)))
    with pytest.raises(OtherModelError, match=r"Sequential \(2 modules, 6 weights\)"):
        with other.trace(torch.ones(1, 2), on=host):
            other[0].output


def test_a_value_of_another_model_is_refused(model: LanguageModel, host: ModelHost) -> None:
    other = Model(torch.nn.Sequential(torch.nn.Linear(2, 2)))
    with pytest.raises(UnsendableError, match="'other'"), model.trace(EIFFEL, on=host):
        other[0].output


def test_a_block_without_source_is_refused_with_the_way_out(
    model: LanguageModel, host: ModelHost
) -> None:
    text = "with model.trace(x, on=host):\n    y = model.lm_head.output\n"
    with pytest.raises(CaptureError, match=r"run\(function\)"):
        exec(text, {"model": model, "x": EIFFEL, "host": host})


def test_a_model_with_lasting_edits_is_refused(model: LanguageModel, host: ModelHost) -> None:
    from tracekit.errors import UnsupportedError

    with model.edit() as edited:
        edited.transformer.h[0].output[:] = 0
    with pytest.raises(UnsupportedError, match="lasting edits"), edited.trace(EIFFEL, on=host):
        edited.lm_head.output


def test_two_traces_do_not_know_of_each_other(model: LanguageModel, host: ModelHost) -> None:
    with model.trace(EIFFEL, on=host):
        first = model.transformer.h[0].output[0, 0, 0].item()
        model.transformer.h[1].output[:] = 0
    with pytest.raises(NameError), model.trace(EIFFEL, on=host):
        second  # noqa: F821 - of nobody
    with model.trace(EIFFEL, on=host):
        second = model.lm_head.output
    assert_same(model(EIFFEL).logits.detach(), second.detach())
    assert isinstance(first, float)
