"""Edits by position: each token once, the same whichever way keys and values are kept."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn

from tests.tiny_models import IS_TRANSFORMERS_5, make
from tests.tracing.plain import changing
from tracekit import Model, settings
from tracekit.errors import (
    InputError,
    MisfitError,
    NeverRanError,
    SiteOrderError,
    UnsupportedError,
)
from tracekit.tracing.positions import Chosen

IDS = make("gpt2")[1]["input_ids"]  # two rows of eight
PROMPT, NEW, WIDTH = 8, 5, 32
RAN = PROMPT + NEW - 1  # the last new token is never run
V = torch.randn(WIDTH, generator=torch.Generator().manual_seed(3))
WAYS: dict[str, dict[str, Any]] = {
    "kv_cache": {},
    "no kv_cache": {"use_cache": False},
    "static kv_cache": {"cache_implementation": "static"},
    "chunks": {"prefill_chunk_size": 3},
}
REPORT = {"output_logits": True, "return_dict_in_generate": True}
STEPS = {"max_new_tokens": NEW, "do_sample": False, **REPORT}
POSITIONS: list[tuple[Any, list[int]]] = [
    ("prompt", [*range(PROMPT)]),
    ("generated", [*range(PROMPT, RAN)]),
    ("all", [*range(RAN)]),
    (3, [3]),
    (-1, [PROMPT - 1]),
    ([0, 7, 9], [0, 7, 9]),
    ([9, -2], [6, 9]),
    (range(2, 5), [2, 3, 4]),
    (torch.tensor([1, 10]), [1, 10]),
    (slice(2, 10), [*range(2, 10)]),
    (slice(-3, None), [*range(5, RAN)]),
    (slice(None, -6), [0, 1]),
    (slice(1, None, 4), [1, 5, 9]),
]


pytestmark = pytest.mark.usefixtures("without_gradients")


@pytest.fixture(scope="module")
def net() -> Any:
    return make("gpt2", initializer_range=0.2)[0]  # so that logits depend on all tokens


@pytest.fixture(scope="module")
def model(net: nn.Module) -> Model:
    return Model(net)


def logits(generated: Any) -> Tensor:
    """`[steps, rows, words]`: the tokens of a random model hardly depend on anything."""
    return torch.stack(generated.logits)


def hidden_changed(net: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A plain hook on block 0, which returns a tuple before transformers 5."""

    def changed(output: Any) -> Any:
        return change(output) if isinstance(output, Tensor) else (change(output[0]), *output[1:])

    return changing(net.transformer.h[0], changed)


def by_hand(
    net: Any, columns: list[int], change: Callable[[Tensor, int], Tensor], **options: Any
) -> Tensor:
    """The logits with `change(value, place)` made to what block 0 gives at these columns.

    Where keys and values are kept, so that each column comes once, in order.
    """
    following = iter(range(RAN))

    def changed(hidden: Tensor) -> Tensor:
        hidden = hidden.clone()
        for index in range(hidden.shape[1]):
            column = next(following)
            if column in columns:
                hidden[:, index] = change(hidden[:, index], columns.index(column))
        return hidden

    with hidden_changed(net, changed):
        return logits(net.generate(**{"input_ids": IDS, **STEPS, **options}))


def last_changed(hidden: Tensor) -> Tensor:
    """What a hook makes of the last position of a forward."""
    return torch.cat([hidden[:, :-1], hidden[:, -1:] + V], 1)


def assert_same(found: Any, expected: Tensor) -> None:
    torch.testing.assert_close(logits(found), expected, atol=1e-4, rtol=1e-4)


# -- which positions ------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("positions", "columns"), POSITIONS, ids=[str(p) for p, _ in POSITIONS])
def test_each_chosen_token_is_edited_once(
    positions: Any, columns: list[int], way: str, net: Any, model: Model
) -> None:
    expected = by_hand(net, columns, lambda value, _: value + V)
    with model.generate(IDS, **STEPS, **WAYS[way]) as tracer:
        model.transformer.h[0].output.at(positions)[:] += V
        result = tracer.result
    assert_same(result, expected)
    plain = logits(net.generate(IDS, **STEPS))
    assert not torch.allclose(expected, plain, atol=1e-2)


