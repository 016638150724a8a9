"""A run behind a prefix is the run of the whole text, and whatever it does the prefix stays."""

from __future__ import annotations

import copy
import gc
import hashlib
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from tests.tiny_models import make
from tracekit import LanguageModel, Prefix
from tracekit.core.quirks import is_before_5
from tracekit.errors import (
    InputError,
    LoadingError,
    OverwrittenError,
    PaddingError,
    TracekitError,
    UnsupportedError,
)
from tracekit.models.kv_layers import layers_of, tensors_of
from tracekit.models.kv_work import Buffer

PROMPT, REST = 9, 4
GREEDY: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False}


def ids(rows: int, length: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(10, 60, (rows, length), generator=generator)


@pytest.fixture
def model() -> LanguageModel:
    return LanguageModel(make("gpt2")[0])


@pytest.fixture
def prompt() -> Tensor:
    return ids(1, PROMPT)


@pytest.fixture
def prefix(model: LanguageModel, prompt: Tensor) -> Prefix:
    return model.prefill(prompt)


def whole(model: LanguageModel, prompt: Tensor, rest: Tensor) -> Tensor:
    """The logits of the rest, by one pass over everything."""
    text = torch.cat([prompt.expand(rest.shape[0], -1), rest], 1)
    with torch.no_grad():
        return model.module(text, use_cache=False).logits[:, prompt.shape[1] :]


def logits(model: LanguageModel, rest: Any, prefix: Any, **kwargs: Any) -> Tensor:
    with model.trace(rest, prefix=prefix, **kwargs):
        out = model.lm_head.output
    return out.detach()


def checksum(prefix: Prefix) -> str:
    found = hashlib.sha256()
    for layer in layers_of(prefix._kv_cache):
        for tensor in tensors_of(layer):
            found.update(tensor.contiguous().numpy().tobytes())
    for tensor in (prefix.tokens, prefix.attention_mask):
        found.update(tensor.numpy().tobytes())
    return found.hexdigest()


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


# -- what it is -----------------------------------------------------------------------------------


def test_a_prefix_tells_what_it_holds(model: LanguageModel, prompt: Tensor) -> None:
    mask = torch.ones_like(prompt)
    prefix = model.prefill(prompt)
    assert len(prefix) == PROMPT
    assert prefix.rows == 1
    assert torch.equal(prefix.tokens, prompt)
    assert torch.equal(prefix.attention_mask, mask)
    floats = 2 * 2 * PROMPT * 32  # keys and values, of two layers, of so many heads and widths
    assert prefix.nbytes == 4 * floats + 8 * 2 * PROMPT
    assert repr(prefix) == (
        "<Prefix of 9 tokens: GPT2LMHeadModel, 2 layers, float32 on cpu, 4.8 kB>"
    )


def test_what_a_prefix_hands_out_are_copies(prefix: Prefix) -> None:
    before = checksum(prefix)
    prefix.tokens.zero_()
    prefix.attention_mask.zero_()
    assert checksum(prefix) == before


def test_a_prompt_is_run_once_however_many_runs_begin_with_it(
    model: LanguageModel, prompt: Tensor
) -> None:
    lengths: list[int] = []
    first = model.module.transformer.wte
    handle = first.register_forward_hook(lambda _, args, __: lengths.append(args[0].shape[1]))
    prefix = model.prefill(prompt)
    for seed in range(3):
        logits(model, ids(1, REST, seed), prefix)
    handle.remove()
    assert lengths == [PROMPT, REST, REST, REST]


def test_a_prefix_has_no_gradients_and_is_no_inference_tensor(
    model: LanguageModel, prompt: Tensor
) -> None:
    with torch.inference_mode():
        prefix = model.prefill(prompt)
    held = [tensor for layer in layers_of(prefix._kv_cache) for tensor in tensors_of(layer)]
    assert held
    assert not any(tensor.requires_grad or tensor.is_inference() for tensor in held)


# -- the same numbers -----------------------------------------------------------------------------


@pytest.mark.parametrize("has_grad", [True, False])
@pytest.mark.parametrize("rows", [1, 3])
def test_a_trace_behind_a_prefix_is_the_trace_of_all(
    model: LanguageModel, prompt: Tensor, prefix: Prefix, rows: int, has_grad: bool
) -> None:
    rest = ids(rows, REST, 1)
    with torch.set_grad_enabled(has_grad):
        close(logits(model, rest, prefix), whole(model, prompt, rest))


def test_every_module_has_the_values_of_its_positions(
    model: LanguageModel, prompt: Tensor, prefix: Prefix
) -> None:
    rest = ids(1, REST, 1)
    with model.trace(rest, prefix=prefix) as tracer:
        cache = tracer.cache("transformer.h.*.*")
    with model.trace(torch.cat([prompt, rest], 1)) as tracer:
        plain = tracer.cache("transformer.h.*.*")
    paths = [
        f"model.transformer.h.{layer}.{name}" for layer in range(2) for name in ("attn", "mlp")
    ]
    for path in paths:
        close(cache[path].hidden, plain[path].hidden[:, PROMPT:])


def test_text_goes_on_without_special_tokens() -> None:
    model = LanguageModel("tracekit/tiny")
    prefix = model.prefill("Once upon a time there")
    asked: list[Any] = []
    tokenizer = model.tokenizer

    def noted(*args: Any, **kwargs: Any) -> Any:
        asked.append(kwargs.get("add_special_tokens"))
        return tokenizer(*args, **kwargs)

    other = LanguageModel(model.module, tokenizer=tokenizer)
    object.__setattr__(other, "_tokenizer", noted)
    with other.trace(" was a dog", prefix=prefix):
        out = other.lm_head.output
    assert asked == [False]
    with model.trace("Once upon a time there was a dog"):
        plain = model.lm_head.output
    close(out, plain[:, len(prefix) :])


@pytest.mark.parametrize("side", ["left", "right"])
def test_rests_of_different_lengths_are_each_what_they_are_alone(
    model: LanguageModel, prompt: Tensor, prefix: Prefix, side: str
) -> None:
    padded = LanguageModel(model.module, padding_side=side)
    prefix = padded.prefill(prompt)
    rows = [ids(1, length, length) for length in (5, 2, 3)]
    out = logits(padded, [row[0].tolist() for row in rows], prefix)
    for row, padded_row in zip(rows, out, strict=True):
        length = row.shape[1]
        own = padded_row[-length:] if side == "left" else padded_row[:length]
        close(own[None], whole(model, prompt, row))


def test_invokes_behind_one_prefix_are_each_what_they_are_alone(
    model: LanguageModel, prompt: Tensor, prefix: Prefix
) -> None:
    rows = [ids(1, length, length) for length in (5, 2, 3)]
    outs: list[Tensor] = []
    with model.trace(prefix=prefix) as tracer:
        for row in rows:
            with tracer.invoke(row):
                outs.append(model.lm_head.output)
    for row, out in zip(rows, outs, strict=True):
        close(out[:, -row.shape[1] :], whole(model, prompt, row))


def test_an_edit_in_one_invoke_leaves_the_others(
    model: LanguageModel, prompt: Tensor, prefix: Prefix
) -> None:
    rest = ids(1, REST, 1)
    with model.trace(prefix=prefix) as tracer:
        with tracer.invoke(rest):
            model.transformer.h[0].mlp.output[:] = 0
            edited = model.lm_head.output
        with tracer.invoke(rest):
            plain = model.lm_head.output
    close(plain, whole(model, prompt, rest))
    assert not torch.allclose(edited, plain, atol=1e-3)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_prefix_of_several_rows_gives_each_its_own(model: LanguageModel, side: str) -> None:
    model = LanguageModel(model.module, padding_side=side)
    prompts = [ids(1, length, length) for length in (7, 4, 6)]
    prefix = model.prefill([row[0].tolist() for row in prompts])
    rest = ids(3, REST, 1)
    out = logits(model, rest, prefix)
    for index, row in enumerate(prompts):
        close(out[index : index + 1], whole(model, row, rest[index : index + 1]))


def test_run_takes_a_prefix(model: LanguageModel, prompt: Tensor, prefix: Prefix) -> None:
    rest = ids(2, REST, 1)
    outcome = model.run(rest, prefix=prefix, capture="lm_head")
    close(outcome.cache["model.lm_head"].output, whole(model, prompt, rest))


def test_a_call_takes_a_prefix(model: LanguageModel, prompt: Tensor, prefix: Prefix) -> None:
    rest = ids(2, REST, 1)
    close(model(rest, prefix=prefix).logits.detach(), whole(model, prompt, rest))


def test_a_scan_behind_a_prefix_has_the_shapes_of_the_trace(
    model: LanguageModel, prefix: Prefix
) -> None:
    before = checksum(prefix)
    with model.scan(ids(2, REST), prefix=prefix):
        attention = model.transformer.h[1].attn.output[0].shape
        shape = model.lm_head.output.shape
    assert tuple(shape) == (2, REST, 128)
    assert tuple(attention) == (2, REST, 32)
    assert checksum(prefix) == before


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 3},
        {"num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 3},
        {"prompt_lookup_num_tokens": 2, "eos_token_id": 2},
        {"max_new_tokens": 90},  # longer than the first buffers
        {"prefill_chunk_size": 2},
        {"guidance_scale": 1.5},
    ],
    ids=str,
)
def test_generation_behind_a_prefix_gives_the_sequences_of_the_whole_text(
    model: LanguageModel, prompt: Tensor, prefix: Prefix, options: dict[str, Any]
) -> None:
    if "prefill_chunk_size" in options and is_before_5():
        with pytest.raises(UnsupportedError, match="runs the prefix again in chunks"):
            model.generate(ids(1, REST), prefix=prefix, **options)
        return
    rows = 1 if "prompt_lookup_num_tokens" in options else 2
    rest = ids(rows, REST, 1)
    text = torch.cat([prompt.expand(rows, -1), rest], 1)
    before = checksum(prefix)
    options = {**GREEDY, **options}
    torch.manual_seed(0)
    plain = model.module.generate(text, attention_mask=torch.ones_like(text), **options)
    torch.manual_seed(0)
    assert torch.equal(model.generate(rest, prefix=prefix, **options), plain)
    torch.manual_seed(0)
    with model.generate(rest, prefix=prefix, **options) as tracer:
        tokens = tracer.result
    assert torch.equal(tokens, plain)
    assert checksum(prefix) == before


