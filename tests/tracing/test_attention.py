"""The values inside an attention: q, k, v, scores, pattern and z, under any attention function."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask

from tests.tiny_models import generate, make
from tests.tracing.plain import state_of
from tracekit import Model, settings
from tracekit.errors import (
    AttentionError,
    SiteOrderError,
    TracekitWarning,
    UnknownModuleError,
    UnsupportedError,
)
from tracekit.interleave.masks import additive_mask

PATHS = {"gpt2": "transformer.h.{}.attn", "llama": "model.layers.{}.self_attn"}


class Pair:
    """A model under sdpa, wrapped, and the same one with eager attention."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.net, self.inputs = make(name, attn="sdpa")
        self.eager, _ = make(name, attn="eager")
        self.model = Model(self.net)

    def attention(self, layer: int) -> Any:
        return self.model.get(PATHS[self.name].format(layer)).attention

    def path(self, layer: int) -> str:
        return f"model.{PATHS[self.name].format(layer)}.attention"

    def patterns(self) -> tuple[Tensor, ...]:
        """Hugging Face's own."""
        return self.eager(**self.inputs, output_attentions=True).attentions


@pytest.fixture(params=list(PATHS))
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    found = Pair(request.param)
    before = state_of(found.net)
    with torch.no_grad():
        yield found
    assert state_of(found.net) == before
    assert all("forward" not in vars(module) for module in found.net.modules())


def test_a_pattern_under_sdpa_is_the_one_of_eager_attention(pair: Pair) -> None:
    with pair.model.trace(**pair.inputs) as tracer:
        first = pair.attention(0).pattern.output
        second = pair.attention(1).pattern.output
        result = tracer.result
    for found, expected in zip((first, second), pair.patterns(), strict=False):
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    assert torch.equal(result.logits, pair.net(**pair.inputs).logits)


def test_the_values_of_an_attention_are_what_its_function_sees(pair: Pair) -> None:
    with pair.model.trace(**pair.inputs):
        q = pair.attention(0).q.output
        k = pair.attention(0).k.output
        v = pair.attention(0).v.output
        scores = pair.attention(0).scores.output
        pattern = pair.attention(0).pattern.output
        z = pair.attention(0).z.output
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
    sees = torch.ones(q.shape[2], q.shape[2]).tril().bool()
    torch.testing.assert_close((q @ k.mT * q.shape[-1] ** -0.5)[..., sees], scores[..., sees])
    torch.testing.assert_close(scores.softmax(-1), pattern)
    torch.testing.assert_close((pattern @ v).transpose(1, 2), z)


def test_a_written_pattern_is_what_the_attention_goes_by(pair: Pair) -> None:
    with pair.model.trace(**pair.inputs) as tracer:
        pair.attention(1).pattern.output[:, 2] = 0
        z = pair.attention(1).z.output
        logits = tracer.result.logits
    assert not z[:, :, 2].any()

    def zero(module: nn.Module, args: Any) -> Tensor:
        heads = args[0].unflatten(-1, (z.shape[2], z.shape[3])).clone()
        heads[:, :, 2] = 0
        return heads.flatten(-2)

    attention = pair.net.get_submodule(PATHS[pair.name].format(1))
    projection: Any = attention.c_proj if pair.name == "gpt2" else attention.o_proj
    with projection.register_forward_pre_hook(zero):
        expected = pair.net(**pair.inputs).logits
    torch.testing.assert_close(logits, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["q", "k", "v", "scores", "pattern", "z"])
def test_each_value_can_be_replaced(pair: Pair, name: str) -> None:
    with pair.model.trace(**pair.inputs) as tracer:
        piece = getattr(pair.attention(0), name)
        piece.output = piece.output * 0.5
        z = pair.attention(0).z.output if name != "z" else None
        logits = tracer.result.logits
    whole = pair.net(**pair.inputs).logits
    assert (logits - whole).abs().max() > 1e-5
    with pair.model.trace(**pair.inputs):
        untouched = pair.attention(0).z.output
    assert name == "z" or z is not None
    if name in {"v", "pattern"}:
        torch.testing.assert_close(z, untouched * 0.5)


