"""Whatever transformers generates with: the same tokens, traced or not; steps that are steps."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    DynamicCache,
    GenerationConfig,
    MaxLengthCriteria,
    PreTrainedTokenizerFast,
    StaticCache,
    StoppingCriteria,
    StoppingCriteriaList,
    TextStreamer,
)
from transformers.generation.streamers import BaseStreamer

from tests.tiny_models import SPECS, generate, make
from tests.tracing.plain import plain_hooks, state_of
from tracekit import Cache, LanguageModel, Model
from tracekit.errors import InputError, NeverRanError

REPEATING = torch.tensor([[11, 12, 13, 14, 11, 12, 13, 14, 11, 12]])
PROMPT = "The Eiffel Tower is in the city of"
H0 = "model.transformer.h.0"


pytestmark = pytest.mark.usefixtures("without_gradients")


def ways() -> dict[str, dict[str, Any]]:
    """Options of generate, made anew for each use: some of them are changed by it."""
    return {
        "greedy": {"do_sample": False},
        "no kv_cache": {"do_sample": False, "use_cache": False},
        "sampling": {"do_sample": True, "top_k": 20, "temperature": 2.0},
        "beams": {"do_sample": False, "num_beams": 3},
        "sampled beams": {"do_sample": True, "num_beams": 2},
        "several of each": {"do_sample": True, "num_return_sequences": 3},
        "all beams": {"do_sample": False, "num_beams": 3, "num_return_sequences": 3},
        "chunked prefill": {"do_sample": False, "prefill_chunk_size": 4},
        "guidance": {"do_sample": False, "guidance_scale": 1.5},
        "prompt lookup": {"do_sample": False, "prompt_lookup_num_tokens": 2},
        "assisted": {"do_sample": False, "assistant_model": make("gpt2", seed=1)[0]},
        "repetition penalty": {"do_sample": False, "repetition_penalty": 1.8},
        "static kv_cache": {"do_sample": False, "cache_implementation": "static"},
        "a dictionary": {
            "do_sample": False,
            "return_dict_in_generate": True,
            "output_logits": True,
            "output_hidden_states": True,
        },
    }


def run(model: Any, way: str, **options: Any) -> Any:
    torch.manual_seed(3)
    return model.generate(input_ids=REPEATING, **{"max_new_tokens": 5, **ways()[way], **options})


def tokens_of(generated: Any) -> Tensor:
    return generated if isinstance(generated, Tensor) else generated.sequences


@pytest.mark.parametrize("way", ways())
def test_a_plain_call_returns_what_transformers_returns(way: str, net: Any, model: Model) -> None:
    assert torch.equal(tokens_of(run(model, way)), tokens_of(run(net, way)))


@pytest.mark.parametrize("way", ways())
def test_a_traced_generation_has_the_same_tokens(way: str, net: Any, model: Model) -> None:
    before = state_of(net)
    expected = run(net, way)
    torch.manual_seed(3)
    options = ways()[way]
    steps = 0
    with model.generate(input_ids=REPEATING, max_new_tokens=5, **options) as tracer:
        cache = tracer.cache([model.lm_head])
        for _ in tracer.iter[:]:
            model.transformer.h[0].output
            steps += 1
        result = tracer.result
    assert type(result) is type(expected)
    assert torch.equal(tokens_of(result), tokens_of(expected))
    assert steps == len({entry.step for entry in cache["model.lm_head"]})
    assert state_of(net) == before


@pytest.mark.parametrize("way", ways())
def test_a_cache_of_any_generation_holds_what_plain_hooks_see(
    way: str, net: Any, model: Model
) -> None:
    with plain_hooks(net) as seen:
        run(net, way)
    torch.manual_seed(3)
    options = ways()[way]
    with model.generate(input_ids=REPEATING, max_new_tokens=5, **options) as tracer:
        cache = tracer.cache()
    for path in (H0, "model.transformer.h.1", "model.lm_head"):
        assert len(cache[path]) == len(seen[path])
        assert all(map(torch.equal, cache[path].outputs, seen[path]))


# -- what a step is -------------------------------------------------------------------------------


def visits(cache: Cache, path: str = H0) -> list[tuple[int, int]]:
    return [(entry.step, entry.call) for entry in cache[path]]


def cached(model: Model, **options: Any) -> Cache:
    with model.generate(input_ids=REPEATING, do_sample=False, **options) as tracer:
        cache = tracer.cache()
    return cache


def test_the_chunks_of_a_prompt_are_calls_of_step_0(model: Model) -> None:
    cache = cached(model, max_new_tokens=3, prefill_chunk_size=4)
    assert visits(cache) == [(0, 0), (0, 1), (0, 2), (1, 0), (2, 0)]
    assert [entry.output.shape[1] for entry in cache[H0]] == [4, 4, 2, 1, 1]


def test_the_calls_of_a_chunked_prompt_are_read_and_edited_one_by_one(
    net: Any, model: Model
) -> None:
    options = dict(max_new_tokens=3, do_sample=False, prefill_chunk_size=4)
    with plain_hooks(net) as seen:
        net.generate(input_ids=REPEATING, **options)
    with model.generate(input_ids=REPEATING, **options) as tracer:
        first = model.transformer.h[0].output
        third = model.transformer.h[0].calls[2].output
        tracer.next()
        fourth = model.transformer.h[0].output
    expected = seen[H0]
    assert torch.equal(first, expected[0])
    assert torch.equal(third, expected[2])
    assert torch.equal(fourth, expected[3])


def test_guidance_makes_two_calls_in_every_step(model: Model) -> None:
    cache = cached(model, max_new_tokens=3, guidance_scale=1.5)
    assert visits(cache) == [(step, call) for step in range(3) for call in range(2)]


def test_speculation_takes_fewer_steps_than_tokens(model: Model) -> None:
    cache = cached(model, max_new_tokens=6, prompt_lookup_num_tokens=2)
    steps = [step for step, _ in visits(cache)]
    assert steps == list(range(len(steps)))


def test_the_calls_of_an_assistant_are_not_the_models(net: Any, model: Model) -> None:
    assistant = make("gpt2", seed=0)[0]  # the same weights: every draft is accepted
    cache = cached(model, max_new_tokens=6, assistant_model=assistant)
    with plain_hooks(net) as seen:
        net.generate(
            input_ids=REPEATING, do_sample=False, max_new_tokens=6, assistant_model=assistant
        )
    assert len(cache[H0]) == len(seen[H0])
    assert {call for _, call in visits(cache)} == {0}


@pytest.mark.parametrize("name", ["t5", "bart", "whisper"])
def test_an_encoder_runs_at_step_0_only(name: str) -> None:
    net, inputs = make(name)
    traced = Model(net)
    options = {**SPECS[name].gen_inputs(inputs), "max_new_tokens": 3, "do_sample": False}
    root = traced if name == "t5" else traced.model
    encoder, decoder = root.encoder, root.decoder
    with traced.generate(**options) as tracer:
        cache = tracer.cache([encoder, decoder])
        encoded = encoder.output
        steps = [(step, decoder.output[0]) for step in tracer.iter[:]]
    assert visits(cache, encoder.path) == [(0, 0)]
    assert visits(cache, decoder.path) == [(0, 0), (1, 0), (2, 0)]
    assert torch.equal(encoded[0], cache[encoder.path].hidden)
    assert [step for step, _ in steps] == [0, 1, 2]
    assert all(torch.equal(hidden, cache[decoder.path][step].output[0]) for step, hidden in steps)


def test_an_encoder_asked_for_at_a_later_step_is_an_error_in_words() -> None:
    net, inputs = make("t5")
    traced = Model(net)
    options = {**SPECS["t5"].gen_inputs(inputs), "max_new_tokens": 3, "do_sample": False}
    with pytest.raises(NeverRanError, match=r"model\.encoder\.output \(step 1\)"):
        with traced.generate(**options) as tracer:
            for _ in tracer.iter[1:]:
                traced.encoder.output


@pytest.mark.parametrize("name", ["whisper", "blip_2", "t5", "llava", "mamba", "mixtral"])
def test_models_with_a_generate_of_their_own_have_the_same_tokens(name: str) -> None:
    net, inputs = make(name)
    expected = generate(name, net, inputs)
    options = {"max_new_tokens": 3, "do_sample": False, **SPECS[name].generation}
    given = {**SPECS[name].gen_inputs(inputs), **options}
    traced = Model(net)
    with traced.generate(**given) as tracer:
        steps = list(tracer.iter[:])
        result = tracer.result
    assert torch.equal(tokens_of(result), tokens_of(expected))
    assert torch.equal(tokens_of(traced.generate(**given)), tokens_of(expected))
    assert steps == [0, 1, 2]


# -- what the user hands in -----------------------------------------------------------------------


class Until(StoppingCriteria):
    """Stops at a length."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length)


