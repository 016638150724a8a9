"""Steps are decoding iterations: loops over them, reads and edits in them, and their ends."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.tiny_models import make
from tests.tracing.plain import plain_hooks, state_of
from tracekit import Envoy, Model, Tracer
from tracekit.errors import ShortLoopWarning, SiteOrderError, StepError

pytestmark = pytest.mark.usefixtures("each_way")

TOKENS = 4
GREEDY = {"max_new_tokens": TOKENS, "do_sample": False}
H0, H1 = "model.transformer.h.0", "model.transformer.h.1"
KV_CACHE = pytest.mark.parametrize("use_cache", [True, False], ids=["kv_cache", "no_kv_cache"])


@pytest.fixture(autouse=True)
def without_gradients() -> Any:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def made() -> tuple[nn.Module, dict[str, Any]]:
    return make("gpt2")


@pytest.fixture
def net(made: tuple[nn.Module, dict[str, Any]]) -> Iterator[Any]:
    before = state_of(made[0])
    yield made[0]
    assert state_of(made[0]) == before


@pytest.fixture
def inputs(made: tuple[nn.Module, dict[str, Any]]) -> dict[str, Any]:
    return {**made[1], **GREEDY}


@pytest.fixture
def model(net: nn.Module) -> Model:
    return Model(net)


@pytest.fixture
def seen(net: Any, inputs: dict[str, Any]) -> dict[str, list[Any]]:
    """What plain hooks see in each forward pass of the generation; each is one step here."""
    return outputs_of(net, inputs)


def outputs_of(net: Any, inputs: dict[str, Any]) -> dict[str, list[Any]]:
    with plain_hooks(net) as seen:
        net.generate(**inputs)
    return seen


@contextmanager
def adding(module: nn.Module, amounts: dict[int, float]) -> Iterator[None]:
    """A plain hook that adds to the output of the n-th call of `module`."""
    calls = iter(range(10**6))
    handle = module.register_forward_hook(lambda _m, _a, out: out + amounts.get(next(calls), 0.0))
    try:
        yield
    finally:
        handle.remove()


def same(got: list[Tensor], expected: list[Tensor]) -> bool:
    return len(got) == len(expected) and all(map(torch.equal, got, expected))


# -- reads ----------------------------------------------------------------------------------------


@KV_CACHE
def test_an_open_loop_reads_every_step(
    net: Any, model: Model, inputs: Any, use_cache: bool
) -> None:
    inputs["use_cache"] = use_cache
    expected = outputs_of(net, inputs)
    steps, got, heads = [], [], []
    with model.generate(**inputs) as tracer:
        for step in tracer.iter[:]:
            steps.append(step)
            got.append(model.transformer.h[1].output)
            heads.append(model.lm_head.output)
        after = "the code after the loop"
    assert after == "the code after the loop"
    assert steps == list(range(TOKENS))
    assert same(got, expected[H1])
    assert same(heads, expected["model.lm_head"])
    lengths = [1] * TOKENS if use_cache else [8, 9, 10, 11]
    assert [value.shape[1] for value in got][1:] == lengths[1:]


@KV_CACHE
@pytest.mark.parametrize(
    ("key", "steps"),
    [
        (slice(1, 3), [1, 2]),
        (slice(None, 2), [0, 1]),
        (slice(2, None), [2, 3]),
        (slice(0, None, 2), [0, 2]),
        (slice(0, 4, 3), [0, 3]),
        (2, [2]),
        ([0, 2], [0, 2]),
        ((1, 3), [1, 3]),
        (slice(2, 2), []),
        ([], []),
        (-1, [3]),
        (-4, [0]),
        (slice(-2, None), [2, 3]),
        (slice(1, -1), [1, 2]),
        (slice(None, -1), [0, 1, 2]),
        (slice(-9, 2), [0, 1]),
        (slice(-4, None, 3), [0, 3]),
        (slice(3, -3), []),
        ([0, -1], [0, 3]),
        ([-3, -1], [1, 3]),
    ],
    ids=str,
)
def test_chosen_steps_are_those_steps_for_every_module(
    key: Any, steps: list[int], use_cache: bool, net: Any, model: Model, inputs: Any
) -> None:
    inputs["use_cache"] = use_cache
    seen = outputs_of(net, inputs)
    had, blocks, heads = [], [], []
    with model.generate(**inputs) as tracer:
        for step in tracer.iter[key]:
            had.append(step)
            blocks.append(model.transformer.h[0].output)
            heads.append(model.lm_head.output)
        tokens = tracer.result
    assert had == steps
    assert same(blocks, [seen[H0][step] for step in steps])
    assert same(heads, [seen["model.lm_head"][step] for step in steps])
    assert torch.equal(tokens, net.generate(**inputs))


def test_a_comprehension_over_the_steps(model: Model, inputs: Any, seen: Any) -> None:
    with model.generate(**inputs) as tracer:
        got = [model.lm_head.output for _ in tracer.iter]
    assert same(got, seen["model.lm_head"])


def test_all_is_every_step(model: Model, inputs: Any, seen: Any) -> None:
    with model.generate(**inputs) as tracer:
        got = [model.lm_head.output for _ in tracer.all()]
    assert same(got, seen["model.lm_head"])


@KV_CACHE
def test_next_of_a_module_is_its_value_one_step_on(
    use_cache: bool, net: Any, model: Model, inputs: Any
) -> None:
    inputs["use_cache"] = use_cache
    seen = outputs_of(net, inputs)
    with model.generate(**inputs):
        first = model.lm_head.output
        second = model.lm_head.next().output
        fourth = model.lm_head.next(2).output
    expected = seen["model.lm_head"]
    assert same([first, second, fourth], [expected[0], expected[1], expected[3]])


def test_next_of_the_tracer_moves_the_whole_block(model: Model, inputs: Any, seen: Any) -> None:
    with model.generate(**inputs) as tracer:
        tracer.next()
        early = model.transformer.h[0].output
        tracer.next(2)
        late = model.transformer.h[0].output
        head = model.lm_head.output
    assert same([early, late], [seen[H0][1], seen[H0][3]])
    assert torch.equal(head, seen["model.lm_head"][3])


def test_a_block_without_a_loop_is_about_step_0(model: Model, inputs: Any, seen: Any) -> None:
    with model.generate(**inputs) as tracer:
        hidden = model.transformer.h[1].output
        tokens = tracer.result
    assert torch.equal(hidden, seen[H1][0])
    assert tokens.shape[1] == inputs["input_ids"].shape[1] + TOKENS


def test_a_loop_whose_body_asks_for_nothing_ends(model: Model, inputs: Any) -> None:
    count = 0
    with model.generate(**inputs) as tracer:
        for _ in tracer.iter[:]:
            count += 1
        end = count
    assert count == end == TOKENS


def test_a_loop_that_is_left_early_leaves_the_rest_alone(
    model: Model, inputs: Any, seen: Any
) -> None:
    with model.generate(**inputs) as tracer:
        for step in tracer.iter[:]:
            hidden = model.transformer.h[0].output
            if step == 2:
                break
        head = model.lm_head.output  # of the same step
        tokens = tracer.result
    assert torch.equal(hidden, seen[H0][2])
    assert torch.equal(head, seen["model.lm_head"][2])
    assert tokens.shape[1] == 8 + TOKENS


def test_two_loops_one_after_the_other(model: Model, inputs: Any, seen: Any) -> None:
    got = []
    with model.generate(**inputs) as tracer:
        for _ in tracer.iter[:2]:
            got.append(model.transformer.h[0].output)
        for _ in tracer.iter[2:]:
            got.append(model.transformer.h[0].output)
    assert same(got, seen[H0])


def read_some(tracer: Tracer, module: Envoy, last: int) -> list[Tensor]:
    """A helper that loops itself."""
    return [module.output for _ in tracer.iter[1:last]]


def test_a_helper_that_loops(model: Model, inputs: Any, seen: Any) -> None:
    def rest(found: list[Tensor]) -> None:
        for _ in tracer.iter[3:]:
            found.append(model.lm_head.output)

    with model.generate(**inputs) as tracer:
        got = read_some(tracer, model.lm_head, 3)
        rest(got)
    assert same(got, seen["model.lm_head"][1:])


def test_a_forward_pass_is_one_step(net: Any, model: Model, made: Any, seen: Any) -> None:
    got = []
    with model.trace(**made[1], use_cache=False) as tracer:
        for step in tracer.iter[:]:
            got.append((step, model.transformer.h[0].output))
    assert [step for step, _ in got] == [0]
    assert torch.equal(got[0][1], seen[H0][0])


# -- edits ----------------------------------------------------------------------------------------


@KV_CACHE
@pytest.mark.parametrize("in_place", [True, False], ids=["in_place", "replaced"])
def test_edits_at_given_steps_equal_those_of_a_plain_hook(
    in_place: bool, use_cache: bool, net: Any, model: Model, inputs: Any
) -> None:
    inputs["use_cache"] = use_cache
    amounts = {1: 40.0, 2: -25.0}
    with adding(net.transformer.h[0], amounts):
        expected = outputs_of(net, inputs)
    with adding(net.transformer.h[0], amounts):
        tokens = net.generate(**inputs)
    heads = []
    with model.generate(**inputs) as tracer:
        cache = tracer.cache()
        for step in tracer.iter[:]:
            if step in amounts and in_place:
                model.transformer.h[0].output[:] += amounts[step]
            elif step in amounts:
                model.transformer.h[0].output = model.transformer.h[0].output + amounts[step]
            heads.append(model.lm_head.output)
        mine = tracer.result
    assert torch.equal(mine, tokens)
    assert same(cache[H1].outputs, expected[H1])
    assert same(heads, expected["model.lm_head"])


@KV_CACHE
def test_steering_changes_the_tokens_as_a_hook_does(
    use_cache: bool, net: Any, model: Model, inputs: Any
) -> None:
    inputs["use_cache"] = use_cache
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(net.config.n_embd, generator=generator) * 20
    plain = net.generate(**inputs)
    handle = net.transformer.h[1].register_forward_hook(lambda _m, _a, out: out + direction)
    expected = net.generate(**inputs)
    handle.remove()
    with model.generate(**inputs) as tracer:
        for _ in tracer.all():
            model.transformer.h[1].output[:] += direction
        steered = tracer.result
    assert torch.equal(steered, expected)
    assert not torch.equal(steered, plain)
    assert torch.equal(net.generate(**inputs), plain)


def test_a_module_is_skipped_at_one_step_only(net: Any, model: Model, inputs: Any) -> None:
    calls = []

    def hook(_m: Any, args: Any, out: Tensor) -> Tensor:
        calls.append(1)
        return args[0] if len(calls) == 3 else out

    handle = net.transformer.h[1].mlp.register_forward_hook(hook)
    expected = outputs_of(net, inputs)
    handle.remove()
    with model.generate(**inputs) as tracer:
        cache = tracer.cache()
        for _ in tracer.iter[2]:
            model.transformer.h[1].mlp.skip(model.transformer.h[1].mlp.input)
    assert same(cache["model.lm_head"].outputs, expected["model.lm_head"])


# -- order, and what does not happen --------------------------------------------------------------


def test_the_wrong_order_in_a_step_is_an_error_in_that_step(model: Model, inputs: Any) -> None:
    steps = []
    with pytest.raises(SiteOrderError, match=r"h\.0\.output \(step 1\).*h\.1\.output \(step 1\)"):
        with model.generate(**inputs) as tracer:
            for step in tracer.iter[1:]:
                steps.append(step)
                model.transformer.h[1].output
                model.transformer.h[0].output
    assert steps == [1]


def test_a_value_of_a_step_that_is_over_is_an_error(model: Model, inputs: Any) -> None:
    with pytest.raises((SiteOrderError, StepError), match="step"):
        with model.generate(**inputs) as tracer:
            for _ in tracer.iter[:]:
                pass
            model.lm_head.output


def test_going_back_to_a_step_is_refused(model: Model, inputs: Any) -> None:
    with pytest.raises(StepError, match=r"step 0 was asked for when the model was at step 2"):
        with model.generate(**inputs) as tracer:
            for _ in tracer.iter[2]:
                model.lm_head.output
            for _ in tracer.iter[:]:
                model.lm_head.output


@pytest.mark.parametrize("key", [[2, 0], [1, 1]])
def test_steps_out_of_order_are_refused_at_once(key: list[int], model: Model, inputs: Any) -> None:
    ran = []
    with pytest.raises(StepError, match="ascending"):
        with model.generate(**inputs) as tracer:
            for step in tracer.iter[key]:
                ran.append(step)
    assert not ran


@pytest.mark.parametrize(
    ("key", "words"),
    [
        (-5, "there is no step -5: the run has 4 steps"),
        ([0, -4], "ascending order"),
        ([-1, 1], "ascending order"),
        (slice(None, 0, -1), "a stride of -1"),
        (slice(-1, None, 0), "a stride of 0"),
    ],
    ids=str,
)
def test_steps_that_cant_be_gone_through_are_refused(
    key: Any, words: str, model: Model, inputs: Any
) -> None:
    with pytest.raises(StepError, match=words):
        with model.generate(**inputs) as tracer:
            for _ in tracer.iter[key]:
                pass


@pytest.mark.parametrize("key", [-1, slice(-3, None), [-1], slice(0, 9)], ids=str)
def test_the_last_step_of_a_forward_pass_is_its_only_one(
    key: Any, net: Any, model: Model, inputs: Any
) -> None:
    ids = inputs["input_ids"]
    expected = net(input_ids=ids).logits
    got = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ShortLoopWarning)
        with model.trace(input_ids=ids) as tracer:
            for step in tracer.iter[key]:
                got[step] = model.lm_head.output
    assert list(got) == [0]
    assert torch.equal(got[0], expected)
    with model.scan(input_ids=ids) as tracer:
        shapes = [model.lm_head.output.shape for _ in tracer.iter[-1]]
    assert shapes == [expected.shape]
    with pytest.raises(StepError, match="there is no step -2: the run has 1 step;"):
        with model.trace(input_ids=ids) as tracer:
            for _ in tracer.iter[-2]:
                pass


def test_a_generation_that_ends_otherwise_than_its_arguments_say_is_an_error(
    net: Any, model: Model, inputs: Any
) -> None:
    class End:
        """Gives every token but one no chance, after all other processors."""

        def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
            return torch.full_like(scores, -1e30).index_fill(1, torch.tensor([7]), 0.0)

    options = {**inputs, "min_new_tokens": TOKENS, "eos_token_id": 7}
    assert net.generate(**options).shape[1] == inputs["input_ids"].shape[1] + TOKENS
    got = []
    with pytest.raises(StepError, match=r"from the end of 4 \(line \d+\), .* ended after 1:"):
        with model.generate(**options, logits_processor=[End()]) as tracer:
            for step in tracer.iter[:-1]:
                got.append(step)
    assert got == [0]
    with pytest.raises(StepError, match="ended after 1:"):
        with model.generate(**options, logits_processor=[End()]) as tracer:
            for _ in tracer.iter[-4]:
                model.lm_head.output


@pytest.mark.parametrize("key", ["1", None, 1.0, [0, 1.0], slice("0", None)])
def test_what_is_no_number_of_a_step_is_refused(key: Any, model: Model, inputs: Any) -> None:
    with pytest.raises(StepError, match="steps are whole numbers"):
        with model.generate(inputs, max_new_tokens=3) as tracer:
            for _ in tracer.iter[key]:
                model.model.layers[0].output


def test_a_step_beyond_the_end_is_refused(model: Model, inputs: Any) -> None:
    with pytest.raises(StepError, match=r"the run had 4 steps, 0 to 3|the run ended"):
        with model.generate(**inputs):
            model.lm_head.next(9).output


def test_a_bounded_loop_that_is_cut_short_warns_once_at_the_users_line(
    model: Model, inputs: Any
) -> None:
    steps, after = [], False
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with model.generate(**inputs) as tracer:
            for step in tracer.iter[2:9]:  # the line that is named
                steps.append(step)
            after = True
    assert steps == [2, 3] and after
    (warning,) = caught
    assert warning.category is ShortLoopWarning
    assert warning.filename == __file__
    with open(__file__) as source:
        assert "the line that is named" in source.read().splitlines()[warning.lineno - 1]


def test_a_stop_in_a_loop_computes_no_further_step(net: Any, model: Model, inputs: Any) -> None:
    ran: list[int] = []
    handle = net.transformer.h[1].register_forward_hook(lambda *_: ran.append(1))
    got = []
    with model.generate(**inputs) as tracer:
        cache = tracer.cache()
        for step in tracer.iter[:]:
            got.append(model.transformer.h[0].output)
            if step == 1:
                tracer.stop()
    handle.remove()
    assert len(got) == 2 and len(ran) == 1
    assert (len(cache[H0]), len(cache[H1])) == (2, 1)