def test_a_cache_records_patterns_and_one_of_everything_does_not(pair: Pair) -> None:
    with pair.model.trace(**pair.inputs) as tracer:
        cache = tracer.cache(modules=[f"{pair.path(1)}.pattern", pair.attention(0).z])
        every = tracer.cache()
    torch.testing.assert_close(
        cache[f"{pair.path(1)}.pattern"][0].output, pair.patterns()[1], atol=1e-6, rtol=0
    )
    assert set(cache) == {f"{pair.path(1)}.pattern", f"{pair.path(0)}.z"}
    assert not any(".attention." in path for path in every)


def test_a_glob_that_names_a_value_means_it_in_every_attention(pair: Pair) -> None:
    with pair.model.trace(**pair.inputs) as tracer:
        cache = tracer.cache(modules="*.attention.pattern")
    assert len(cache) == len(pair.patterns())


def test_gradients_reach_the_pattern_and_go_through_it(pair: Pair) -> None:
    with torch.enable_grad():
        with pair.model.trace(**pair.inputs) as tracer:
            pattern = pair.attention(0).pattern.output
            logits = tracer.result.logits
            with logits.square().sum().backward():
                found = pattern.grad
        assert torch.equal(logits, pair.net(**pair.inputs).logits)
        own = [parameter.grad for parameter in pair.net.parameters()]
        pair.net.zero_grad()
        output = pair.eager(**pair.inputs, output_attentions=True)
        (expected,) = torch.autograd.grad(
            output.logits.square().sum(), output.attentions[0], retain_graph=True
        )
        output.logits.square().sum().backward()
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    for mine, theirs in zip(own, pair.eager.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs.grad, atol=1e-4, rtol=1e-4)


def test_patterns_of_a_generation_have_the_keys_of_its_cache(pair: Pair) -> None:
    patterns = []
    ids = pair.inputs["input_ids"]
    with pair.model.generate(**pair.inputs, max_new_tokens=3, do_sample=False) as tracer:
        for _ in tracer.iter[:]:
            patterns.append(pair.attention(1).pattern.output)
        tokens = tracer.result
    assert torch.equal(tokens, generate(pair.name, pair.net, pair.inputs))
    prompt = ids.shape[1]
    assert [p.shape[2:] for p in patterns] == [(prompt, prompt), (1, prompt + 1), (1, prompt + 2)]
    mask = torch.ones_like(tokens[:, :-1])
    whole = pair.eager(tokens[:, :-1], attention_mask=mask, output_attentions=True).attentions[1]
    torch.testing.assert_close(patterns[-1][:, :, 0], whole[:, :, -1], atol=1e-6, rtol=0)


def test_each_invoke_sees_the_patterns_of_its_rows(pair: Pair) -> None:
    ids = pair.inputs["input_ids"]
    with pair.model.trace() as tracer:
        with tracer.invoke(ids[:1]):
            one = pair.attention(0).pattern.output
        with tracer.invoke(ids[1:]):
            pair.attention(0).pattern.output[:] = 0
            other = pair.attention(0).z.output
            logits = tracer.result.logits
    torch.testing.assert_close(one, pair.patterns()[0][:1], atol=1e-6, rtol=0)
    assert not other.any()
    with pair.model.trace(ids[1:]) as tracer:
        pair.attention(0).pattern.output[:] = 0
        alone = tracer.result.logits
    torch.testing.assert_close(logits, alone, atol=1e-6, rtol=0)