def test_steps_behind_a_prefix_have_the_logits_of_the_whole_text(
    model: LanguageModel, prompt: Tensor, prefix: Prefix
) -> None:
    rest = ids(2, REST, 1)
    seen: list[Tensor] = []
    with model.generate(rest, prefix=prefix, **GREEDY) as tracer:
        for _ in tracer.iter[:]:
            seen.append(model.lm_head.output[:, -1])
        tokens = tracer.result
    plain = model.module(tokens[:, :-1], use_cache=False).logits[:, PROMPT + REST - 1 :]
    close(torch.stack(seen, 1), plain.detach())


def test_invokes_generate_behind_one_prefix(
    model: LanguageModel, prompt: Tensor, prefix: Prefix
) -> None:
    rows = [ids(1, length, length) for length in (5, 2)]
    tokens: list[Tensor] = []
    with model.generate(prefix=prefix, **GREEDY) as tracer:
        for row in rows:
            with tracer.invoke(row):
                tokens.append(tracer.result)
    for row, found in zip(rows, tokens, strict=True):
        text = torch.cat([prompt, row], 1)
        plain = model.module.generate(text, attention_mask=torch.ones_like(text), **GREEDY)
        assert torch.equal(found[:, -5:], plain[:, -5:])


def test_steps_of_a_generation_behind_a_prefix_can_be_counted(
    model: LanguageModel, prefix: Prefix
) -> None:
    model.module.generation_config.eos_token_id = None
    with model.generate(ids(1, REST), prefix=prefix, max_length=PROMPT + REST + 3) as tracer:
        for step in tracer.iter[-1]:
            last = step
    assert last == 2


