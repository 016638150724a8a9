"""What a module gave for each token, put together from the steps of any generation."""

from __future__ import annotations

import gc
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.models.one_forward import run_plainly
from tests.tiny_models import IS_TRANSFORMERS_5, make
from tests.tracing.plain import state_of
from tracekit import Cache, LanguageModel, Model, settings
from tracekit.errors import CacheError, UnknownPathError
from tracekit.tracing.sequence import TokenSequence

IDS = make("gpt2")[1]["input_ids"]  # two rows of eight
REPEATING = torch.tensor([[11, 12, 13, 14, 11, 12, 13, 14, 11, 12]])
H = "transformer.h.1"
GREEDY = {"do_sample": False, "max_new_tokens": 6}


pytestmark = pytest.mark.usefixtures("without_gradients")


@pytest.fixture(scope="module")
def net() -> Any:
    return make("gpt2", initializer_range=0.2)[0]  # so that every token makes a difference


@pytest.fixture(scope="module")
def model(net: nn.Module) -> Model:
    return Model(net)


def plainly(net: nn.Module, tokens: Tensor, path: str = H, **inputs: Any) -> Tensor:
    """What a hook sees at `path` in one forward over all tokens but the last."""
    return run_plainly(net, {"input_ids": tokens[:, :-1], **inputs}, [path])[path]