def test_the_last_position_of_each_step_is_another_thing_without_kv_cache(
    net: Any, model: Model
) -> None:
    """Kept: every token from the prompt's last on. Not kept: in each step one token alone."""
    every = by_hand(net, [*range(PROMPT - 1, RAN)], lambda value, _: value + V)
    found: dict[bool, Any] = {}
    for is_kept in (True, False):
        with model.generate(IDS, **STEPS, use_cache=is_kept) as tracer:
            for _ in tracer.iter[:]:
                model.transformer.h[0].hidden[:, -1] += V
            found[is_kept] = tracer.result

    with hidden_changed(net, last_changed):
        alone = logits(net.generate(IDS, **STEPS, use_cache=False))
    assert_same(found[True], every)
    assert_same(found[False], alone)
    assert torch.allclose(alone[0], every[0], atol=1e-5)
    assert not torch.allclose(alone[1:], every[1:], atol=1e-2)
    for is_kept in (True, False):
        with model.generate(IDS, **STEPS, use_cache=is_kept) as tracer:
            model.transformer.h[0].output.at(slice(-1, None))[:] += V
            result = tracer.result
        assert_same(result, every)


# -- what is done to them -------------------------------------------------------------------------


def add(at: Any) -> None:
    at[:] += V


def subtract(at: Any) -> None:
    at[...] -= V


def multiply(at: Any) -> None:
    at[:] *= 2


def divide(at: Any) -> None:
    at[:] /= 4.0


def set_to_a_number(at: Any) -> None:
    at[:] = 0.5


def set_to_a_vector(at: Any) -> None:
    at[:] = V


def set_to_one_value_for_each(at: Any) -> None:
    at[:] = V * torch.arange(1, 4)[None, :, None]


def add_one_value_for_each(at: Any) -> None:
    at[:] += V * torch.arange(1, 4)[None, :, None]


def double_one_feature(at: Any) -> None:
    at[..., 3] *= 2


def clear_some_features(at: Any) -> None:
    at[:, :, 4:9] = 0


def return_another(at: Any) -> None:
    at.edit(lambda value: value.flip(-1))


def change_in_place(at: Any) -> None:
    def triple(value: Tensor) -> None:
        value.mul_(3)

    at.edit(triple)


def change_nothing(at: Any) -> None:
    at.edit(lambda value: None)


def with_features(value: Tensor, chosen: Any, new: Callable[[Tensor], Any]) -> Tensor:
    value = value.clone()
    value[:, chosen] = new(value[:, chosen])
    return value


OPERATIONS: list[tuple[Callable[[Any], None], Callable[[Tensor, int], Tensor]]] = [
    (add, lambda value, _: value + V),
    (subtract, lambda value, _: value - V),
    (multiply, lambda value, _: value * 2),
    (divide, lambda value, _: value / 4),
    (set_to_a_number, lambda value, _: torch.full_like(value, 0.5)),
    (set_to_a_vector, lambda value, _: V.expand_as(value)),
    (set_to_one_value_for_each, lambda value, place: (V * (place + 1)).expand_as(value)),
    (add_one_value_for_each, lambda value, place: value + V * (place + 1)),
    (double_one_feature, lambda value, _: with_features(value, 3, lambda one: one * 2)),
    (clear_some_features, lambda value, _: with_features(value, slice(4, 9), torch.zeros_like)),
    (return_another, lambda value, _: value.flip(-1)),
    (change_in_place, lambda value, _: value * 3),
    (change_nothing, lambda value, _: value),
]