# -- gradients ------------------------------------------------------------------------------------


def test_gradients_go_through_the_rest_and_the_prefix_is_a_constant(
    model: LanguageModel, prompt: Tensor, prefix: Prefix
) -> None:
    rest = ids(2, REST, 1)
    module = model.module
    with torch.no_grad():
        constant = module(prompt, use_cache=True).past_key_values
    for layer in constant.layers:
        layer.keys, layer.values = (
            each.expand(2, -1, -1, -1) for each in (layer.keys, layer.values)
        )
    module(rest, past_key_values=constant).logits.pow(2).sum().backward()
    plain = {name: weight.grad for name, weight in module.named_parameters()}
    module.zero_grad()
    with model.trace(rest, prefix=prefix):
        model.lm_head.output.pow(2).sum().backward()
    for name, weight in module.named_parameters():
        torch.testing.assert_close(weight.grad, plain[name], atol=1e-4, rtol=1e-4)


# -- never changed --------------------------------------------------------------------------------


def stopped(model: LanguageModel, prefix: Prefix) -> None:
    with model.trace(ids(1, REST), prefix=prefix) as tracer:
        model.transformer.h[0].mlp.output.zero_()
        tracer.stop()


def failed(model: LanguageModel, prefix: Prefix) -> None:
    with pytest.raises(ZeroDivisionError), model.trace(ids(1, REST), prefix=prefix):
        model.transformer.h[0].mlp.output[:] = 1 / 0


def edited_in_place(model: LanguageModel, prefix: Prefix) -> None:
    with torch.no_grad(), model.trace(ids(1, REST), prefix=prefix):
        model.transformer.h[0].attn.c_attn.output.zero_()
        kept = model.output.past_key_values
    for layer in kept.layers:
        layer.keys.zero_()
        layer.values.fill_(3)


def beams(model: LanguageModel, prefix: Prefix) -> None:
    model.generate(ids(2, REST), prefix=prefix, num_beams=2, **GREEDY)


def emptied(model: LanguageModel, prefix: Prefix) -> None:
    kept = prefix.fork(2)
    kept.reset()


def cut(model: LanguageModel, prefix: Prefix) -> None:
    kept = prefix.fork(1)
    kept.crop(-3)
    kept.layers[0].keys.zero_()


@pytest.mark.parametrize(
    "use", [stopped, failed, edited_in_place, beams, emptied, cut], ids=lambda use: use.__name__
)
def test_no_use_changes_a_prefix(
    model: LanguageModel,
    prompt: Tensor,
    prefix: Prefix,
    use: Callable[[LanguageModel, Prefix], None],
) -> None:
    before = checksum(prefix)
    rest = ids(1, REST, 1)
    with torch.no_grad():
        for _ in range(3):
            use(model, prefix)
            assert checksum(prefix) == before
            close(logits(model, rest, prefix), whole(model, prompt, rest))


def test_runs_in_several_threads_do_not_meet(
    model: LanguageModel, prompt: Tensor, prefix: Prefix
) -> None:
    before = checksum(prefix)
    together = Barrier(4)
    rests = [ids(1, REST, seed) for seed in range(4)]
    plain = [whole(model, prompt, rest) for rest in rests]

    def run(index: int) -> list[Tensor]:
        outs: list[Tensor] = []
        with torch.no_grad():
            for _ in range(5):
                together.wait(20)
                outs.append(logits(model, rests[index], prefix))
        return outs

    with ThreadPoolExecutor(4) as threads:
        for index, outs in enumerate(threads.map(run, range(4))):
            for out in outs:
                close(out, plain[index])
    assert checksum(prefix) == before


def test_a_fork_shares_the_memory_of_the_prefix_until_it_appends(prefix: Prefix) -> None:
    kept = prefix.fork(3)
    for own, layer in zip(layers_of(prefix._kv_cache), kept.layers, strict=True):
        for name in ("keys", "values"):
            raw = vars(layer)[name]
            assert raw.untyped_storage().data_ptr() == getattr(own, name).data_ptr()
            assert raw.shape[0] == 3
    assert kept.get_seq_length() == PROMPT  # asking copies nothing
    raw = vars(kept.layers[0])["keys"]
    assert raw.data_ptr() == next(layers_of(prefix._kv_cache)).keys.data_ptr()