def assert_close(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    torch.testing.assert_close(torch.Tensor(found), expected, atol=1e-4, rtol=1e-4)


def causal(length: int) -> Tensor:
    """The mask of attention that lets each position see itself and those before it."""
    return torch.full((1, 1, length, length), -1e9).triu(1)


def generated(model: Model, ids: Any = REPEATING, **options: Any) -> tuple[Cache, Tensor]:
    """A cache of all modules, and the tokens."""
    torch.manual_seed(0)
    with model.generate(ids, **{**GREEDY, **options}) as tracer:
        cache = tracer.cache()
        tokens = tracer.result
    return cache, tokens


# -- steps that are not forwards ------------------------------------------------------------------


def test_a_sequence_is_a_tensor_with_its_tokens_and_positions(net: Any, model: Model) -> None:
    cache, tokens = generated(model, IDS)
    sequence = cache.sequence(H)
    assert_close(sequence, plainly(net, tokens))
    assert isinstance(sequence, TokenSequence)
    assert torch.equal(sequence.tokens, tokens[:, :-1])
    assert torch.equal(sequence.positions, torch.arange(13).expand(2, -1))
    assert bool(sequence.valid.all())
    assert sequence.columns == [*range(13)]
    assert repr(sequence).startswith("TokenSequence(26 valid tokens, Tensor[2, 13, 32] float32")
    assert type(sequence[0]) is type(sequence * 2) is Tensor
    for way in (model.transformer.h[1], f"model.{H}"):
        assert torch.equal(cache.sequence(way), sequence)


@pytest.mark.parametrize("size", [1, 3, 4, 9])
def test_the_chunks_of_a_prompt_are_put_together(size: int, net: Any, model: Model) -> None:
    cache, tokens = generated(model, IDS, prefill_chunk_size=size)
    prompt = 8 if IS_TRANSFORMERS_5 else 7  # whose last token runs alone before 5
    chunks = [range(start, min(prompt, start + size)) for start in range(0, prompt, size)]
    steps = [range(column, column + 1) for column in range(prompt, 13)]
    assert [entry.positions for entry in cache[H]] == chunks + steps
    assert_close(cache.sequence(H), plainly(net, tokens))
    assert cache.verify()


DRAFTING: dict[str, dict[str, Any]] = {
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "a bad assistant": {"assistant_model": make("gpt2", seed=1, initializer_range=0.2)[0]},
    "a good assistant": {"assistant_model": make("gpt2", initializer_range=0.2)[0]},
}


@pytest.mark.parametrize("way", DRAFTING)
def test_rejected_drafts_are_not_in_it(way: str, net: Any, model: Model) -> None:
    options = {"eos_token_id": 1, "max_new_tokens": 12, **DRAFTING[way]}
    cache, tokens = generated(model, **options)
    entries = cache[H]
    went_over = sum(len(entry.positions or ()) for entry in entries)
    total = tokens.shape[1] - 1
    assert (went_over > total) == (way != "a good assistant"), "whether a draft was rejected"
    assert len(entries) < 12 or way != "a good assistant", "fewer forwards than tokens"
    assert_close(cache.sequence(H), plainly(net, tokens))
    assert torch.equal(cache.sequence(H).tokens, tokens[:, :-1])
    assert cache.verify()


def test_drafts_that_leave_early_are_not_in_it() -> None:
    net = make("llama", initializer_range=0.2)[0]
    model = Model(net)
    cache, tokens = generated(model, assistant_early_exit=1, eos_token_id=1, max_new_tokens=9)
    first, last = cache["model.layers.0"], cache["model.layers.1"]
    assert len(first) > len(last), "drafts run the first layer alone"
    for path in ("model.layers.0", "model.layers.1"):
        assert_close(cache.sequence(path), plainly(net, tokens, path))
    assert cache.verify()


def test_the_other_branch_of_guidance_is_not_in_it(net: Any, model: Model) -> None:
    cache, tokens = generated(model, IDS, guidance_scale=1.8)
    assert len(cache[H]) == 12, "two forwards in each step"
    assert_close(cache.sequence(H), plainly(net, tokens))
    assert cache.verify()


def test_each_row_has_several_sequences(net: Any, model: Model) -> None:
    options = {"do_sample": True, "num_return_sequences": 3, "top_k": 40}
    cache, tokens = generated(model, IDS, **options)
    assert tokens.shape == (6, 14)
    assert len({tuple(row) for row in tokens.tolist()}) == 6
    assert_close(cache.sequence(H), plainly(net, tokens))
    assert cache.verify()


@pytest.mark.parametrize("is_sampled", [False, True])
@pytest.mark.parametrize("returned", [1, 3])
def test_a_row_follows_its_beam(returned: int, is_sampled: bool, net: Any, model: Model) -> None:
    options = {"num_beams": 4, "num_return_sequences": returned, "do_sample": is_sampled}
    cache, tokens = generated(model, IDS, **options)
    assert len(tokens) == 2 * returned
    assert [entry.output.shape[0] for entry in cache["transformer.h.1.ln_1"]] == [8] * 6
    assert_close(cache.sequence(H), plainly(net, tokens))
    assert cache.verify()


def test_beams_that_end_early_are_valid_up_to_their_end(net: Any, model: Model) -> None:
    free = generated(model, IDS, num_beams=4)[1]
    end = int(free[0, 10])
    cache, tokens = generated(model, IDS, num_beams=4, eos_token_id=end, max_new_tokens=8)
    sequence = cache.sequence(H)
    assert not bool(sequence.valid.all()), "one row ends before the other"
    assert torch.equal(sequence.tokens, tokens[:, :-1])
    assert_close(sequence[sequence.valid], plainly(net, tokens)[sequence.valid])
    assert cache.verify()


def test_rows_are_valid_up_to_their_end(net: Any, model: Model) -> None:
    free = generated(model, IDS)[1]
    end = next(int(each) for each in free[0, 9:] if each not in free[1, 8:])
    cache, tokens = generated(model, IDS, eos_token_id=end, pad_token_id=0)
    sequence = cache.sequence(H)
    stop = tokens[0].tolist().index(end, 8) + 1
    expected = torch.ones(2, sequence.shape[1], dtype=torch.bool)
    expected[0, stop:] = False
    assert torch.equal(sequence.valid, expected)
    assert 8 < stop < sequence.shape[1]
    assert sequence.positions[0].tolist() == [*range(stop), *[-1] * (sequence.shape[1] - stop)]
    assert_close(sequence[sequence.valid], plainly(net, tokens)[sequence.valid])
    assert cache.verify()


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("length", [3, 6, 8])
def test_a_prompt_may_be_given_embedded(length: int, beams: int, net: Any, model: Model) -> None:
    embeds = net.get_input_embeddings()(IDS[:, :length]) * 1.5
    with model.generate(inputs_embeds=embeds, **GREEDY, num_beams=beams) as tracer:
        cache = tracer.cache()
        new = tracer.result
    sequence = cache.sequence(H)
    both = torch.cat([embeds, net.get_input_embeddings()(new[:, :-1])], 1)
    expected = run_plainly(net, {"inputs_embeds": both}, [H])[H]
    assert_close(sequence, expected)
    unknown = -torch.ones(2, length)
    assert sequence.tokens.tolist() == torch.cat([unknown, new[:, :-1]], 1).tolist()
    assert cache.verify()


def test_a_kv_cache_that_is_given_is_gone_on_with(net: Any, model: Model) -> None:
    kv_cache = net(REPEATING[:, :6], use_cache=True).past_key_values
    cache, tokens = generated(model, past_key_values=kv_cache)
    sequence = cache.sequence(H)
    assert sequence.columns == [*range(6, 15)]
    assert sequence.positions.tolist() == [[*range(6, 15)]]
    assert_close(sequence, plainly(net, tokens)[:, 6:])
    assert cache.verify()


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=str)
def test_a_kv_cache_that_lacks_its_first_layer_is_no_measure_of_positions(
    options: dict[str, Any], net: Any, model: Model
) -> None:
    with model.edit() as without:
        hidden = model.transformer.h[0].inputs[0][0]
        model.transformer.h[0].skip(hidden if IS_TRANSFORMERS_5 else (hidden,))
    with without.generate(IDS, **GREEDY, **options) as tracer:
        model.transformer.h[1].output.at("generated").edit(lambda hidden: hidden * 2)
        cache = tracer.cache("transformer.*")
        tokens = tracer.result
    sequence = cache.sequence(H)
    assert torch.equal(sequence.tokens, tokens[:, :-1])
    embedded = cache.sequence("transformer.drop")
    seen: list[Any] = []
    handle = net.transformer.h[1].register_forward_hook(lambda _m, _a, out: seen.append(out))
    net.transformer.h[1](torch.Tensor(embedded), attention_mask=causal(13))
    handle.remove()
    expected = seen[0] if isinstance(seen[0], Tensor) else seen[0][0]
    expected[:, 8:] *= 2
    assert_close(sequence, expected)