@pytest.mark.usefixtures("each_way")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("edit", "change"), OPERATIONS, ids=[e.__name__ for e, _ in OPERATIONS])
def test_every_operation_is_what_a_plain_hook_does(
    edit: Callable[[Any], None],
    change: Callable[[Tensor, int], Tensor],
    way: str,
    net: Any,
    model: Model,
) -> None:
    columns = [2, 7, 9]
    with model.generate(IDS, **STEPS, **WAYS[way]) as tracer:
        edit(model.transformer.h[0].output.at(columns))
        cache = tracer.cache("transformer.h.*")
        result = tracer.result
    assert_same(result, by_hand(net, columns, change))
    assert cache.verify()


def test_a_tensor_may_have_a_value_for_every_row_and_new_token(net: Any, model: Model) -> None:
    values = torch.randn(2, NEW - 1, WIDTH)
    columns = [*range(PROMPT, RAN)]
    for options in WAYS.values():
        with model.generate(IDS, **STEPS, **options) as tracer:
            model.transformer.h[0].output.at("generated")[:] = values
            result = tracer.result
        assert_same(result, by_hand(net, columns, lambda _, place: values[:, place]))


def test_edits_at_one_site_are_made_in_order(net: Any, model: Model) -> None:
    with model.generate(IDS, **STEPS) as tracer:
        model.transformer.h[0].output.at("all")[:] += V
        model.transformer.h[0].output.at([9, 10])[:] *= 3
        model.transformer.h[0].output.at(10)[:] -= V
        result = tracer.result

    def change(value: Tensor, column: int) -> Tensor:
        value = (value + V) * (3 if column in (9, 10) else 1)
        return value - V if column == 10 else value

    assert_same(result, by_hand(net, [*range(RAN)], change))


# -- where ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_an_input_is_edited_before_the_module_has_it(way: str, net: Any, model: Model) -> None:
    with model.generate(IDS, **STEPS, **WAYS[way]) as tracer:
        model.transformer.h[1].input.at("generated")[:] += V
        cache = tracer.cache("transformer.h.1", include_inputs=True)
        result = tracer.result
    # what block 1 is given is what block 0 gives
    assert_same(result, by_hand(net, [*range(PROMPT, RAN)], lambda value, _: value + V))
    assert cache.verify()


def test_hidden_states_in_a_tuple_are_edited_there() -> None:
    module, inputs = make("gptj")
    model = Model(module)
    ids = inputs["input_ids"]

    def changed(output: Any) -> Any:
        return (output[0] + V, *output[1:])

    with changing(module.transformer.h[0], changed):
        expected = logits(module.generate(ids, **STEPS))
    for name in ("hidden", "output"):
        with model.generate(ids, **STEPS) as tracer:
            if name == "hidden":
                model.transformer.h[0].hidden.at("all")[:] += V
            else:
                model.transformer.h[0].output.at("all")[:] += V
            result = tracer.result
        assert_same(result, expected)


def test_a_plain_trace_has_positions_too(net: Any, model: Model) -> None:
    with hidden_changed(net, lambda value: torch.cat([value[:, :3], value[:, 3:] + V], 1)):
        expected = net(IDS).logits
    with model.trace(IDS) as tracer:
        model.transformer.h[0].output.at(slice(3, None))[:] += V
        result = tracer.result
    assert torch.equal(result.logits, expected)


def test_rows_of_an_invoke_are_edited_alone(net: Any, model: Model) -> None:
    with model.generate(**STEPS) as tracer:
        with tracer.invoke(IDS[:1]):
            model.transformer.h[0].output.at("generated")[:] += V
        with tracer.invoke(IDS[1:]):
            model.transformer.h[0].output.at("prompt")[:] *= 2
        with tracer.invoke():
            result = tracer.result
    first = by_hand(net, [*range(PROMPT, RAN)], lambda value, _: value + V)
    second = by_hand(net, [*range(PROMPT)], lambda value, _: value * 2)
    assert_same(result, torch.stack([first[:, 0], second[:, 1]], 1))