@pytest.mark.parametrize("kind", [list, StoppingCriteriaList])
def test_the_users_stopping_criteria_stop(kind: Any, model: Model) -> None:
    criteria = kind([Until(13)])
    options = dict(max_new_tokens=8, do_sample=False, stopping_criteria=criteria)
    with model.generate(input_ids=REPEATING, **options) as tracer:
        steps = list(tracer.iter[:])
        tokens = tracer.result
    assert tokens.shape[1] == 13
    assert steps == [0, 1, 2]
    assert len(criteria) == 1, "the user's own list is as it was"


def test_stopping_criteria_by_position_stop(net: Any, model: Model) -> None:
    config = GenerationConfig(max_new_tokens=8, do_sample=False, pad_token_id=0)
    criteria = StoppingCriteriaList([MaxLengthCriteria(12)])
    expected = net.generate(REPEATING, config, None, criteria)
    with model.generate(REPEATING, config, None, criteria) as tracer:
        tokens = tracer.result
    assert torch.equal(tokens, expected)


def test_a_generation_config_is_used_and_stays_as_it_was(net: Any, model: Model) -> None:
    config = GenerationConfig(max_new_tokens=3, do_sample=False, pad_token_id=0)
    before = config.to_dict()
    with model.generate(input_ids=REPEATING, generation_config=config) as tracer:
        tokens = tracer.result
    assert torch.equal(tokens, net.generate(input_ids=REPEATING, generation_config=config))
    assert config.to_dict() == before