def test_who_reads_the_keys_of_a_fork_has_a_copy_and_the_run_uses_it(
    model: LanguageModel, prompt: Tensor, prefix: Prefix
) -> None:
    """An edit of the prefix's keys is made in this run, and in no other."""
    before = checksum(prefix)
    rest = ids(1, REST, 1)

    def forget(_: Any, args: Any, kwargs: Any) -> None:
        kwargs["past_key_values"].layers[0].values.zero_()

    for has_grad in (True, False):
        with torch.set_grad_enabled(has_grad):
            handle = model.module.transformer.h[0].attn.register_forward_pre_hook(
                forget, with_kwargs=True
            )
            out = logits(model, rest, prefix)
            handle.remove()
            assert not torch.allclose(out, whole(model, prompt, rest), atol=1e-3)
            close(logits(model, rest, prefix), whole(model, prompt, rest))
    assert checksum(prefix) == before


def test_a_prefix_that_was_changed_in_place_says_so(model: LanguageModel, prefix: Prefix) -> None:
    prefix.entries[0].past_keys.zero_()
    with pytest.raises(OverwrittenError, match="changed in place"):
        logits(model, ids(1, REST), prefix)


# -- buffers --------------------------------------------------------------------------------------


def memory_of(kv_cache: Any) -> set[int]:
    return {vars(layer)["keys"].untyped_storage().data_ptr() for layer in kv_cache.layers}


def kept_of(model: LanguageModel, rest: Tensor, prefix: Prefix) -> Any:
    with torch.no_grad(), model.trace(rest, prefix=prefix):
        kept = model.output.past_key_values
    return kept


def test_buffers_are_used_again_when_nobody_holds_them(
    model: LanguageModel, prefix: Prefix
) -> None:
    first = memory_of(kept_of(model, ids(1, REST, 1), prefix))
    second = memory_of(kept_of(model, ids(1, REST, 2), prefix))
    assert first == second


def test_keys_that_are_held_are_not_overwritten_by_later_runs(
    model: LanguageModel, prompt: Tensor, prefix: Prefix
) -> None:
    first = kept_of(model, ids(1, REST, 1), prefix)
    copies = [(layer.keys.clone(), layer.values.clone()) for layer in first.layers]
    second = kept_of(model, ids(1, REST, 2), prefix)
    model.generate(ids(1, REST, 3), prefix=prefix, **GREEDY)
    assert not memory_of(first) & memory_of(second)
    for layer, (keys, values) in zip(first.layers, copies, strict=True):
        assert torch.equal(layer.keys, keys)
        assert torch.equal(layer.values, values)


@pytest.mark.parametrize(
    "taken",
    [
        lambda keys: keys,
        lambda keys: keys[:, :1, 2:],
        lambda keys: keys.data,
        lambda keys: keys.detach(),
        lambda keys: keys.numpy(),
        lambda keys: keys.untyped_storage(),
        lambda keys: keys.transpose(1, 2).unbind(0),
        lambda keys: keys._base,
        lambda keys: torch.from_dlpack(keys),
    ],
    ids=["itself", "view", "data", "detached", "numpy", "storage", "unbound", "base", "dlpack"],
)
def test_one_view_of_the_keys_keeps_its_buffer_from_being_used_again(
    model: LanguageModel, prefix: Prefix, taken: Callable[[Tensor], Any]
) -> None:
    kept = kept_of(model, ids(1, REST, 1), prefix)
    place = kept.layers[1].keys.untyped_storage().data_ptr()
    held = taken(kept.layers[1].keys)
    del kept
    later = kept_of(model, ids(1, REST, 2), prefix)
    assert place not in memory_of(later)
    del held, later


def test_buffers_made_in_inference_mode_serve_any_run(
    model: LanguageModel, prompt: Tensor, prefix: Prefix
) -> None:
    rest = ids(1, REST, 2)
    for _ in range(2):
        with torch.inference_mode():
            inferred = logits(model, rest, prefix)
        with torch.no_grad():
            plain = logits(model, rest, prefix)
        with_grad = logits(model, rest, prefix)
        for out in (inferred, plain, with_grad):
            close(out.clone(), whole(model, prompt, rest))


def test_a_buffer_changed_in_inference_mode_is_not_used_again(
    model: LanguageModel, prompt: Tensor, prefix: Prefix
) -> None:
    rest = ids(1, REST, 2)
    with torch.inference_mode():
        with model.trace(rest, prefix=prefix):
            kept = model.output.past_key_values
        kept.layers[0].values.zero_()
        del kept
        close(logits(model, rest, prefix).clone(), whole(model, prompt, rest))


def test_a_fork_of_a_failed_run_never_writes_into_the_buffers_of_a_later_one(
    model: LanguageModel, prompt: Tensor, prefix: Prefix
) -> None:
    forks: list[Any] = []

    def fail(_: Any, args: Any, kwargs: Any) -> None:
        forks.append(kwargs["past_key_values"])
        raise ZeroDivisionError

    attention = model.module.transformer.h[0].attn
    handle = attention.register_forward_pre_hook(fail, with_kwargs=True)
    with pytest.raises(ZeroDivisionError):
        kept_of(model, ids(1, REST, 1), prefix)
    handle.remove()
    later = kept_of(model, ids(1, REST, 2), prefix)
    copies = [layer.keys.clone() for layer in later.layers]
    rest = ids(1, REST, 3)
    with torch.no_grad():
        by_hand = model.module(rest, past_key_values=forks[0]).logits
    close(by_hand, whole(model, prompt, rest))
    for layer, keys in zip(later.layers, copies, strict=True):
        assert torch.equal(layer.keys, keys)