# -- which values ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["t5", "bart", "whisper"])
def test_a_decoder_has_a_sequence_and_an_encoder_none(name: str) -> None:
    net, inputs = make(name)
    model: Any = Model(net)
    inputs = {key: value for key, value in inputs.items() if key != "decoder_input_ids"}
    with model.generate(**inputs, **GREEDY, num_beams=3) as tracer:
        cache = tracer.cache()
    root = "" if name == "t5" else "model."
    stack = "block" if name == "t5" else "layers"
    sequence = cache.sequence(f"{root}decoder.{stack}.1")
    path = f"{root}decoder.{stack}.1"
    given = {**inputs, "decoder_input_ids": sequence.tokens}
    assert_close(sequence, run_plainly(net, given, [path])[path])
    with pytest.raises(CacheError, match="outside the decoder's forwards"):
        cache.sequence(f"{root}encoder.{stack}.1")
    found = cache.verify()
    assert found, found
    encoder = f"model.{root}encoder.{stack}.1.output"
    assert next(check for check in found if check.site == encoder).is_right


def test_one_of_several_calls_in_a_forward_is_named() -> None:
    net: Any = make("gpt2", initializer_range=0.2)[0]
    net.transformer.h[1].mlp = net.transformer.h[0].mlp
    seen: list[Tensor] = []
    model = Model(net)
    cache, tokens = generated(model, IDS, prefill_chunk_size=3)
    path = "transformer.h.0.mlp"
    handle = net.transformer.h[0].mlp.register_forward_hook(lambda _m, _a, out: seen.append(out))
    net(tokens[:, :-1])
    handle.remove()
    for call in (0, 1):
        assert_close(cache.sequence(path, call=call), seen[call])
    with pytest.raises(CacheError, match=r"cache\.sequence\(path, call=0\)"):
        cache.sequence(path)
    with pytest.raises(CacheError, match="has no call=2 in any forward"):
        cache.sequence(path, call=2)
    found = cache.verify()
    assert found
    assert {f"model.{path}.output", f"model.{path}.output (call 1)"} < {each.site for each in found}


