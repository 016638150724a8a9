"""What norms divide by, what they divide, and what each head adds: read and written."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.tiny_models import make
from tracekit import LanguageModel
from tracekit.core.norms import known_kind

pytestmark = pytest.mark.usefixtures("without_gradients")


def perturbed(name: str) -> tuple[Any, dict[str, Tensor]]:
    """A model whose norms have weights and biases of their own."""
    net, inputs = make(name)
    torch.manual_seed(5)
    for module in net.modules():
        if "norm" in type(module).__name__.lower():
            for weight in module.parameters():
                weight.add_(torch.randn_like(weight) * 0.3)
    return net, inputs


def by_hand(x: Tensor, norm: Any, *, centers: bool, offset: float) -> tuple[Tensor, Tensor, Tensor]:
    """The scale, the normalized values and the output of a norm."""
    eps = getattr(norm, "eps", None) or norm.variance_epsilon
    centered = x - x.mean(-1, keepdim=True) if centers else x
    scale = (centered.pow(2).mean(-1, keepdim=True) + eps).sqrt()
    out = centered / scale * (offset + norm.weight)
    return scale, centered / scale, out + norm.bias if centers else out


@pytest.mark.parametrize(
    ("name", "centers", "offset"), [("gpt2", True, 0.0), ("llama", False, 0.0)]
)
@pytest.mark.parametrize("has_hooks", [False, True])
def test_scale_and_normalized_are_those_of_the_norm(
    name: str, centers: bool, offset: float, has_hooks: bool
) -> None:
    net, inputs = perturbed(name)
    model = LanguageModel(net)
    hooks = [(("resid_post", 0), lambda value, hook: None)] if has_hooks else []
    names = ["resid_pre", "resid_mid", "resid_final", "final_norm_out", "*norm*"]
    if hooks:
        with model.hooks(fwd_hooks=hooks):
            logits, cache = model.run_with_cache(**inputs, names_filter=names)
    else:
        logits, cache = model.run_with_cache(**inputs, names_filter=names)
    assert torch.equal(logits, net(**inputs, use_cache=False).logits)
    how: Any = {"centers": centers, "offset": offset}
    for stream, norm in (("resid_pre", "norm1"), ("resid_mid", "norm2")):
        module = getattr(model.layers[1], norm).module
        scale, normalized, _ = by_hand(cache[stream, 1], module, **how)
        torch.testing.assert_close(cache[f"{norm}_scale", 1], scale)
        torch.testing.assert_close(cache[f"{norm}_normalized", 1], normalized)
    scale, normalized, out = by_hand(cache["resid_final"], model.final_norm.module, **how)
    torch.testing.assert_close(cache["final_norm_out"], out)
    torch.testing.assert_close(cache["ln_final.hook_scale"], scale)
    torch.testing.assert_close(cache["normalized", None, "ln_final"], normalized)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_an_edit_inside_a_norm_takes_effect(name: str) -> None:
    net, inputs = perturbed(name)
    model = LanguageModel(net)
    _, plain = model.run_with_cache(**inputs, names_filter="final_norm_normalized")
    norm = model.final_norm.module
    kind = known_kind(norm)
    assert kind is not None
    normalized = plain["final_norm_normalized"]
    scaled = model.run_with_hooks(
        **inputs, fwd_hooks=[("ln_final.hook_scale", lambda scale, hook: scale * 2)]
    )
    shifted = model.run_with_hooks(
        **inputs, fwd_hooks=[("final_norm_normalized", lambda value, hook: value + 1)]
    )
    for found, value in ((scaled, normalized / 2), (shifted, normalized + 1)):
        expected = net.get_output_embeddings()(kind.affine(norm, value))
        torch.testing.assert_close(found, expected)


def test_a_weight_that_counts_from_one_is_told_by_its_numbers() -> None:
    net, _ = perturbed("gemma")
    norm = net.model.norm
    x = torch.randn(2, 3, 32)
    kind = known_kind(norm)
    assert kind is not None
    assert kind.offset == 1
    centered = kind.centered(x)
    made = kind.affine(norm, centered / kind.scale(norm, centered))
    torch.testing.assert_close(made, norm(x))


def test_a_module_that_is_no_norm_has_no_kind() -> None:
    assert known_kind(nn.LayerNorm(8)) is not None
    assert known_kind(nn.Linear(8, 8)) is None
    broken = nn.LayerNorm(8)
    broken.forward = lambda x: x  # its class is asked
    assert known_kind(broken) is not None

    class Odd(nn.LayerNorm):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 1.01

    assert known_kind(Odd(8)) is None


@pytest.mark.parametrize("name", ["gpt2", "llama", "gptj"])
def test_what_heads_add_is_told_by_head(name: str) -> None:
    net, inputs = make(name)
    model = LanguageModel(net)
    _, cache = model.run_with_cache(**inputs, names_filter=["head_result", "z", "attn_out"])
    o: Any = model.layers[1].attn.o.module
    z, result = cache["z", 1], cache["blocks.1.attn.hook_result"]
    bias = o.bias if o.bias is not None else torch.zeros(())
    for head in range(z.shape[-2]):
        alone = torch.zeros_like(z)
        alone[..., head, :] = z[..., head, :]
        torch.testing.assert_close(result[..., head, :], o(alone.flatten(-2)) - bias)
    torch.testing.assert_close(result.sum(-2) + bias, cache["attn_out", 1])


def test_it_is_recorded_of_every_name_only_if_it_is_named() -> None:
    net, inputs = make("gpt2")
    _, cache = LanguageModel(net).run_with_cache(**inputs)
    assert ("head_result", 0) not in cache
    assert ("norm1_scale", 0) in cache


def test_an_edit_of_what_a_head_adds_changes_what_attention_adds() -> None:
    net, inputs = make("gpt2")
    model = LanguageModel(net)

    def without_head_2(result: Tensor, hook: Any) -> None:
        result[:, :, 2] = 0

    def without_z_2(z: Tensor, hook: Any) -> None:
        z[:, :, 2] = 0

    found = model.run_with_hooks(**inputs, fwd_hooks=[(("head_result", 0), without_head_2)])
    expected = model.run_with_hooks(**inputs, fwd_hooks=[(("z", 0), without_z_2)])
    torch.testing.assert_close(found, expected)


def test_they_are_values_of_a_trace_too() -> None:
    net, inputs = make("gpt2")
    model = LanguageModel(net)
    with model.trace(**inputs):
        scale = model.layers[0].norm1_scale
        result = model.layers[0].head_result
        model.layers[1].norm2_normalized[:] = 0
        out = model.layers[1].norm2.output
    assert scale.shape[-1] == 1
    assert result.shape == (2, 8, 4, 32)
    assert torch.equal(out, net.transformer.h[1].ln_2.bias.expand_as(out))