def test_invokes_that_only_read_change_no_bit(pair: Pair) -> None:
    ids = pair.inputs["input_ids"]
    with pair.model.trace() as tracer:
        with tracer.invoke(ids[:1]):
            pattern = pair.attention(0).pattern.output
            one = tracer.result.logits
        with tracer.invoke(ids[1:]):
            z = pair.attention(0).z.output
            other = tracer.result.logits
    assert pattern.shape[0] == z.shape[0] == 1
    assert torch.equal(torch.cat([one, other]), pair.net(ids).logits)


def test_a_scan_knows_the_shapes(pair: Pair) -> None:
    with pair.model.scan(**pair.inputs):
        pattern = pair.attention(0).pattern.output
        z = pair.attention(0).z.output
    assert pattern.shape == pair.patterns()[0].shape
    assert z.shape[1] == pattern.shape[2]


def test_operations_of_the_same_attention_can_be_asked_too(pair: Pair) -> None:
    with pair.model.trace(**pair.inputs) as tracer:
        source = pair.attention(0).parent.source
        query = source.attention_interface_0.inputs[0][1]
        q = pair.attention(0).q.output
        pattern = pair.attention(0).pattern.output
        z = pair.attention(0).z.output
        output = source.attention_interface_0.output[0]
        logits = tracer.result.logits
    assert torch.equal(query, q)
    assert torch.equal(z, output)
    torch.testing.assert_close(pattern, pair.patterns()[0], atol=1e-6, rtol=0)
    assert torch.equal(logits, pair.net(**pair.inputs).logits)


def test_an_edit_that_lasts_works_on_a_pattern(pair: Pair) -> None:
    with pair.model.edit() as edited:
        edited.get(PATHS[pair.name].format(0)).attention.pattern.output[:] = 0
    with edited.trace(**pair.inputs):
        z = edited.get(PATHS[pair.name].format(0)).attention.z.output
    assert not z.any()


def test_a_value_that_is_asked_when_the_attention_runs_is_an_order_error(pair: Pair) -> None:
    inner = "c_attn" if pair.name == "gpt2" else "q_proj"
    inside = pair.model.get(f"{PATHS[pair.name].format(0)}.{inner}")
    with pytest.raises(SiteOrderError, match="was running already"):
        with pair.model.trace(**pair.inputs):
            inside.output
            pair.attention(0).pattern.output


def test_values_that_are_asked_out_of_order_are_an_order_error(pair: Pair) -> None:
    with pytest.raises(SiteOrderError):
        with pair.model.trace(**pair.inputs):
            pair.attention(0).z.output
            pair.attention(0).pattern.output


def test_a_module_that_is_no_attention_has_no_such_values(pair: Pair) -> None:
    layer = pair.attention(0).parent.parent
    with pytest.raises(UnknownModuleError, match="'attention' is not in"):
        layer.mlp.attention
    before = list(layer.mlp.module.children())
    with pytest.raises(AttentionError, match="makes no call of an attention function"):
        with pair.model.trace(**pair.inputs) as tracer:
            tracer.cache(modules=f"{layer.path}.mlp.attention.pattern")
    assert list(layer.mlp.module.children()) == before


def test_nothing_of_a_run_stays_alive(pair: Pair, without_collector: None) -> None:
    with pair.model.trace(**pair.inputs):
        pattern = pair.attention(0).pattern.output
    kept = weakref.ref(pattern)
    del pattern
    assert kept() is None


def test_positions_of_q_and_z_can_be_chosen_and_those_of_cached_keys_not(pair: Pair) -> None:
    with pair.model.trace(**pair.inputs):
        pair.attention(0).q.output.at([1])[:] = 0
        q = pair.attention(0).q.output
    assert not q[:, :, 1].any()
    assert q[:, :, 2].all()
    with pytest.raises(UnsupportedError, match="kv_cache in front"):
        with pair.model.generate(**pair.inputs, max_new_tokens=3, do_sample=False):
            pair.attention(0).k.output.at("all")[:] = 0