def of_characters(net: Any) -> Any:
    """A tokenizer with one token for each character."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[: net.config.vocab_size]
    tokenizer = Tokenizer(models.BPE({sign: number for number, sign in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="!")


def test_stop_strings_stop(net: Any) -> None:
    tokenizer = of_characters(net)
    traced = LanguageModel(net, tokenizer=tokenizer)
    options = dict(max_new_tokens=8, do_sample=False, tokenizer=tokenizer)
    word = tokenizer.decode(traced.generate("abcdef", **options)[0, 6:9])
    ids = tokenizer("abcdef", return_tensors="pt")["input_ids"]
    expected = net.generate(ids, **options, stop_strings=[word])
    with traced.generate("abcdef", **options, stop_strings=[word]) as tracer:
        tokens = tracer.result
    assert torch.equal(tokens, expected)
    assert 6 < tokens.shape[1] < 14


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_the_users_own_kv_cache_is_filled(kind: str, net: Any, model: Model) -> None:
    def kv_cache() -> Any:
        if kind == "dynamic":
            return DynamicCache(config=net.config)
        return StaticCache(config=net.config, max_cache_len=32)

    options = dict(max_new_tokens=4, do_sample=False)
    theirs, mine = kv_cache(), kv_cache()
    expected = net.generate(input_ids=REPEATING, past_key_values=theirs, **options)
    with model.generate(input_ids=REPEATING, past_key_values=mine, **options) as tracer:
        tokens = tracer.result
    assert torch.equal(tokens, expected)
    assert int(mine.get_seq_length()) == int(theirs.get_seq_length()) == 10 + 4 - 1
    assert torch.equal(mine.layers[0].keys, theirs.layers[0].keys)


def test_a_filled_kv_cache_is_gone_on_with(net: Any, model: Model) -> None:
    options = dict(max_new_tokens=3, do_sample=False)
    expected = net.generate(input_ids=REPEATING, **options)
    kv_cache = DynamicCache(config=net.config)
    net(input_ids=REPEATING[:, :6], past_key_values=kv_cache, use_cache=True)
    with model.generate(input_ids=REPEATING, past_key_values=kv_cache, **options) as tracer:
        first = model.transformer.h[0].output
        tokens = tracer.result
    assert first.shape[1] == 4, "the positions that the cache lacks"
    assert torch.equal(tokens, expected)


class Collecting(BaseStreamer):
    """Keeps what is put."""

    def __init__(self) -> None:
        self.got: list[int] = []
        self.has_ended = False

    def put(self, value: Tensor) -> None:
        self.got += value.flatten().tolist()

    def end(self) -> None:
        self.has_ended = True


def test_a_streamer_gets_every_token(model: Model) -> None:
    streamer = Collecting()
    options = dict(max_new_tokens=4, do_sample=False, streamer=streamer)
    with model.generate(input_ids=REPEATING, **options) as tracer:
        tokens = tracer.result
    assert streamer.has_ended
    assert streamer.got == tokens[0].tolist()


def test_a_text_streamer_prints_the_text(tiny: LanguageModel, capsys: Any) -> None:
    streamer = TextStreamer(tiny.tokenizer, skip_prompt=True)
    tiny.generate(PROMPT, max_new_tokens=1, do_sample=False, streamer=streamer)
    assert capsys.readouterr().out.strip() == "Paris"


# -- where it is written --------------------------------------------------------------------------


def test_a_call_in_an_argument_of_a_header_is_a_plain_call(net: Any, model: Model) -> None:
    expected = run(net, "greedy")
    options = dict(max_new_tokens=5, do_sample=False)
    with contextlib.nullcontext(model.generate(input_ids=REPEATING, **options)) as tokens:
        pass
    assert torch.equal(tokens, expected)


def test_a_plain_generation_in_the_block_of_a_trace(net: Any, model: Model) -> None:
    with model.trace(input_ids=REPEATING):
        hidden = model.transformer.h[0].output
        tokens = run(model, "greedy")
        head = model.lm_head.output
    assert torch.equal(tokens, run(net, "greedy"))
    assert hidden.shape[1] == head.shape[1] == 10


def test_a_module_without_generate_is_refused() -> None:
    traced = Model(nn.Linear(2, 2))
    with pytest.raises(InputError, match=r"Linear has no generate\(\)"):
        traced.generate(torch.ones(1, 2))
    encoder = Model(make("bert")[0])
    with pytest.raises((InputError, TypeError, AttributeError), match="generate"):
        encoder.generate(REPEATING)


class Own(nn.Module):
    """A module of the user's that generates in its own way, and hands its options on."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2)

    def forward(self, value: Tensor, scale: float = 1.0) -> Tensor:
        return self.inner(value) * scale

    def generate(self, value: Tensor, **options: Any) -> Tensor:
        return self(self(value, **options), **options)


def test_a_users_own_generate_gets_the_users_options_alone() -> None:
    own = Own()
    traced = Model(own)
    with traced.generate(torch.ones(1, 2), scale=2.0) as tracer:
        cache = tracer.cache([traced.inner])
        result = tracer.result
    assert torch.equal(result, own.generate(torch.ones(1, 2), scale=2.0))
    assert visits(cache, "model.inner") == [(0, 0), (0, 1)]


@pytest.mark.parametrize("is_traced", [False, True])
def test_a_progress_bar_on_request_counts_the_steps_and_changes_nothing(
    is_traced: bool, model: Model, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = model.generate(REPEATING, max_new_tokens=3, do_sample=False)
    if is_traced:
        with model.generate(REPEATING, max_new_tokens=3, do_sample=False, progress=True) as tracer:
            tokens = tracer.result
    else:
        tokens = model.generate(REPEATING, max_new_tokens=3, do_sample=False, progress=True)
    assert torch.equal(tokens, expected)
    assert "3/3" in capsys.readouterr().err