def test_positions_count_the_tokens_of_a_row_and_never_padding(net: Any, model: Model) -> None:
    ids = torch.cat([torch.zeros(2, 3, dtype=torch.long), IDS], 1)
    ids[0, :3] = torch.tensor([41, 42, 43])
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    for positions in ("all", "prompt", 0, [2, -1], slice(1, 4), slice(-2, None), "generated"):
        for way, options in WAYS.items():
            with model.generate(ids, attention_mask=mask, **STEPS, **options) as tracer:
                model.transformer.h[0].output.at(positions)[:] += V
                cache = tracer.cache("transformer.h.*")
                result = logits(tracer.result)
            if way == "chunks" and not IS_TRANSFORMERS_5:  # which counts padding there
                assert not cache.verify()
                continue
            assert cache.verify()
            for row, own in enumerate((ids[:1], IDS[1:])):
                with model.generate(own, **STEPS) as tracer:
                    model.transformer.h[0].output.at(positions)[:] += V
                    alone = tracer.result
                assert_same(alone, result[:, row : row + 1])


def test_lasting_edits_hold_positions_in_every_run(net: Any, model: Model) -> None:
    expected = by_hand(net, [*range(PROMPT, RAN)], lambda value, _: value + V)
    with model.edit() as steered:
        steered.transformer.h[0].output.at("generated")[:] += V
    for options in WAYS.values():
        assert_same(steered.generate(IDS, **STEPS, **options), expected)
        with steered.generate(IDS, **STEPS, **options) as tracer:
            cache = tracer.cache("transformer.h.*")
            result = tracer.result
        assert_same(result, expected)
        assert cache.verify()
    assert_same(model.generate(IDS, **STEPS), logits(net.generate(IDS, **STEPS)))


def test_edits_may_be_declared(net: Any, model: Model) -> None:
    at = model.transformer.h[0].output.at(-1)
    outcome = model.run(IDS, edits=[(at, lambda value: value + V)])
    with hidden_changed(net, last_changed):
        expected = net(IDS).logits
    assert torch.equal(outcome.result.logits, expected)