def test_what_is_recorded_of_a_generation_is_what_one_forward_computes(pair: Pair) -> None:
    with pair.model.generate(**pair.inputs, max_new_tokens=3, do_sample=False) as tracer:
        cache = tracer.cache(modules=f"{pair.path(0)}.z")
    assert cache.verify()
    sequence = cache.sequence(f"{pair.path(0)}.z")
    assert sequence.shape[1] == pair.inputs["input_ids"].shape[1] + 2


def test_paths_go_by_the_names_that_the_user_gave() -> None:
    net, inputs = make("gpt2", attn="sdpa")
    model = Model(net, rename={"transformer.h": "layers", "h.*.attn": "self_attn"})
    with model.trace(**inputs) as tracer:
        cache = tracer.cache(modules="model.layers.0.self_attn.attention.pattern")
        pattern = model.layers[0].self_attn.attention.pattern.output
    assert torch.equal(cache["model.layers.0.self_attn.attention.pattern"][0].output, pattern)
    assert model.state_dict().keys() == net.state_dict().keys()


def test_the_pattern_of_a_padded_row_leaves_the_padding_out(pair: Pair) -> None:
    ids = pair.inputs["input_ids"]
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    with pair.model.trace(ids, attention_mask=mask) as tracer:
        pattern = pair.attention(1).pattern.output
        logits = tracer.result.logits
    assert torch.equal(logits, pair.net(ids, attention_mask=mask).logits)
    expected = pair.eager(ids, attention_mask=mask, output_attentions=True).attentions[1]
    real = mask.bool()
    torch.testing.assert_close(
        pattern.transpose(1, 2)[real], expected.transpose(1, 2)[real], atol=1e-6, rtol=0
    )
    assert not pattern[0, :, 3:, :3].any()


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
def test_a_read_pattern_leaves_gradients_right_under_checkpointing() -> None:
    net, inputs = make("llama", attn="sdpa")
    plain, _ = make("llama", attn="sdpa")
    net.gradient_checkpointing_enable({"use_reentrant": False})
    net.train()
    model = Model(net)
    with model.trace(**inputs, use_cache=False) as tracer:
        pattern = model.model.layers[0].self_attn.attention.pattern.output
        logits = tracer.result.logits
    logits.square().sum().backward()
    plain(**inputs).logits.square().sum().backward()
    assert pattern.shape == (2, 4, 8, 8)
    for mine, theirs in zip(net.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


@pytest.mark.parametrize("is_lifted", [True, False])
def test_blocks_in_place_write_patterns_too(is_lifted: bool) -> None:
    net, inputs = make("llama", attn="sdpa")
    model = Model(net)
    with settings.changed(lift_blocks=is_lifted), model.trace(**inputs):
        model.model.layers[0].self_attn.attention.pattern.output[:, 1] = 0
        z = model.model.layers[0].self_attn.attention.z.output
    assert not z[:, :, 1].any()


def test_a_compiled_model_hands_out_patterns() -> None:
    net, inputs = make("llama", attn="sdpa")
    net.model.layers[0].compile(backend="eager")
    model = Model(net)
    with pytest.warns(TracekitWarning, match="compiled"), model.trace(**inputs):
        pattern = model.model.layers[0].self_attn.attention.pattern.output
    assert pattern.shape == (2, 4, 8, 8)


def test_the_mask_of_flex_attention_is_added_as_eager_attention_adds_it() -> None:
    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (key >= batch)

    block = create_block_mask(sees, 2, None, 5, 5, device="cpu", BLOCK_SIZE=128)
    query = torch.zeros(2, 3, 5, 4)
    added = additive_mask(nn.Module(), query, query, block, {})
    places = torch.arange(5)
    expected = (places <= places[:, None]) & (places >= torch.arange(2)[:, None, None])
    assert added is not None
    assert torch.equal(added == 0, expected[:, None].expand(2, 3, 5, 5))
    assert (added[added != 0] == torch.finfo(torch.float32).min).all()
