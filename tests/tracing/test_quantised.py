"""Layers quantised by torchao: reads, edits, skips, gradients and steps are those of plain hooks.

Run by `make test-quantised`: where torchao is found, transformers imports it, in each process.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.tiny_models import make
from tests.tracing.plain import copied, is_same, plain_hooks, state_of
from tracekit import LanguageModel

quantization: Any = pytest.importorskip("torchao.quantization")

IDS = torch.tensor([[11, 12, 13, 14, 15], [21, 22, 23, 24, 25]])
CONFIGS = ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"]


@pytest.fixture(scope="module", params=CONFIGS)
def net(request: pytest.FixtureRequest) -> Any:
    return quantised(request.param)


def quantised(config: str) -> Any:
    net = make("llama")[0]
    quantization.quantize_(net, getattr(quantization, config)())
    kinds = {type(weight).__name__ for weight in net.parameters()}
    assert "Int8Tensor" in kinds, kinds
    return net.requires_grad_(False)


def test_reads_and_caches_are_what_plain_hooks_see(net: Any) -> None:
    model, before = LanguageModel(net), state_of(net)
    up = model.model.layers[1].mlp.up_proj
    with plain_hooks(net) as seen:
        plain = net(input_ids=IDS, use_cache=False)
    with model.trace(IDS) as tracer:
        cache = tracer.cache()
        read = up.output
        logits = tracer.result.logits
    assert torch.equal(logits, plain.logits)
    assert is_same(read, copied(seen[up.path][0]))
    assert len(cache) == len(seen)
    for path in cache:
        assert is_same(cache[path].output, copied(seen[path][0])), path
    assert state_of(net) == before


def test_edits_and_skips_change_what_they_do_by_hand(net: Any) -> None:
    model, layers = LanguageModel(net), net.model.layers
    handles = [
        layers[0].self_attn.q_proj.register_forward_hook(lambda _m, _a, out: out * 2),
        layers[1].register_forward_hook(lambda _m, args, _o: args[0]),
    ]
    expected = net(input_ids=IDS).logits
    for handle in handles:
        handle.remove()
    with model.trace(IDS):
        model.model.layers[0].self_attn.q_proj.output[:] *= 2
        model.model.layers[1].skip(model.model.layers[0].output)
        logits = model.lm_head.output
    assert torch.equal(logits, expected)
    assert not torch.equal(logits, net(input_ids=IDS).logits)


def test_a_quantised_module_is_applied_to_a_value(net: Any) -> None:
    model = LanguageModel(net)
    with model.trace(IDS):
        hidden = model.model.layers[0].output
        lens = model.lm_head(model.model.norm(hidden))
    assert torch.equal(lens, net.lm_head(net.model.norm(hidden)))


def test_gradients_go_through_weights_that_are_quantised() -> None:
    net = quantised("Int8WeightOnlyConfig")
    kept: list[Tensor] = []

    def keep(_module: Any, _args: Any, out: Tensor) -> Tensor:
        kept.append(out.detach().requires_grad_())
        return kept[-1]

    handle = net.model.layers[0].register_forward_hook(keep)
    net(input_ids=IDS).logits.square().sum().backward()
    handle.remove()
    model = LanguageModel(net)
    with model.trace(IDS):
        hidden = model.model.layers[0].output.requires_grad_()
        with model.lm_head.output.square().sum().backward():
            gradient = hidden.grad
    assert torch.equal(gradient, kept[0].grad)
    assert gradient.abs().sum() > 0


def test_each_block_of_a_batch_has_what_it_has_alone() -> None:
    net = quantised("Int8WeightOnlyConfig")
    model = LanguageModel(net)
    up = model.model.layers[0].mlp.up_proj
    short = IDS[1:, :3]
    with model.trace() as tracer:
        with tracer.invoke(IDS[:1]):
            up.output[:] = 0
            edited = model.lm_head.output
        with tracer.invoke(short):
            alone = model.lm_head.output
    handle = up.module.register_forward_hook(lambda _m, _a, out: out * 0)
    torch.testing.assert_close(edited, net(input_ids=IDS[:1]).logits)
    handle.remove()
    torch.testing.assert_close(alone[:, -3:], net(input_ids=short).logits)


def test_the_steps_of_a_generation(net: Any) -> None:
    model = LanguageModel(net)
    options = {"max_new_tokens": 3, "do_sample": False}
    expected = net.generate(IDS, **options, return_dict_in_generate=True, output_logits=True)
    with model.generate(IDS, **options) as tracer:
        logits = [model.lm_head.output[:, -1] for _ in tracer.iter[:]]
        tokens = tracer.result
    assert torch.equal(tokens, expected.sequences)
    assert all(map(torch.equal, logits, expected.logits))


def test_a_dry_run_tells_the_shapes(net: Any) -> None:
    model = LanguageModel(net)
    with model.scan(IDS):
        up = model.model.layers[0].mlp.up_proj.output.shape
        logits = model.lm_head.output.shape
    assert up == (*IDS.shape, net.config.intermediate_size)
    assert logits == (*IDS.shape, net.config.vocab_size)


@pytest.mark.parametrize("dispatch", [True, False])
def test_a_checkpoint_is_quantised_when_it_is_loaded(dispatch: bool, tmp_path: Any) -> None:
    from transformers import TorchAoConfig

    make("llama")[0].save_pretrained(tmp_path)
    config = TorchAoConfig(quantization.Int8WeightOnlyConfig())
    tokenizer = LanguageModel("tracekit/tiny").tokenizer
    model = LanguageModel(
        tmp_path, tokenizer=tokenizer, quantization_config=config, dispatch=dispatch
    )
    with model.trace(IDS):
        hidden = model.model.layers[1].output
        logits = model.lm_head.output
    assert "Int8Tensor" in {type(weight).__name__ for weight in model.module.parameters()}
    plain = model.module(input_ids=IDS, output_hidden_states=True)
    assert torch.equal(logits, plain.logits)
    assert torch.equal(model.module.model.norm(hidden), plain.hidden_states[-1])