def test_a_shallow_copy_of_a_fork_appends_for_itself(
    model: LanguageModel, prompt: Tensor, prefix: Prefix
) -> None:
    work = prefix.pool.lend(1, REST)
    one = prefix.fork(1, work)
    other = copy.copy(one)
    other.layers = [copy.copy(layer) for layer in one.layers]
    rests = [ids(1, REST, 1), ids(1, REST, 2)]
    with torch.no_grad():
        for rest, kv_cache in zip(rests, (one, other), strict=True):
            close(model.module(rest, past_key_values=kv_cache).logits, whole(model, prompt, rest))
        more = ids(1, 2, 3)
        for rest, kv_cache in zip(rests, (one, other), strict=True):
            text = torch.cat([prompt, rest], 1)
            close(model.module(more, past_key_values=kv_cache).logits, whole(model, text, more))


def test_a_buffer_that_was_changed_in_place_is_not_used_again(
    model: LanguageModel, prompt: Tensor, prefix: Prefix
) -> None:
    kept = kept_of(model, ids(1, REST, 1), prefix)
    kept.layers[0].keys[:, :, :2] = 0  # of the prefix's own positions
    del kept
    rest = ids(1, REST, 2)
    with torch.no_grad():
        close(logits(model, rest, prefix), whole(model, prompt, rest))


def test_a_captured_view_of_keys_in_a_generation_is_not_taken_for_overwritten(
    model: LanguageModel, prefix: Prefix
) -> None:
    """What a step appends lies behind what an earlier one has captured."""
    lengths: list[int] = []
    kept: list[Tensor] = []

    def keep(_: Any, args: Any, kwargs: Any, output: Any) -> None:
        kept.append(vars(kwargs["past_key_values"].layers[0])["keys"])
        lengths.append(kept[-1]._version)

    attention = model.module.transformer.h[0].attn
    handle = attention.register_forward_hook(keep, with_kwargs=True)
    model.generate(ids(1, REST), prefix=prefix, **GREEDY)
    handle.remove()
    assert len({tensor.untyped_storage().data_ptr() for tensor in kept}) == 1
    assert len(set(lengths)) == 1