def test_a_head_that_runs_for_the_last_token_alone_is_part_of_a_sequence(
    net: Any, model: Model
) -> None:
    cache, tokens = generated(model, IDS)
    with pytest.raises(CacheError, match=r"no value for 7 of 13 positions \(0 to 6\)"):
        cache.sequence("lm_head")
    sequence = cache.sequence("lm_head", partial=True)
    assert sequence.columns == [*range(7, 13)]
    assert sequence.positions.tolist() == [[*range(7, 13)]] * 2
    assert torch.equal(sequence.tokens, tokens[:, 7:-1])
    assert_close(sequence, plainly(net, tokens, "lm_head")[:, 7:])


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_a_router_has_rows_and_positions_in_one_axis(name: str) -> None:
    net, inputs = make(name)
    path = "model.layers.1.mlp.gate" if IS_TRANSFORMERS_5 or name == "qwen3_moe" else ""
    path = path or "model.layers.1.block_sparse_moe.gate"
    cache, tokens = generated(Model(net), inputs["input_ids"])
    with pytest.raises(CacheError, match=r"flat=True"):
        cache.sequence(path)
    expected = plainly(net, tokens, path).unflatten(0, (2, 13))
    assert_close(cache.sequence(path, flat=True), expected)


def test_patterns_of_attention_are_no_sequence() -> None:
    cache, _ = generated(Model(make("gptj")[0]), IDS)
    assert cache["transformer.h.0.attn.attn_dropout"][1].output.shape == (2, 4, 1, 9)
    with pytest.raises(CacheError, match="values of other sizes in each forward"):
        cache.sequence("transformer.h.0.attn.attn_dropout")


def test_inputs_have_sequences_too(net: Any, model: Model) -> None:
    with model.generate(IDS, **GREEDY) as tracer:
        cache = tracer.cache(H, include_inputs=True)
        tokens = tracer.result
    assert_close(cache.sequence(H, of="input"), plainly(net, tokens, "transformer.h.0"))
    assert_close(cache.sequence(H), plainly(net, tokens))
    wrong: Any = "inputs"
    with pytest.raises(CacheError, match="of= is 'output' or 'input'"):
        cache.sequence(H, of=wrong)
    assert len(cache.verify()) == 2


def test_what_has_no_tensor_and_what_was_not_recorded_is_told(model: Model) -> None:
    with model.generate(IDS, **GREEDY) as tracer:
        cache = tracer.cache([H], include_output=False, include_inputs=True)
    with pytest.raises(CacheError, match="has no output in this cache"):
        cache.sequence(H)


def test_the_last_token_is_run_once_more_on_request(net: Any, model: Model) -> None:
    cache, tokens = generated(model, IDS)
    sequence = cache.sequence(H, include_last=True)
    expected = run_plainly(net, {"input_ids": tokens}, [H])[H]
    assert_close(sequence, expected)
    assert torch.equal(sequence.tokens, tokens)


# -- which runs -----------------------------------------------------------------------------------


def test_a_run_that_is_stopped_has_what_it_went_over(net: Any, model: Model) -> None:
    with model.generate(IDS, **GREEDY) as tracer:
        cache = tracer.cache("transformer.h.*")
        for step in tracer.iter[:]:
            model.transformer.h[1].output
            if step == 3:
                tracer.stop()
    sequence = cache.sequence("transformer.h.0")
    assert sequence.shape[1] == 8 + 3
    tokens = net.generate(IDS, **GREEDY)
    assert torch.equal(sequence.tokens, tokens[:, :11])
    assert_close(sequence, plainly(net, tokens, "transformer.h.0")[:, :11])
    assert cache.verify()


