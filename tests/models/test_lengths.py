"""How many steps a generation will have: what is told before it runs is what it has."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GenerationConfig, MaxLengthCriteria, StoppingCriteriaList

from tests.tiny_models import SPECS, make
from tests.tracing.plain import plain_hooks
from tracekit import LanguageModel, Model
from tracekit.errors import StepError

IDS = torch.tensor([[11, 12, 13, 14, 11, 12, 13, 14]])
END = 19  # an end-of-sequence token
LOGITS = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}


pytestmark = pytest.mark.usefixtures("without_gradients")


def ending(net: Any) -> int:
    """The token that a greedy generation chooses first."""
    return int(net.generate(input_ids=IDS, max_new_tokens=1, do_sample=False)[0, -1])


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"max_new_tokens": 5}, 5),
        ({"max_new_tokens": 1}, 1),
        ({"max_length": 12}, 4),
        ({"max_new_tokens": 5, "min_new_tokens": 5, "eos_token_id": END}, 5),
        ({"max_new_tokens": 5, "min_new_tokens": 4, "eos_token_id": END}, 5),
        ({"max_new_tokens": 5, "min_length": 13, "eos_token_id": END}, 5),
        ({"max_length": 12, "min_length": 12, "eos_token_id": END}, 4),
        ({"max_length": 12, "min_new_tokens": 4, "eos_token_id": [END, 3]}, 4),
        ({"max_new_tokens": 4, "num_beams": 3}, 4),
        ({"max_new_tokens": 4, "num_beams": 3, "early_stopping": True}, 4),
        ({"max_new_tokens": 4, "min_new_tokens": 4, "num_beams": 3, "eos_token_id": END}, 4),
        ({"max_new_tokens": 4, "do_sample": True}, 4),
        ({"max_new_tokens": 4, "do_sample": True, "num_beams": 2, "num_return_sequences": 2}, 4),
        ({"max_new_tokens": 4, "prefill_chunk_size": 3}, 4),
        ({"max_new_tokens": 4, "guidance_scale": 1.5}, 4),
        ({"max_new_tokens": 4, "use_cache": False}, 4),
        ({"max_new_tokens": 4, "forced_eos_token_id": END}, 4),
        ({"generation_config": GenerationConfig(max_new_tokens=3)}, 3),
    ],
    ids=str,
)
def test_the_last_step_is_the_last(
    options: dict[str, Any], steps: int, net: Any, model: Model
) -> None:
    options = {"do_sample": False, "eos_token_id": None, **options}
    torch.manual_seed(5)
    with plain_hooks(net) as seen:
        net.generate(input_ids=IDS, **options)
    calls = 2 if "guidance_scale" in options else 1
    expected = seen["model.lm_head"][-calls]
    torch.manual_seed(5)
    with model.generate(input_ids=IDS, **options) as tracer:
        got = [(step, model.lm_head.output) for step in tracer.iter[-1]]
    ((step, last),) = got
    assert step == steps - 1
    assert torch.equal(last, expected)


def test_an_end_token_that_would_have_come_is_held_back(net: Any, model: Model) -> None:
    end = ending(net)
    options = {"max_new_tokens": 5, "eos_token_id": end, **LOGITS}
    assert len(net.generate(input_ids=IDS, **options).logits) == 1, "it ends early by itself"
    with pytest.raises(StepError, match=rf"token \({end}\) may end it before 5 steps"):
        with model.generate(input_ids=IDS, **options) as tracer:
            for _ in tracer.iter[-1]:
                pass
    expected = net.generate(input_ids=IDS, min_new_tokens=5, **options).logits
    with model.generate(input_ids=IDS, min_new_tokens=5, **options) as tracer:
        got = [model.lm_head.output[:, -1] for _ in tracer.iter[-2:]]
    assert len(expected) == 5
    assert all(map(torch.equal, got, expected[-2:]))


def test_the_end_token_of_the_models_own_configuration_counts() -> None:
    own = make("gpt2")[0]
    own.generation_config.eos_token_id = 7
    model = Model(own)
    with pytest.raises(StepError, match=r"an end-of-sequence token \(7\)"):
        with model.generate(input_ids=IDS, max_new_tokens=3) as tracer:
            list(tracer.iter[-1])
    own.generation_config.max_new_tokens = own.generation_config.min_new_tokens = 3
    with model.generate(input_ids=IDS) as tracer:
        steps = list(tracer.iter[-2:])
    assert steps == [1, 2]


def test_an_end_token_that_is_switched_off_ends_nothing() -> None:
    own = make("gpt2")[0]
    own.generation_config.eos_token_id = ending(own)
    with Model(own).generate(
        input_ids=IDS, max_new_tokens=5, eos_token_id=None, **LOGITS
    ) as tracer:
        steps = list(tracer.iter[-2:])
        result = tracer.result
    assert len(result.logits) == (steps[-1] + 1 if steps else 0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_new_tokens": 3, "eos_token_id": 7}, "give min_new_tokens=3, or loop"),
        ({"max_new_tokens": 3, "min_new_tokens": 1, "eos_token_id": 7}, "give min_new_tokens=3"),
        ({"max_new_tokens": 3, "max_time": 9.0}, "max_time may end it early; give max_time=None"),
        ({"max_new_tokens": 3, "stop_strings": ["a"]}, "stop_strings may end it early"),
        ({"max_new_tokens": 3, "prompt_lookup_num_tokens": 2}, "may bring several tokens; loop"),
        ({"max_new_tokens": 3, "custom_generate": print}, "custom_generate= may end"),
        ({}, "not said how many tokens are new; give max_new_tokens="),
    ],
    ids=str,
)
def test_what_leaves_the_end_open_is_refused_with_the_reason(
    options: dict[str, Any], words: str, model: Model
) -> None:
    ran: list[int] = []
    with pytest.raises(StepError, match=f"can't be counted .*{words}"):
        with model.generate(input_ids=IDS, **options) as tracer:
            ran += tracer.iter[-1]
    assert not ran


def test_criteria_and_an_assistant_leave_the_end_open(net: Any, model: Model) -> None:
    criteria = StoppingCriteriaList([MaxLengthCriteria(10)])
    with pytest.raises(StepError, match="stopping_criteria= may end it early; leave them out, or"):
        with model.generate(IDS, GenerationConfig(max_new_tokens=3), None, criteria) as tracer:
            list(tracer.iter[-1])
    with pytest.raises(StepError, match="may bring several tokens"):
        with model.generate(input_ids=IDS, max_new_tokens=3, assistant_model=net) as tracer:
            list(tracer.iter[-1])


@pytest.mark.parametrize("name", ["t5", "bart"])
@pytest.mark.parametrize("options", [{"max_new_tokens": 4}, {"max_length": 5}], ids=str)
def test_the_decoder_of_an_encoder_decoder_model(name: str, options: dict[str, Any]) -> None:
    net: Any = make(name)[0]
    own = Model(net)
    expected = net.generate(input_ids=IDS, **LOGITS, **options).logits
    with own.generate(input_ids=IDS, **LOGITS, **options) as tracer:
        got = [(step, own.lm_head.output[:, -1]) for step in tracer.iter[1:-1]]
    assert [step for step, _ in got] == list(range(1, len(expected) - 1))
    for step, logits in got:
        torch.testing.assert_close(logits, expected[step], rtol=0, atol=1e-6)
    with pytest.raises(StepError, match="not said how many"):
        with own.generate(input_ids=IDS, decoder_input_ids=IDS, max_length=12) as tracer:
            list(tracer.iter[-1])


def test_a_prompt_of_embeddings_is_counted_by_new_tokens_alone(net: Any, model: Model) -> None:
    embeds = net.transformer.wte(IDS)
    with model.generate(inputs_embeds=embeds, max_new_tokens=3) as tracer:
        steps = list(tracer.iter[-2:])
    assert steps == [1, 2]
    with pytest.raises(StepError, match="not said how many tokens are new"):
        with model.generate(inputs_embeds=embeds, max_length=12) as tracer:
            list(tracer.iter[-1])


@pytest.mark.parametrize("name", ["whisper", "blip_2"])
def test_a_generate_of_the_models_own_leaves_the_end_open(name: str) -> None:
    net, inputs = make(name)
    options = {**SPECS[name].gen_inputs(inputs), "max_new_tokens": 3}
    with pytest.raises(StepError, match="generates in a way of its own; loop"):
        with Model(net).generate(**options) as tracer:
            list(tracer.iter[-1])


def test_a_module_that_generates_by_itself_leaves_the_end_open() -> None:
    class Twice(nn.Linear):
        """Calls itself twice."""

        def generate(self, x: Tensor) -> Tensor:
            return self(self(x))

    model = Model(Twice(2, 2))
    with pytest.raises(StepError, match="Twice generates in a way of its own"):
        with model.generate(torch.ones(1, 2)) as tracer:
            list(tracer.iter[-1])


# -- wherever a generation is traced --------------------------------------------------------------


def test_the_blocks_of_invokes_count_the_steps_of_their_generation(net: Any) -> None:
    tiny = LanguageModel(net)
    rows = [torch.tensor([[11, 12, 13]]), torch.tensor([[21, 22, 23, 24, 25]])]
    first, second = (net.generate(ids, max_new_tokens=3, **LOGITS).logits for ids in rows)
    for length in ({"max_new_tokens": 3}, {"max_length": 8}):  # of the padded prompts, as of 5
        with tiny.generate(do_sample=False, **length) as tracer:
            with tracer.invoke(rows[0]):
                last = [(step, tiny.lm_head.output[:, -1]) for step in tracer.iter[-1]]
            with tracer.invoke(rows[1]):
                ends = [(step, tiny.lm_head.output[:, -1]) for step in tracer.iter[[0, -1]]]
        assert [step for step, _ in last] == [2]
        assert [step for step, _ in ends] == [0, 2]
        torch.testing.assert_close(last[0][1], first[-1])
        torch.testing.assert_close(ends[0][1], second[0])
        torch.testing.assert_close(ends[1][1], second[-1])


def test_a_function_beside_a_generation_counts_its_steps(net: Any, model: Model) -> None:
    def last(tracer: Any) -> list[Tensor]:
        return [model.lm_head.output[:, -1] for _ in tracer.iter[-1]]

    (got,) = model.generation(input_ids=IDS, max_new_tokens=3, do_sample=False).run(last)
    assert torch.equal(got, net.generate(input_ids=IDS, max_new_tokens=3, **LOGITS).logits[-1])


def test_an_edit_counts_the_steps_of_each_run_that_it_is_part_of(net: Any, model: Model) -> None:
    with model.edit() as (tracer, edited):
        for _ in tracer.iter[-1]:
            model.lm_head.output[:] += 1
    plain = net.generate(input_ids=IDS, max_new_tokens=3, **LOGITS).logits
    added = edited.generate(input_ids=IDS, max_new_tokens=3, **LOGITS).logits
    assert [bool((a - b).any()) for a, b in zip(added, plain, strict=True)] == [False, False, True]
    torch.testing.assert_close(added[-1], plain[-1] + 1)
    torch.testing.assert_close(edited(input_ids=IDS).logits, net(input_ids=IDS).logits + 1)
    declared = edited.run(input_ids=IDS).result.logits
    torch.testing.assert_close(declared, net(input_ids=IDS).logits + 1)