def test_where_holders_cannot_be_counted_buffers_are_never_used_again(
    model: LanguageModel, prefix: Prefix, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tracekit.models import kv_work

    monkeypatch.setattr(kv_work, "_count", None)
    first = kept_of(model, ids(1, REST, 1), prefix)
    buffer = Buffer(torch.ones(1, 1, 2, 3), 4)
    assert not buffer.is_untouched
    assert not prefix.pool._free
    del first


def test_an_idle_buffer_is_untouched_and_one_that_is_seen_is_not() -> None:
    buffer = Buffer(torch.ones(1, 1, 2, 3), 4)
    assert buffer.is_untouched
    seen = buffer.append(torch.zeros(1, 1, 1, 3), 2)
    assert not buffer.is_untouched
    assert seen.shape == (1, 1, 3, 3)
    del seen
    assert buffer.is_untouched


def test_a_generation_without_an_end_in_sight_gets_no_room_for_all_of_it(
    model: LanguageModel, prefix: Prefix
) -> None:
    options: dict[str, Any] = {"max_new_tokens": 10**9, "do_sample": False, "max_time": 0.0}
    model.generate(ids(1, REST), prefix=prefix, **options)
    assert [work.room for work in prefix.pool._free] == [1088]


def test_a_prefix_goes_with_its_last_name(model: LanguageModel, prompt: Tensor) -> None:
    prefix = model.prefill(prompt)
    with torch.no_grad():
        logits(model, ids(1, REST), prefix)
    model.generate(ids(1, REST), prefix=prefix, **GREEDY)
    dead = weakref.ref(prefix)
    gc.collect()
    gc.disable()
    try:
        stopped(model, prefix)
        with model.trace(prefix=prefix) as tracer:
            for seed in range(2):
                with tracer.invoke(ids(1, REST, seed)):
                    _ = model.lm_head.output
        with model.generate(ids(1, REST), prefix=prefix, **GREEDY) as tracer:
            cache = tracer.cache("lm_head")
        del prefix, tracer  # which knows the inputs of its run
        assert dead() is None
        assert len(cache["model.lm_head"]) == 5
    finally:
        gc.enable()


# -- lasting edits --------------------------------------------------------------------------------


def test_a_prefix_is_made_under_the_lasting_edits(model: LanguageModel, prompt: Tensor) -> None:
    with model.edit() as edited:
        edited.transformer.h[0].mlp.output[:] = 0
    prefix = edited.prefill(prompt)
    rest = ids(1, REST, 1)
    with edited.trace(torch.cat([prompt, rest], 1)):
        plain = edited.lm_head.output[:, PROMPT:]
    close(logits(edited, rest, prefix), plain.detach())
    with pytest.raises(InputError, match="other lasting edits"):
        logits(model, rest, prefix)
    with pytest.raises(InputError, match="other lasting edits"):
        logits(edited, rest, model.prefill(prompt))


# -- others made of it ----------------------------------------------------------------------------


def test_extend_gives_a_longer_prefix_and_leaves_the_first(
    model: LanguageModel, prompt: Tensor, prefix: Prefix
) -> None:
    before = checksum(prefix)
    more, rest = ids(1, 3, 5), ids(2, REST, 1)
    longer = prefix.extend(more)
    assert len(longer) == PROMPT + 3
    assert torch.equal(longer.tokens, torch.cat([prompt, more], 1))
    close(logits(model, rest, longer), whole(model, longer.tokens, rest))
    close(logits(model, rest, prefix), whole(model, prompt, rest))
    assert checksum(prefix) == before


def test_an_extended_prefix_and_its_beginning_share_memory(
    model: LanguageModel, prompt: Tensor, prefix: Prefix
) -> None:
    running = prefix.fork(1)  # of a run that began before
    longer = prefix.extend(ids(1, 3, 5)).extend(ids(1, 2, 6))
    middle = longer.crop(PROMPT + 3)
    for one, other, third in zip(
        *(layers_of(each._kv_cache) for each in (prefix.extend(ids(1, 1)), prefix, middle)),
        strict=True,
    ):
        assert one.keys.data_ptr() == other.keys.data_ptr()
        assert other.keys.data_ptr() != third.keys.data_ptr()
    rest = ids(1, REST, 1)
    for each in (prefix, middle, longer):
        close(logits(model, rest, each), whole(model, each.tokens, rest))
    with torch.no_grad():
        late = model.module(rest, past_key_values=running).logits
    close(late, whole(model, prompt, rest))


def test_one_prefix_is_extended_to_several_rows(
    model: LanguageModel, prompt: Tensor, prefix: Prefix
) -> None:
    more, rest = ids(2, 3, 5), ids(2, REST, 1)
    longer = prefix.extend(more)
    assert longer.rows == 2
    out = logits(model, rest, longer)
    for row in range(2):
        text = longer.tokens[row : row + 1]
        close(out[row : row + 1], whole(model, text, rest[row : row + 1]))


def test_crop_gives_the_first_positions_in_the_same_memory(
    model: LanguageModel, prompt: Tensor, prefix: Prefix
) -> None:
    before = checksum(prefix)
    shorter = prefix.crop(4)
    rest = ids(1, REST, 1)
    assert len(shorter) == 4
    close(logits(model, rest, shorter), whole(model, prompt[:, :4], rest))
    for own, cropped in zip(layers_of(prefix._kv_cache), layers_of(shorter._kv_cache), strict=True):
        assert own.keys.data_ptr() == cropped.keys.data_ptr()
    assert checksum(prefix) == before


@pytest.mark.parametrize("positions", [0, -1, PROMPT + 1])
def test_a_prefix_is_cropped_to_positions_that_it_has(prefix: Prefix, positions: int) -> None:
    with pytest.raises(InputError, match="cropped to 1 up to 9"):
        prefix.crop(positions)


def test_a_full_window_cannot_be_cropped_and_one_with_room_can() -> None:
    model = LanguageModel(make("mistral")[0])  # a window of 4
    rest = ids(1, REST, 1)
    with pytest.raises(UnsupportedError, match="has forgotten"):
        model.prefill(ids(1, PROMPT)).crop(2)
    short = model.prefill(ids(1, 3)).crop(2)
    close(logits(model, rest, short), whole(model, ids(1, 3)[:, :2], rest))


@pytest.mark.parametrize("name", ["gpt2", "mistral", "t5"])
def test_a_saved_prefix_is_loaded_as_it_was(name: str, tmp_path: Path) -> None:
    module, inputs = make(name)
    model = LanguageModel(module)
    prefix = model.prefill(**inputs)
    prefix.save(tmp_path / "prefix.safetensors")
    loaded = model.load_prefix(tmp_path / "prefix.safetensors")
    assert checksum(loaded) == checksum(prefix)
    assert repr(loaded) == repr(prefix)
    rest = ids(2, REST, 1)
    close(logits(model, rest, loaded), logits(model, rest, prefix))


def test_a_file_of_another_model_or_of_none_is_refused(
    model: LanguageModel, prefix: Prefix, tmp_path: Path
) -> None:
    path = tmp_path / "prefix.safetensors"
    prefix.save(path)
    with pytest.raises(LoadingError, match="other weights"):
        LanguageModel(make("gpt2", seed=1)[0]).load_prefix(path)
    with pytest.raises(LoadingError, match="this model is a LlamaForCausalLM"):
        LanguageModel(make("llama")[0]).load_prefix(path)
    with pytest.raises(LoadingError, match="can't be read"):
        model.load_prefix(tmp_path / "none.safetensors")
    from safetensors.torch import save_file

    save_file({"tokens": prefix.tokens}, path)
    with pytest.raises(LoadingError, match="no prefix that this tracekit wrote"):
        model.load_prefix(path)


def test_a_prefix_under_edits_is_not_saved(model: LanguageModel, tmp_path: Path) -> None:
    with model.edit() as edited:
        edited.transformer.h[0].mlp.output[:] = 0
    with pytest.raises(UnsupportedError, match="made under lasting edits"):
        edited.prefill(ids(1, PROMPT)).save(tmp_path / "prefix.safetensors")


# -- other caches ---------------------------------------------------------------------------------


def test_a_prefix_in_a_static_cache_is_copied_for_each_run(
    model: LanguageModel, prompt: Tensor
) -> None:
    static = transformers.StaticCache(config=model.module.config, max_cache_len=32)
    prefix = model.prefill(prompt, past_key_values=static)
    before = checksum(prefix)
    rest = ids(1, REST, 1)
    for _ in range(2):
        close(logits(model, rest, prefix), whole(model, prompt, rest))
    assert checksum(prefix) == before
    with pytest.raises(UnsupportedError, match="memory of a fixed size"):
        prefix.crop(2)


def test_an_unknown_kind_of_cache_is_refused(model: LanguageModel, prompt: Tensor) -> None:
    class Own(transformers.DynamicCache):
        pass

    with pytest.raises(UnsupportedError, match="can't be kept in a Own"):
        model.prefill(prompt, past_key_values=Own())


# -- refusals -------------------------------------------------------------------------------------


def no_rest(model: LanguageModel, prefix: Prefix) -> None:
    model.trace(input_ids=ids(1, 0), prefix=prefix)


def other_model(model: LanguageModel, prefix: Prefix) -> None:
    LanguageModel(make("gpt2", seed=1)[0]).trace(ids(1, REST), prefix=prefix)


def other_dtype(model: LanguageModel, prefix: Prefix) -> None:
    model.module.to(torch.float64)
    model.trace(ids(1, REST), prefix=prefix)


def other_weights(model: LanguageModel, prefix: Prefix) -> None:
    with torch.no_grad():
        model.module.transformer.h[1].mlp.c_fc.weight.mul_(2)
    model.trace(ids(1, REST), prefix=prefix)


def other_rows(model: LanguageModel, prefix: Prefix) -> None:
    model.trace(ids(3, REST), prefix=model.prefill(ids(2, PROMPT)))


def two_pasts(model: LanguageModel, prefix: Prefix) -> None:
    model.trace(ids(1, REST), prefix=prefix, past_key_values=transformers.DynamicCache())


def without_keys(model: LanguageModel, prefix: Prefix) -> None:
    model.generate(ids(1, REST), prefix=prefix, use_cache=False)


def another_cache(model: LanguageModel, prefix: Prefix) -> None:
    model.generate(ids(1, REST), prefix=prefix, cache_implementation="static")


def whole_mask(model: LanguageModel, prefix: Prefix) -> None:
    mask = torch.ones(1, PROMPT + REST)
    model.trace(input_ids=ids(1, REST), attention_mask=mask, prefix=prefix)


def images(model: LanguageModel, prefix: Prefix) -> None:
    model.trace(ids(1, REST), pixel_values=torch.ones(1, 3, 4, 4), prefix=prefix)


def no_prefix(model: LanguageModel, prefix: Prefix) -> None:
    model.trace(ids(1, REST), prefix="Once upon a time")


def embeddings(model: LanguageModel, prefix: Prefix) -> None:
    model.generate(inputs_embeds=torch.ones(1, REST, 32), prefix=prefix)


def embedded_prompt(model: LanguageModel, prefix: Prefix) -> None:
    model.prefill(inputs_embeds=torch.ones(1, REST, 32))


def prefill_without_keys(model: LanguageModel, prefix: Prefix) -> None:
    model.prefill(ids(1, REST), use_cache=False)


REFUSED: list[tuple[Any, type[TracekitError], str]] = [
    (no_rest, InputError, "at least one token must be new"),
    (other_model, InputError, "made by another model"),
    (other_dtype, InputError, "weights of this model have changed"),
    (other_weights, InputError, "weights of this model have changed"),
    (other_rows, InputError, "has 2 rows, and the rest 3"),
    (two_pasts, InputError, "past_key_values= and prefix= both"),
    (without_keys, InputError, "a prefix consists of them"),
    (another_cache, InputError, "a prefix is one"),
    (whole_mask, InputError, "is of the rest alone"),
    (images, UnsupportedError, "belongs into the prompt of the prefix"),
    (no_prefix, InputError, "not str"),
    (embeddings, InputError, "not inputs_embeds"),
    (embedded_prompt, InputError, "takes text or token ids"),
    (prefill_without_keys, InputError, "keeps keys and values"),
]


@pytest.mark.parametrize(
    ("mistake", "error", "text"), REFUSED, ids=[case[0].__name__ for case in REFUSED]
)
def test_what_would_be_wrong_is_refused(
    model: LanguageModel,
    prefix: Prefix,
    mistake: Callable[[LanguageModel, Prefix], None],
    error: type[TracekitError],
    text: str,
) -> None:
    with pytest.raises(error, match=text):
        mistake(model, prefix)


def test_a_refusal_is_at_the_users_line(model: LanguageModel, prefix: Prefix) -> None:
    with pytest.raises(InputError) as caught:
        other_rows(model, prefix)
    assert [entry.path.name for entry in caught.traceback][-1] == Path(__file__).name


def test_padding_before_a_rest_is_refused_where_columns_are_counted() -> None:
    model = LanguageModel(make("mistral")[0])
    prefix = model.prefill(ids(1, PROMPT))
    with pytest.raises(PaddingError, match="between a prefix and what follows"):
        model.trace([[11, 12, 13], [14]], prefix=prefix)


def test_a_deep_copy_of_a_fork_is_a_cache_of_its_own(prefix: Prefix) -> None:
    before = checksum(prefix)
    copied = copy.deepcopy(prefix.fork(1))
    copied.layers[0].keys.zero_()
    assert checksum(prefix) == before
    assert copied.get_seq_length() == PROMPT


# -- is the model right behind a prefix? ----------------------------------------------------------


def test_a_model_that_is_wrong_behind_its_keys_is_found_out(prompt: Tensor) -> None:
    module = make("gpt2")[0]
    own = module.transformer.h[1].forward

    def wrong(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        past = kwargs.get("past_key_values", args[0] if args else None)
        is_behind = past is not None and past.get_seq_length() > hidden.shape[1]
        return own(hidden * 2 if is_behind else hidden, *args, **kwargs)

    module.transformer.h[1].forward = wrong
    with pytest.raises(UnsupportedError, match="computes something else behind keys and values"):
        LanguageModel(module).prefill(prompt)


def test_a_model_is_asked_once_and_no_hook_of_the_users_sees_it(
    model: LanguageModel, prompt: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tracekit.models import probing

    asked: list[float] = []
    deviation = probing._deviation

    def noted(*args: Any) -> float:
        asked.append(deviation(*args))
        return asked[-1]

    monkeypatch.setattr(probing, "_deviation", noted)
    lengths: list[int] = []
    first = model.module.transformer.wte
    handle = first.register_forward_hook(lambda _, args, __: lengths.append(args[0].shape[1]))
    random = torch.get_rng_state()
    model.prefill(prompt)
    model.prefill(prompt)
    handle.remove()
    assert len(asked) == 1
    assert asked[0] < 1e-5
    assert lengths == [PROMPT, PROMPT]
    assert torch.equal(torch.get_rng_state(), random)


def test_every_shared_model_was_really_asked() -> None:
    for name in ("gpt2", "mistral", "t5", "bart"):
        module, inputs = make(name)
        model = LanguageModel(module)
        model.prefill(**inputs)
        assert model._tree.continues is True


@pytest.mark.parametrize("side", ["left", "right"])
def test_beams_behind_a_prefix_of_several_rows(side: str) -> None:
    model = LanguageModel(make("gpt2")[0], padding_side=side)
    prompts = [ids(1, length, length) for length in (7, 4)]
    prefix = model.prefill([row[0].tolist() for row in prompts])
    rest = ids(2, REST, 1)
    options: dict[str, Any] = {**GREEDY, "num_beams": 3}
    found = model.generate(rest, prefix=prefix, **options)
    for index, row in enumerate(prompts):
        text = torch.cat([row, rest[index : index + 1]], 1)
        plain = model.module.generate(text, attention_mask=torch.ones_like(text), **options)
        assert torch.equal(found[index, -5:], plain[0, -5:])


def test_a_lasting_edit_from_the_end_of_the_prompt_has_no_prefix(model: LanguageModel) -> None:
    with model.edit() as edited:
        edited.transformer.h[0].output.at(-1)[:] *= 2
    with pytest.raises(UnsupportedError, match="counts from the end of the prompt"):
        edited.prefill(torch.tensor([[5, 6, 7]]))


def test_a_lasting_edit_of_what_comes_behind_the_prefix_is_made_there(model: LanguageModel) -> None:
    with model.edit() as edited:
        edited.transformer.h[0].output.at("generated")[:] *= 2
    text, rest = torch.tensor([[5, 6, 7]]), torch.tensor([[8, 9]])
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
    options |= {"return_dict_in_generate": True, "output_logits": True}
    expected = edited.generate(torch.cat([text, rest], 1), **options)
    found = edited.generate(rest, prefix=edited.prefill(text), **options)
    for one, other in zip(found.logits, expected.logits, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("positions", ["prompt", "all", "generated", slice(0, 5)], ids=str)
def test_a_run_behind_a_prefix_is_verified_with_the_lasting_edits_of_both(positions: Any) -> None:
    tiny = LanguageModel("tracekit/tiny")
    direction = torch.randn(128, generator=torch.Generator().manual_seed(5))
    with tiny.edit() as edited:
        edited.transformer.h[1].hidden.at(positions)[:] += direction
    prefix = edited.prefill("The Eiffel Tower is in")
    with edited.generate(" the city of", prefix=prefix, max_new_tokens=4) as tracer:
        cache = tracer.cache("transformer.h.*")
    with edited.generate("The Eiffel Tower is in the city of", max_new_tokens=4) as tracer:
        whole = tracer.cache("transformer.h.*")
    expected = whole.sequence("transformer.h.3")[:, len(prefix) :]
    torch.testing.assert_close(
        cache.sequence("transformer.h.3").as_subclass(torch.Tensor), expected, rtol=1e-4, atol=1e-4
    )
    assert whole.verify()
    assert cache.verify()


def test_a_model_that_steers_what_it_generates_can_be_traced() -> None:
    tiny = LanguageModel("tracekit/tiny")
    with tiny.edit() as edited:
        edited.transformer.h[1].hidden.at("generated")[:] += 1.0
    with edited.trace("The Eiffel Tower"):
        hidden = edited.transformer.h[1].hidden
    with tiny.trace("The Eiffel Tower"):
        expected = tiny.transformer.h[1].hidden
    assert torch.equal(hidden, expected)


def test_hooks_of_the_model_are_those_of_its_prefixes() -> None:
    net, _ = make("gpt2")
    model = LanguageModel(net)
    ids = torch.arange(5, 13)[None]

    def halved(value: Tensor, hook: object) -> Tensor:
        return value / 2

    clean = model.prefill(ids[:, :5])
    with torch.no_grad(), model.hooks(fwd_hooks=[(("mlp_out", 0), halved)]):
        hooked = model.prefill(ids[:, :5])
        found = model.forward(ids[:, 5:], prefix=hooked)
        torch.testing.assert_close(found, model.forward(ids)[:, 5:])
        with pytest.raises(InputError, match="other lasting edits or hooks"):
            model.forward(ids[:, 5:], prefix=clean)
    with pytest.raises(InputError, match="other lasting edits or hooks"):
        model.forward(ids[:, 5:], prefix=hooked)
    assert model.forward(ids[:, 5:], prefix=clean) is not None
