"""Kinds of attention and of runs: flash, static kv_caches, windows, sinks, dropout, casts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import masking_utils

from tests.tiny_models import IS_TRANSFORMERS_5, make
from tracekit import Model
from tracekit.errors import AttentionError, NeverRanError

FLASH = "tracekit_test_flash"


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def flash_like(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    """What flash attention computes, row by row, without its padding."""
    assert attention_mask is None or attention_mask.dim() == 2
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    window = kwargs.get("sliding_window")
    result = torch.zeros(*query.shape[:3], value.shape[-1])
    for row in range(len(query)):
        real = torch.ones(key.shape[2]).bool()
        if attention_mask is not None:
            real = attention_mask[row].bool()
        asked = real[-query.shape[2] :]
        q, k, v = query[row][:, asked], key[row][:, real], value[row][:, real]
        scores = q @ k.mT * (kwargs.get("scaling") or q.shape[-1] ** -0.5)
        if kwargs.get("softcap"):
            scores = (scores / kwargs["softcap"]).tanh() * kwargs["softcap"]
        late = torch.arange(k.shape[1]) - torch.arange(q.shape[1])[:, None]
        late = late - (k.shape[1] - q.shape[1])  # the last query is at the last key
        if module.is_causal:
            scores = scores.masked_fill(late > 0, -torch.inf)
        if window is not None:
            scores = scores.masked_fill(late <= -window, -torch.inf)
        if kwargs.get("s_aux") is not None:
            sink = kwargs["s_aux"][:, None, None].expand(*scores.shape[:2], 1)
            result[row][:, asked] = torch.cat([scores, sink], -1).softmax(-1)[..., :-1] @ v
        else:
            result[row][:, asked] = scores.softmax(-1) @ v
    return result.transpose(1, 2), None


@pytest.fixture
def flash() -> Iterator[str]:
    functions = transformers.AttentionInterface._global_mapping
    masks = transformers.AttentionMaskInterface._global_mapping
    transformers.AttentionInterface.register(FLASH, flash_like)
    transformers.AttentionMaskInterface.register(FLASH, masking_utils.flash_attention_mask)
    yield FLASH
    del functions[FLASH], masks[FLASH]


def with_flash(net: Any, name: str) -> Model:
    """The implementation is set behind the checks of what a family says that it supports."""
    for module in net.modules():
        if hasattr(module, "config"):
            module.config._attn_implementation_internal = name
    return Model(net)


def padded(inputs: dict[str, Any], is_left: bool) -> dict[str, Any]:
    mask = torch.ones_like(inputs["input_ids"])
    mask[0, slice(3) if is_left else slice(-3, None)] = 0
    return {"input_ids": inputs["input_ids"], "attention_mask": mask}


@pytest.mark.parametrize("how", ["whole", "left", "right"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral", "gemma2", "gemma3_text", "gpt_oss"])
def test_patterns_under_flash_attention_are_those_of_eager(name: str, how: str, flash: str) -> None:
    options = {} if name in {"gpt2", "llama"} else {"sliding_window": 3}
    net, inputs = make(name, attn="eager", **options)
    if how != "whole":
        inputs = padded(inputs, how == "left")
    real = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
    expected = net(**inputs, output_attentions=True)
    model = with_flash(net, flash)
    with model.trace(**inputs) as tracer:
        found = tracer.cache(modules="*.attention.pattern")
        result = tracer.result
    for entries, pattern in zip(found.values(), expected.attentions, strict=True):
        mine = entries[0].output
        torch.testing.assert_close(
            mine.transpose(1, 2)[real], pattern.transpose(1, 2)[real], atol=1e-5, rtol=0
        )
    torch.testing.assert_close(result.logits[real], expected.logits[real], atol=1e-5, rtol=1e-4)
    assert torch.equal(result.logits, net(**inputs).logits)


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_patterns_of_a_generation_under_flash_attention(name: str, flash: str) -> None:
    options = {} if name == "llama" else {"sliding_window": 3}
    net, inputs = make(name, attn="eager", **options)
    inputs = padded(inputs, is_left=True)
    settings = {"max_new_tokens": 4, "do_sample": False}
    path = "*.layers.1.self_attn.attention.pattern"
    with Model(net).generate(**inputs, **settings) as tracer:
        eager = tracer.cache(modules=path)
    with with_flash(net, flash).generate(**inputs, **settings) as tracer:
        found = tracer.cache(modules=path)
    real = inputs["attention_mask"].bool()
    for step, (mine, theirs) in enumerate(
        zip(next(iter(found.values())), next(iter(eager.values())), strict=True)
    ):
        rows = real if step == 0 else slice(None)
        one, other = (x.output.transpose(1, 2)[rows] for x in (mine, theirs))
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


def test_an_edit_under_flash_attention_is_one_of_eager(flash: str) -> None:
    net, inputs = make("llama", attn="eager")
    inputs = padded(inputs, is_left=True)

    def halved(model: Model) -> Tensor:
        with model.trace(**inputs) as tracer:
            model.model.layers[0].self_attn.attention.pattern.output[:, 1] *= 0.5
            logits = tracer.result.logits
        return logits

    expected = halved(Model(net))
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(halved(with_flash(net, flash))[real], expected[real])


def test_a_mask_of_a_kind_that_is_not_known_is_refused(flash: str) -> None:
    net, inputs = make("llama", attn="eager")
    masks = transformers.AttentionMaskInterface._global_mapping
    masks[FLASH] = lambda *args, **kwargs: torch.ones(2, 8, 8)  # pyright: ignore
    functions = transformers.AttentionInterface._global_mapping
    functions[FLASH] = lambda module, q, *_, **__: (q.transpose(1, 2), None)  # pyright: ignore
    model = with_flash(net, flash)
    with pytest.raises(AttentionError, match="a kind that is not known"):
        with model.trace(**inputs):
            model.model.layers[0].self_attn.attention.pattern.output
    with model.trace(**inputs):
        q = model.model.layers[0].self_attn.attention.q.output
    assert q.shape[1] == 4


def test_several_sequences_in_one_row_are_refused_under_flash_attention(flash: str) -> None:
    net, inputs = make("llama", attn="eager")
    model = with_flash(net, flash)
    places = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]])
    with pytest.raises(AttentionError, match="several sequences in one row"):
        with model.trace(inputs["input_ids"][:1], position_ids=places):
            model.model.layers[0].self_attn.attention.pattern.output


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "gemma3_text", "mistral"])
def test_a_static_kv_cache_has_columns_for_all_that_is_to_come(name: str) -> None:
    net, inputs = make(name)
    settings: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
    path = "*.1.*.attention.pattern"
    with Model(net).generate(**inputs, **settings) as tracer:
        dynamic = tracer.cache(modules=path)
        tokens = tracer.result
    with Model(net).generate(**inputs, **settings, cache_implementation="static") as tracer:
        static = tracer.cache(modules=path)
        again = tracer.result
    assert torch.equal(tokens, again)
    for one, other in zip(next(iter(static.values())), next(iter(dynamic.values())), strict=True):
        keys = other.output.shape[-1]
        torch.testing.assert_close(one.output[..., :keys], other.output, atol=1e-5, rtol=0)
        assert not one.output[..., keys:].any()


def test_a_sink_keeps_its_share_of_a_written_pattern() -> None:
    net, inputs = make("gpt_oss")
    model = Model(net)
    with model.trace(**inputs):
        attention = model.model.layers[0].self_attn.attention
        v = attention.v.output
        pattern = attention.pattern.output
        attention.pattern.output = pattern * 0.5
        z = attention.z.output
    heads = v.repeat_interleave(pattern.shape[1] // v.shape[1], 1)
    torch.testing.assert_close((pattern * 0.5 @ heads).transpose(1, 2), z)
    assert (pattern.sum(-1) < 1).all()


def test_reading_draws_no_random_numbers_of_the_dropout() -> None:
    net, inputs = make("gpt2", attn="sdpa", attn_pdrop=0.5)
    net.train()
    torch.manual_seed(0)
    expected = net(**inputs).logits
    model = Model(net)
    torch.manual_seed(0)
    with torch.enable_grad(), model.trace(**inputs) as tracer:
        pattern = model.transformer.h[0].attn.attention.pattern.output
        logits = tracer.result.logits
    assert torch.equal(logits, expected)
    torch.testing.assert_close(pattern.sum(-1), torch.ones(2, 4, 8))  # before dropout


def test_what_is_written_goes_through_the_dropout() -> None:
    net, inputs = make("gpt2", attn="sdpa", attn_pdrop=0.5)
    net.train()
    model = Model(net)
    with model.trace(**inputs):
        attention = model.transformer.h[0].attn.attention
        v = attention.v.output
        attention.pattern.output[:] = torch.eye(8)
        z = attention.z.output.transpose(1, 2)
    kept = z.ne(0).any(-1, keepdim=True)
    assert 0 < kept.sum() < kept.numel()
    torch.testing.assert_close(z, v * 2 * kept)


@pytest.mark.parametrize("name", ["gpt2", "llama", "bart"])
def test_patterns_under_autocast_are_of_the_dtype_of_the_queries(name: str) -> None:
    net, inputs = make(name)
    model = Model(net)
    with torch.autocast("cpu", torch.bfloat16):
        expected = net(**inputs).logits
        with model.trace(**inputs) as tracer:
            found = tracer.cache(modules=["*.attention.pattern", "*.attention.q"])
            logits = tracer.result.logits
    assert torch.equal(logits, expected)
    for path, entries in found.items():
        if path.endswith(".pattern"):
            query = found[path.replace(".pattern", ".q")][0].output
            assert entries[0].output.dtype == query.dtype


def test_a_model_in_half_precision_hands_out_patterns_in_it() -> None:
    net, inputs = make("llama")
    net.to(torch.bfloat16)
    model = Model(net)
    with model.trace(**inputs) as tracer:
        attention = model.model.layers[0].self_attn.attention
        pattern = attention.pattern.output
        logits = tracer.result.logits
    assert pattern.dtype is torch.bfloat16
    assert torch.equal(logits, net(**inputs).logits)


def test_values_can_be_read_and_written_in_inference_mode() -> None:
    net, inputs = make("llama")
    model = Model(net)
    with torch.inference_mode():
        with model.trace(**inputs) as tracer:
            pattern = model.model.layers[0].self_attn.attention.pattern.output
            read = tracer.result.logits
        with model.trace(**inputs) as tracer:
            model.model.layers[0].self_attn.attention.pattern.output[:, 0] = 0
            written = tracer.result.logits
        assert torch.equal(read, net(**inputs).logits)
    assert pattern.shape == (2, 4, 8, 8)
    assert not torch.equal(read, written)


@pytest.mark.skipif(not IS_TRANSFORMERS_5, reason="configured otherwise before transformers 5")
def test_each_call_of_an_attention_function_in_one_forward_has_its_own_values() -> None:
    net, inputs = make("qwen2_5_vl")
    grid = inputs["image_grid_thw"].repeat(2, 1)
    pixels = inputs["pixel_values"].repeat(2, 1)
    model = Model(net.model.visual)
    with model.trace(pixels, grid_thw=grid) as tracer:
        cache = tracer.cache(modules="*.blocks.0.attn.attention.pattern")
    entries = next(iter(cache.values()))
    assert [entry.call for entry in entries] == list(range(len(entries)))
    assert len(entries) > 1
    with model.trace(pixels, grid_thw=grid):
        second = model.blocks[0].attn.attention.pattern.calls[1].output
    assert torch.equal(second, entries[1].output)


def test_a_value_that_a_forward_does_not_have_is_an_error_that_says_which_it_has() -> None:
    net, inputs = make("gptj")
    model = Model(net)
    with pytest.raises(NeverRanError, match="scores, pattern and z"):
        with model.trace(**inputs):
            model.transformer.h[0].attn.attention.q.output


def test_operations_of_an_attention_that_computes_itself_can_be_asked_too() -> None:
    net, inputs = make("gptj")
    model = Model(net)
    attention = model.transformer.h[0].attn
    with model.trace(**inputs) as tracer:
        source = attention.source
        pattern = attention.attention.pattern.output
        z = attention.attention.z.output
        given = source.self_out_proj_0.input
        logits = tracer.result.logits
    torch.testing.assert_close(z.flatten(-2), given)
    torch.testing.assert_close(pattern.sum(-1), torch.ones_like(pattern[..., 0]))
    assert torch.equal(logits, net(**inputs).logits)


@pytest.mark.parametrize("name", ["bloom", "falcon"])
def test_gradients_go_through_an_attention_that_computes_itself(name: str) -> None:
    net, inputs = make(name)
    model = Model(net)
    with torch.enable_grad():
        with model.trace(**inputs) as tracer:
            attention = model.transformer.h[0].self_attention.attention
            pattern = attention.pattern.output
            logits = tracer.result.logits
            with logits.square().sum().backward():
                found = pattern.grad
        eager, _ = make(name, attn="eager")
        output = eager(**inputs, output_attentions=True)
        loss = output.logits.square().sum()
        (expected,) = torch.autograd.grad(loss, output.attentions[0])
    assert torch.equal(logits, net(**inputs).logits)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_an_attention_without_a_softmax_has_no_pattern() -> None:
    net, _ = make("rwkv")
    kind = "RwkvSelfAttention"
    found = [each for each in Model(net).modules() if type(each.module).__name__ == kind]
    with pytest.raises(AttentionError, match="nor of a softmax"):
        found[0].attention
