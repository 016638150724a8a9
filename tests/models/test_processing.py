"""A processed copy has the function of its model, and weights that say more."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.tiny_models import NAMES, make
from tracekit import LanguageModel
from tracekit.architectures import known_families
from tracekit.errors import UnsupportedError

pytestmark = pytest.mark.usefixtures("without_gradients")
DECLARED = sorted(set(NAMES) & set(known_families()))
PROCESSED = [
    "bloom",
    "cohere2",
    "deepseek_v3",
    "falcon",
    "gemma",
    "gemma2",
    "glm4",
    "gpt2",
    "gpt_neo",
    "gpt_neox",
    "gpt_oss",
    "gptj",
    "jamba",
    "lfm2",
    "llama",
    "mamba",
    "mamba2",
    "mistral",
    "mixtral",
    "olmo2",
    "olmoe",
    "opt",
    "phi3",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "qwen3_next",
    "smollm3",
    "zamba2",
]
CENTRED = {"cohere2", "falcon", "gpt2", "gpt_neo", "gpt_neox", "gptj", "opt"}
REFUSED = "can't be processed: it (is no language model|has two stacks)"
STEPS = ("fold_norms", "center_writing_weights", "center_unembed", "fold_value_biases")


def uneven(name: str, **config: Any) -> tuple[Any, dict[str, Any]]:
    """A model whose gains and biases are no ones and zeros, and whose layers count."""
    net, inputs = make(name, **config)
    torch.manual_seed(1)
    for weight in net.parameters():
        if weight.ndim == 1:
            weight.add_(torch.randn_like(weight) / 2)
        else:
            weight.mul_(5)
    return net, inputs


def log_probabilities(net: nn.Module, inputs: dict[str, Any]) -> Tensor:
    return net(**inputs).logits.log_softmax(-1)


@pytest.mark.parametrize("name", DECLARED)
def test_the_copy_has_the_same_function_and_the_model_stays_as_it_is(name: str) -> None:
    net, inputs = uneven(name)
    before = {path: weight.clone() for path, weight in net.state_dict().items()}
    model = LanguageModel(net)
    try:
        copy = model.processed()
    except UnsupportedError as error:
        assert name not in PROCESSED
        assert re.search(REFUSED, str(error))  # noqa: PT017
        return
    expected = log_probabilities(net, inputs)
    assert set(copy.processing) == set(STEPS)
    if name in PROCESSED:
        assert copy.processing["fold_norms"] == "done"
        is_centred = copy.processing["center_writing_weights"] == "done"
        assert is_centred == (name in CENTRED)
    torch.testing.assert_close(
        log_probabilities(copy.module, inputs), expected, rtol=1e-4, atol=1e-4
    )
    assert all(torch.equal(weight, before[path]) for path, weight in net.state_dict().items())
    assert torch.equal(log_probabilities(net, inputs), expected)


def test_norms_are_left_without_gain_and_bias() -> None:
    net, _ = uneven("gpt2")
    copy = LanguageModel(net).processed(fold_norms=True)
    for layer in copy.layers:
        for norm in (layer.norm1.module, layer.norm2.module):
            assert torch.equal(norm.weight, torch.ones(32))
            assert torch.equal(norm.bias, torch.zeros(32))
    assert torch.equal(copy.final_norm.module.weight, torch.ones(32))
    assert copy.b_U.shape == (128,)  # which took the bias of the final norm
    assert not torch.equal(copy.W_U, copy.W_E.T)


def test_the_queries_read_the_stream_normed_and_nothing_else() -> None:
    net, inputs = uneven("llama")
    model = LanguageModel(net)
    copy = model.processed(fold_norms=True)
    with model.trace(**inputs):
        stream = model.layers[1].resid_pre
        q = model.layers[1].q
    normed = stream / (stream.square().mean(-1, keepdim=True) + net.config.rms_norm_eps).sqrt()
    torch.testing.assert_close(
        torch.einsum("bpm,hmd->bphd", normed, copy.layers[1].W_Q), q, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox"])
def test_folded_weights_have_no_part_that_a_norm_without_mean_could_not_reach(name: str) -> None:
    net, _ = uneven(name)
    copy = LanguageModel(net).processed(fold_norms=True, center_unembed=False)
    for weight in (copy.W_Q, copy.W_K, copy.W_V, copy.W_in):
        assert weight.mean(-2).abs().max() < 1e-6
    assert copy.W_U.mean(0).abs().max() < 1e-6
    of_rms = LanguageModel(uneven("llama")[0]).processed(fold_norms=True)
    assert of_rms.W_Q.mean(-2).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["gemma2", "recurrent_gemma"])
def test_capped_logits_are_not_centred(name: str) -> None:
    copy = LanguageModel(make(name)[0]).processed()
    assert "capped" in copy.processing["center_unembed"]


def test_the_stream_of_a_centred_copy_has_mean_zero_and_is_the_model_s_without_its_mean() -> None:
    net, inputs = uneven("gpt2")
    model = LanguageModel(net)
    copy = model.processed(center_writing_weights=True)
    with model.trace(**inputs):
        expected = model.layers[1].resid_mid
    with copy.trace(**inputs):
        found = copy.layers[1].resid_mid
    assert found.mean(-1).abs().max() < 1e-5
    torch.testing.assert_close(
        found, expected - expected.mean(-1, keepdim=True), rtol=1e-4, atol=1e-4
    )


def test_centred_logits_have_mean_zero_and_value_biases_are_gone() -> None:
    net, inputs = uneven("qwen2")
    copy = LanguageModel(net).processed(center_unembed=True, fold_value_biases=True)
    logits = copy.module(**inputs).logits
    assert logits.mean(-1).abs().max() < 1e-4
    assert not copy.b_V.any()
    assert copy.b_O.any()
    assert copy.b_Q.any()


def test_steps_are_taken_alone_and_what_is_not_right_is_refused_with_the_reason() -> None:
    net, inputs = uneven("llama")
    model = LanguageModel(net)
    with pytest.raises(UnsupportedError, match=r"LlamaRMSNorm. does not take the mean off"):
        model.processed(center_writing_weights=True)
    with pytest.raises(UnsupportedError, match=r"fold_value_biases is not right .* have no bias"):
        model.processed(fold_value_biases=True)
    nothing = model.processed(fold_norms=False, center_unembed=False)
    assert nothing.processing["fold_norms"] == "left out: not wanted"
    assert torch.equal(nothing.module(**inputs).logits, net(**inputs).logits)
    assert nothing.module is not net
    assert model.processing == {}


def test_a_copy_that_would_compute_something_else_is_refused() -> None:
    class Secretive(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.clone().sin())

    net, _ = uneven("llama")
    part = net.model.layers[1].mlp.up_proj
    odd = Secretive(part.in_features, part.out_features, bias=False)
    odd.weight = part.weight
    net.model.layers[1].mlp.up_proj = odd
    with pytest.raises(UnsupportedError, match="fold_norms=False"):
        LanguageModel(net).processed()


def test_something_unknown_that_writes_into_the_stream_is_not_overlooked() -> None:
    net, _ = uneven("gpt2")
    offset = torch.randn(32)
    net.transformer.drop.register_forward_hook(lambda *args: args[2] + offset)
    with pytest.raises(UnsupportedError, match="something else than what is centred writes"):
        LanguageModel(net).processed()


def test_weights_without_numbers_or_too_coarse_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="on meta"):
        LanguageModel(make("gpt2")[0].to("meta")).processed()
    with pytest.raises(UnsupportedError, match=r"dtype=torch.float32"):
        LanguageModel(make("gpt2")[0].bfloat16()).processed()


def test_the_copy_is_in_the_mode_of_the_model_traced_and_edited_apart() -> None:
    net, _ = uneven("gpt2")
    net.train()
    model = LanguageModel(net)
    copy = model.processed()
    assert copy.module.training
    assert net.training
    net.eval()
    with model.edit(inplace=True):
        model.layers[0].mlp_out[:] = 0
    copy = model.processed()
    assert not copy.edits
    assert copy.module.config.tie_word_embeddings is False
    assert net.config.tie_word_embeddings is True
    assert copy.tokenizer is model.tokenizer


def test_scores_of_composition_come_to_mean_what_heads_read() -> None:
    net, _ = uneven("gpt2")
    model = LanguageModel(net)
    gain = net.transformer.h[1].ln_1.weight
    folded = model.processed(fold_norms=True, center_writing_weights=False)
    read = model.layers[1].W_Q * gain[:, None]
    torch.testing.assert_close(
        folded.layers[1].W_Q, read - read.mean(-2, keepdim=True), rtol=1e-4, atol=1e-5
    )