def test_threads_do_not_share_their_edits(net: Any, model: Model) -> None:
    expected = {
        column: by_hand(net, [column], lambda value, _: value + V) for column in range(6, RAN)
    }
    found: dict[int, Any] = {}

    def run(column: int) -> None:
        with torch.no_grad(), model.generate(IDS, **STEPS) as tracer:
            model.transformer.h[0].output.at(column)[:] += V
            found[column] = tracer.result

    threads = [threading.Thread(target=run, args=(column,)) for column in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for column, logits_of_one in expected.items():
        assert_same(found[column], logits_of_one)


# -- what can't be ---------------------------------------------------------------------------------


def test_positions_that_never_come_are_an_error(model: Model) -> None:
    for positions in (RAN, [50], slice(RAN, None), -PROMPT - 1):
        with pytest.raises(NeverRanError, match="was never made: no forward"):
            with model.generate(IDS, **STEPS):
                model.transformer.h[0].output.at(positions)[:] += V


def test_an_edit_that_comes_too_late_is_an_error(model: Model) -> None:
    with pytest.raises(SiteOrderError, match=r"transformer\.h\.0.*tokens would be missed"):
        with model.generate(IDS, **STEPS):
            model.transformer.h[1].output
            model.transformer.h[0].output.at("all")[:] += V
    with pytest.raises(SiteOrderError, match="outside of any loop over steps"):
        with model.generate(IDS, **STEPS) as tracer:
            for _ in tracer.iter[:]:
                model.transformer.h[0].output
                model.transformer.h[1].output.at("all")[:] += V


@pytest.mark.parametrize(
    "positions",
    [
        "prompts",
        "",
        [],
        True,
        1.5,
        None,
        [1, 2.5],
        [True],
        slice(4, 1, -1),
        {1},
        numpy.array([1, 2]),
    ],
)
def test_what_names_no_positions_is_refused(positions: Any, model: Model) -> None:
    with pytest.raises(InputError, match="positions are 'prompt'"):
        model.transformer.h[0].output.at(positions)


def misfits() -> list[tuple[str, Callable[[Any], None], type[Exception], str]]:
    def set_text(at: Any) -> None:
        at[:] = "nothing"

    def set_too_many(at: Any) -> None:
        at[:] = torch.zeros(1, 3, WIDTH)

    def set_a_row(at: Any) -> None:
        at[0] += 1

    return [
        ("shape", lambda at: at.edit(lambda value: value[:, :, :3]), MisfitError, "keep shape"),
        ("dtype", lambda at: at.edit(lambda value: value.double()), MisfitError, "keep shape"),
        ("kind", lambda at: at.edit(lambda value: 3), MisfitError, "keep shape"),
        ("no function", lambda at: at.edit(V), InputError, "takes a function"),
        ("text", set_text, InputError, "a tensor or a number"),
        ("other count", set_too_many, MisfitError, "axis 1 has to be as many, or 1"),
        ("one row", set_a_row, InputError, r"write \.at\(\.\.\.\)\[:\]"),
    ]


@pytest.mark.parametrize("kind", misfits(), ids=lambda kind: kind[0])
def test_what_does_not_fit_is_refused(kind: Any, model: Model) -> None:
    _, edit, error, words = kind
    with pytest.raises(error, match=words):
        with model.generate(IDS, **STEPS):
            edit(model.transformer.h[0].output.at([2, 9]))


def test_fewer_values_than_new_tokens_are_refused(model: Model) -> None:
    with pytest.raises(MisfitError, match="more positions than that"):
        with model.generate(IDS, **STEPS):
            model.transformer.h[0].output.at("generated")[:] = torch.zeros(1, NEW - 2, WIDTH)


def test_what_does_not_run_over_the_tokens_has_no_positions() -> None:
    module, inputs = make("t5")
    model = Model(module)
    with pytest.raises(UnsupportedError, match=r"outside of the decoder's forwards"):
        with model.generate(inputs["input_ids"], **STEPS):
            model.encoder.block[0].output.at("all")[:] += 1
    bias = model.decoder.block[0].layer[0].SelfAttention.relative_attention_bias
    with pytest.raises(UnsupportedError, match="it has no value for each position"):
        with model.generate(inputs["input_ids"], **STEPS):
            bias.output.at("all")[:] += 1


def test_in_place_blocks_are_told_the_same(model: Model) -> None:
    with settings.changed(lift_blocks=False):
        with pytest.raises(NeverRanError, match="was never made"):
            with model.generate(IDS, **STEPS):
                model.transformer.h[0].output.at(50)[:] += V


# -- what a stranger tried ------------------------------------------------------------------------


def padded_batch() -> dict[str, Tensor]:
    mask = torch.ones_like(IDS)
    mask[1, :3] = 0
    return {"input_ids": IDS, "attention_mask": mask}


@pytest.mark.parametrize("kind", ["positions", "rows and positions", "a feature"])
def test_what_is_written_is_laid_out_by_the_chosen_positions_and_not_by_columns(
    kind: str, net: Any, model: Model
) -> None:
    batch, values = padded_batch(), torch.randn(2, 3, WIDTH)
    block = model.transformer.h[0]
    with model.trace(**batch):
        if kind == "positions":
            block.hidden.at([2, 0, 4])[:] = values[0]
        elif kind == "rows and positions":
            block.hidden.at([2, 0, 4])[:] = values
        else:
            block.hidden.at([2, 0, 4])[..., 3] = values[..., 3]
        hidden = block.hidden.clone()
    with model.trace(**batch):
        expected = block.hidden.clone()
    for row, first in enumerate([0, 3]):
        for place, position in enumerate([2, 0, 4]):
            value = values[0 if kind == "positions" else row, place]
            if kind == "a feature":
                expected[row, first + position, 3] = value[3]
            else:
                expected[row, first + position] = value
    assert torch.equal(hidden, expected)


def test_a_feature_may_have_a_value_for_every_row_and_new_token(net: Any, model: Model) -> None:
    values = torch.randn(2, NEW - 1, WIDTH)
    wide = torch.zeros_like(values)
    wide[..., 5] = values[..., 5]
    for options in WAYS.values():
        with model.generate(IDS, **STEPS, **options) as tracer:
            model.transformer.h[0].output.at("generated")[..., 5] += values[..., 5]
            result = tracer.result
        columns = [*range(PROMPT, RAN)]
        assert_same(result, by_hand(net, columns, lambda value, place: value + wide[:, place]))


def test_values_for_rows_or_positions_have_to_say_which(model: Model) -> None:
    with (
        pytest.raises(MisfitError, match=r"each of 2 rows, or of 2 positions"),
        model.trace(IDS),
    ):
        model.transformer.h[0].output.at([0, 7])[:] = torch.randn(2, WIDTH)


def test_what_an_invoke_writes_has_its_rows(model: Model) -> None:
    values, seen = torch.randn(2, 3, WIDTH), []
    with model.trace() as tracer:
        with tracer.invoke(IDS[:1]):
            first = model.transformer.h[0].hidden.clone()
        with tracer.invoke(IDS):
            model.transformer.h[0].output.at([0, 1, 2])[:] = values
            model.transformer.h[0].output.at("all").edit(lambda value: seen.append(len(value)))
            hidden = model.transformer.h[0].hidden.clone()
    with model.trace(IDS):
        plain = model.transformer.h[0].hidden.clone()
    assert torch.equal(hidden[:, :3], values)
    assert seen == [2]
    torch.testing.assert_close(hidden[:, 3:], plain[:, 3:])
    torch.testing.assert_close(first, plain[:1])


def test_lasting_edits_of_one_line_are_all_made(net: Any, model: Model) -> None:
    expected = by_hand(net, [*range(PROMPT, RAN)], lambda value, _: value + 3 * V)
    with model.edit() as steered:
        for vector in (V, 2 * V):
            steered.transformer.h[0].output.at("generated")[:] += vector
    twice = model
    for vector in (V, 2 * V):
        with twice.edit() as twice:
            twice.transformer.h[0].output.at("generated")[:] += vector
    for edited in (steered, twice):
        with edited.generate(IDS, **STEPS) as tracer:
            cache = tracer.cache("transformer.h.*")
            result = tracer.result
        assert_same(result, expected)
        assert cache.verify()


def test_declared_edits_of_one_place_are_all_made(net: Any, model: Model) -> None:
    at = model.transformer.h[0].output.at(-1)
    outcome = model.run(IDS, edits=[(at, lambda value: value + V), (at, lambda value: value - V)])
    torch.testing.assert_close(outcome.result.logits, net(IDS).logits)


def test_an_edit_behind_the_end_of_the_run_says_so(model: Model) -> None:
    with pytest.raises(SiteOrderError, match="had passed"), model.trace(IDS) as tracer:
        tracer.result  # it waits for the end
        model.transformer.h[0].output.at(0)[:] = 0


def test_what_is_written_is_written_as_it_was(net: Any, model: Model) -> None:
    vector = V.clone()
    with model.generate(IDS, **STEPS) as tracer:
        cache = tracer.cache("transformer.h.*")
        model.transformer.h[0].output.at("generated")[:] += vector
        vector.zero_()
        result = tracer.result
    assert_same(result, by_hand(net, [*range(PROMPT, RAN)], lambda value, _: value + V))
    assert cache.verify()


def test_a_slice_from_before_the_first_token_begins_with_it_as_in_python() -> None:
    own, prompt = torch.arange(6)[None], torch.tensor([6])
    places = Chosen(slice(-20, None, 2)).places(own, 0, 6, prompt)
    assert [at for at, place in enumerate(places[0].tolist()) if place >= 0] == [0, 2, 4]
    assert list(range(6))[-20::2] == [0, 2, 4]