def test_a_run_that_is_stopped_in_its_first_step_has_the_prompt(model: Model) -> None:
    with model.generate(IDS, **GREEDY) as tracer:
        cache = tracer.cache("transformer.h.*")
        h0 = model.transformer.h[0].hidden
        tracer.stop()
    sequence = cache.sequence("transformer.h.0")
    assert torch.equal(sequence.as_subclass(Tensor), h0)
    assert torch.equal(sequence.tokens, IDS)
    with pytest.raises(UnknownPathError, match="ended before the module was called"):
        cache.sequence("transformer.h.1")


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_return_sequences": 2}], ids=str)
def test_the_cache_of_an_invoke_has_the_sequences_of_its_rows(
    options: dict[str, Any], net: Any, model: Model
) -> None:
    options = {**GREEDY, **options, "do_sample": "num_return_sequences" in options}
    torch.manual_seed(0)
    with model.generate(**options) as tracer:
        with tracer.invoke(IDS[:1]):
            first = tracer.cache("transformer.h.*")
        with tracer.invoke(IDS[1:]):
            second = tracer.cache("transformer.h.*")
            model.transformer.h[0].output.at("prompt")[:] *= 2
        with tracer.invoke():
            tokens = tracer.result
    each = len(tokens) // 2
    assert torch.equal(first.sequence(H).tokens, tokens[:each, :-1])
    assert torch.equal(second.sequence(H).tokens, tokens[each:, :-1])
    assert_close(first.sequence(H), plainly(net, tokens[:each]))
    assert first.verify()
    assert second.verify()


def test_texts_of_other_lengths_have_positions_of_their_own() -> None:
    tiny = LanguageModel("tracekit/tiny")
    texts = ["The Eiffel Tower is in the city of", "Paris"]
    with tiny.generate(texts, **GREEDY) as tracer:
        cache = tracer.cache("transformer.h.*")
    both = cache.sequence(H)
    for row, text in enumerate(texts):
        with tiny.generate(text, **GREEDY) as tracer:
            alone = tracer.cache("transformer.h.*")
        own = alone.sequence(H)
        valid = both.valid[row]
        count = min(int(valid.sum()), own.shape[1])
        assert both.positions[row][valid].tolist() == [*range(int(valid.sum()))]
        assert_close(both[row][valid][:count], own[0, :count])
    assert not bool(both.valid.all())
    assert cache.verify()


def test_blocks_in_place_have_the_same_sequences(net: Any, model: Model) -> None:
    with settings.changed(lift_blocks=False):
        with model.generate(IDS, **GREEDY) as tracer:
            cache = tracer.cache("transformer.h.*")
            for _ in tracer.iter[:]:
                model.transformer.h[0].hidden[:, -1] *= 2
            tokens = tracer.result
    assert cache.sequence(H).shape == (2, tokens.shape[1] - 1, 32)
    assert cache.verify()


def test_threads_have_sequences_of_their_own(net: Any, model: Model) -> None:
    found: dict[int, tuple[Cache, Tensor]] = {}

    def run(number: int) -> None:
        with torch.no_grad():
            found[number] = generated(model, REPEATING + number)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(4):
        cache, tokens = found[number]
        assert torch.equal(tokens[:, :10], REPEATING + number)
        assert_close(cache.sequence(H), plainly(net, tokens))
        assert cache.verify()


@pytest.mark.usefixtures("without_collector")
def test_fifty_generations_with_sequences_and_edits_leave_nothing() -> None:
    net = make("gpt2")[0]
    model = Model(net)
    untouched = state_of(net)

    def run() -> None:
        with model.generate(IDS, do_sample=False, max_new_tokens=3) as tracer:
            cache = tracer.cache()
            model.transformer.h[0].output.at("generated")[:] += 1
            for _ in tracer.iter[:]:
                model.transformer.h[1].hidden[:, -1] += 1
        assert cache.sequence(H).shape == (2, 10, 32)
        assert cache.verify()

    def living() -> int:
        return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())

    for _ in range(3):
        run()
    gc.collect()
    before = living()
    for _ in range(50):
        run()
    assert living() == before
    assert state_of(net) == untouched


def test_a_cache_that_is_made_behind_the_end_of_the_run_says_so(model: Model) -> None:
    with pytest.raises(CacheError, match="had passed"), model.generate(IDS, **GREEDY) as tracer:
        tracer.result  # it waits for the end
        tracer.cache()
