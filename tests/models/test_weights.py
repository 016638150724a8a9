"""Weights by standard name: what a model computes with them is what its own modules compute."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.tiny_models import NAMES, make
from tracekit import FactoredMatrix, LanguageModel
from tracekit.architectures import Lacks, Names, known_families, names_of
from tracekit.errors import (
    InputError,
    LoadingError,
    MissingNameError,
    UnsupportedError,
)

pytestmark = pytest.mark.usefixtures("without_gradients")
DECLARED = sorted(set(NAMES) & set(known_families()))
# The weight, the activation, and how the second comes of the first.
GIVING = {"W_Q": "q", "W_K": "k", "W_V": "v"}


def with_random_biases(name: str) -> tuple[Any, dict[str, Any]]:
    net, inputs = make(name)
    for path, weight in net.named_parameters():
        if path.endswith("bias"):
            weight.normal_()
    return net, inputs


def calls_of(net: nn.Module, inputs: dict[str, Any]) -> dict[str, tuple[Tensor, Tensor]]:
    """What each module was called with, and what it gave, by plain hooks; of the last call."""
    found: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(path: str) -> Any:
        def hook(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            given = [*args, *kwargs.values()]
            if given and isinstance(given[0], Tensor) and isinstance(output, Tensor):
                found[path] = given[0].clone(), output.clone()  # some are overwritten later

        return hook

    hooks = [
        module.register_forward_hook(keep(path), with_kwargs=True)
        for path, module in net.named_modules()
    ]
    net(**inputs)
    for hook in hooks:
        hook.remove()
    return found


def weight(names: Names, owner: str, name: str) -> Any:
    found = names.weight(owner, name)
    return None if isinstance(found, Lacks) else found


@pytest.mark.parametrize("name", DECLARED)
def test_each_weight_computes_what_its_module_computes(name: str) -> None:
    net, inputs = with_random_biases(name)
    names = names_of(net)
    assert names is not None
    calls = calls_of(net, inputs)
    proved = set[str]()
    for owner in filter(None, names.layers):
        for each in ("W_Q", "W_K", "W_V", "W_gate", "W_in"):
            W, b = weight(names, owner, each), weight(names, owner, each.replace("W", "b"))
            wanted = {**GIVING, "W_gate": "mlp_pre", "W_in": "mlp_pre_linear"}[each]
            if each == "W_in" and names.point(owner, wanted) is None:
                wanted = "mlp_pre"
            point = names.point(owner, wanted)
            if W is None or point is None or point.path not in calls:
                continue
            x, out = calls[point.path]
            axes = "...m,hmd->...hd" if W.ndim == 3 else "...m,md->...d"
            found = torch.einsum(axes, x, W) + (0 if b is None else b)
            expected = point.view(out)
            torch.testing.assert_close(found, expected.reshape(found.shape), rtol=1e-4, atol=1e-5)
            proved.add(each)
        for each, given in (("W_O", "z"), ("W_out", "mlp_post")):
            W, b = weight(names, owner, each), weight(names, owner, each.replace("W", "b"))
            point = names.point(owner, given)
            if W is None or point is None or point.path not in calls:
                continue
            x, out = calls[point.path]
            axes = "...hd,hdm->...m" if W.ndim == 3 else "...d,dm->...m"
            divided = point.view(x) if W.ndim == 3 else x
            found = torch.einsum(axes, divided, W) + (0 if b is None else b)
            torch.testing.assert_close(found, out, rtol=1e-4, atol=1e-5)
            proved.add(each)
    if "o" in next(iter(names.layers[path].modules for path in names.layers if path), {}):
        assert "W_O" in proved
    if "unembed" in names.words(""):
        x, out = calls[names.module("", "unembed") or ""]
        b = weight(names, "", "b_U")
        found = x @ weight(names, "", "W_U") + (0 if b is None else b)
        torch.testing.assert_close(found, out, rtol=1e-4, atol=1e-5)
    if "embed" in names.words("") and names.module("", "embed") in calls:
        ids, out = calls[names.module("", "embed") or ""]
        torch.testing.assert_close(weight(names, "", "W_E")[ids], out)


def test_shapes_are_as_stated_and_stacked_over_layers() -> None:
    net, _ = make("llama", num_hidden_layers=3)
    model = LanguageModel(net)
    assert model.layers[1].W_Q.shape == (4, 32, 8)
    assert model.layers[1].W_K.shape == model.layers[1].W_V.shape == (2, 32, 8)
    assert model.layers[1].W_O.shape == (4, 8, 32)
    assert model.W_Q.shape == (3, 4, 32, 8)
    assert model.W_gate.shape == model.W_in.shape == (3, 32, 64)
    assert model.W_out.shape == (3, 64, 32)
    assert torch.equal(model.W_O[2], model.layers[2].W_O)
    assert model.W_E.shape == (128, 32)
    assert model.W_U.shape == (32, 128)


def test_fused_projections_are_divided() -> None:
    net, _ = make("gpt2")
    model = LanguageModel(net)
    fused = net.transformer.h[1].attn.c_attn
    assert torch.equal(model.layers[1].W_K[2], fused.weight[:, 32 + 16 : 32 + 24])
    assert torch.equal(model.layers[1].b_V[3], fused.bias[64 + 24 :])
    assert torch.equal(model.W_pos, net.transformer.wpe.weight)
    assert torch.equal(model.b_out[0], net.transformer.h[0].mlp.c_proj.bias)


def test_tied_embeddings_have_both_names() -> None:
    net, _ = make("gpt2")
    model = LanguageModel(net)
    assert torch.equal(model.W_E, model.W_U.T)


def test_keys_are_repeated_for_their_heads_only_in_circuits() -> None:
    net, _ = make("llama")
    model = LanguageModel(net)
    layer = model.layers[0]
    assert layer.QK.shape == layer.OV.shape == (4, 32, 32)
    torch.testing.assert_close(layer.QK[3].AB, layer.W_Q[3] @ layer.W_K[1].T)
    torch.testing.assert_close(layer.OV[1].AB, layer.W_V[0] @ layer.W_O[1])
    assert isinstance(model.QK, FactoredMatrix)
    assert model.OV.shape == (2, 4, 32, 32)


def test_the_ov_circuit_is_what_a_head_adds_where_it_looks_at_itself_alone() -> None:
    net, inputs = make("llama")
    model = LanguageModel(net)
    first = {"input_ids": inputs["input_ids"][:, :1]}
    with model.trace(**first):
        normed = model.layers[0].norm1.output
        added = model.layers[0].attn_out
    torch.testing.assert_close(torch.einsum("bpm,hmn->bpn", normed, model.layers[0].OV.AB), added)


def test_what_is_not_there_is_refused_with_the_reason_and_never_zero() -> None:
    net, _ = make("llama")
    model = LanguageModel(net)
    with pytest.raises(MissingNameError, match=r"has no 'b_Q': .*q_proj has no bias"):
        model.layers[0].b_Q
    with pytest.raises(MissingNameError, match="'W_pos': it has no pos_embed"):
        model.W_pos
    with pytest.raises(MissingNameError, match="'W_gate': its MLP has no gate"):
        LanguageModel(make("gpt2")[0]).layers[0].W_gate


def test_a_stack_of_unlike_layers_says_which_they_are() -> None:
    net, _ = make("llama", num_hidden_layers=3)
    net.model.layers[1].self_attn.q_proj.bias = nn.Parameter(torch.ones(32))
    model = LanguageModel(net)
    found = model.weights("b_Q")
    assert found.layers == (1,)
    assert torch.equal(found.value, torch.ones(1, 4, 8))
    with pytest.raises(MissingNameError, match="layers 0, 2 have none"):
        model.b_Q


def test_a_module_that_computes_otherwise_has_no_matrix() -> None:
    class Adapted(nn.Module):
        def __init__(self, base: nn.Linear) -> None:
            super().__init__()
            self.weight, self.bias = base.weight, None
            self.more = nn.Parameter(torch.full((32,), 1e-3))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight.T + self.more

    net, _ = make("llama")
    net.model.layers[0].self_attn.q_proj = Adapted(net.model.layers[0].self_attn.q_proj)
    with pytest.raises(MissingNameError, match="computes something else than x @ weight"):
        LanguageModel(net).layers[0].W_Q


def test_quantised_weights_are_refused() -> None:
    net, _ = make("llama")
    part = net.model.layers[0].self_attn.q_proj
    part.weight = nn.Parameter(part.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(UnsupportedError, match="quantised, to int8"):
        LanguageModel(net).layers[0].W_Q


def test_offloaded_weights_are_brought_and_those_that_are_nowhere_refused() -> None:
    from accelerate import cpu_offload

    net, _ = make("llama")
    expected = LanguageModel(net).W_Q.clone()
    cpu_offload(net)
    assert net.model.layers[0].self_attn.q_proj.weight.is_meta
    assert torch.equal(LanguageModel(net).W_Q, expected)
    assert net.model.layers[0].self_attn.q_proj.weight.is_meta
    empty = make("llama")[0].to("meta")
    with pytest.raises(LoadingError, match="not in memory"):
        LanguageModel(empty).W_Q


def test_weights_that_were_left_out_are_loaded_when_they_are_asked_for(tmp_path: Path) -> None:
    net, _ = make("gpt2")
    net.save_pretrained(tmp_path)
    model = LanguageModel(
        tmp_path, tokenizer=LanguageModel("tracekit/tiny").tokenizer, dispatch=False
    )
    assert torch.equal(model.layers[1].W_O, LanguageModel(net).layers[1].W_O)


def test_positions_begin_behind_the_rows_that_are_kept_for_other_uses() -> None:
    from tracekit.architectures.matrices import positions_of

    net, inputs = make("opt")
    table = positions_of(net.model.decoder.embed_positions, "embed_positions")
    calls = calls_of(net, inputs)
    assert isinstance(table, Tensor)
    assert table.shape == (128, 32)
    assert torch.equal(table[:8], calls["model.decoder.embed_positions"][1][0])
    bert, inputs = make("roberta")
    at = next(path for path, _ in bert.named_modules() if path.endswith("position_embeddings"))
    table = positions_of(bert.get_submodule(at), at)
    assert isinstance(table, Tensor)
    assert torch.equal(table[:8], calls_of(bert, inputs)[at][1][0])


@pytest.mark.parametrize("name", ["gpt2", "gptj"])
def test_what_remains_of_the_stream_without_accumulated_biases_has_none(name: str) -> None:
    net, inputs = with_random_biases(name)
    model = LanguageModel(net)
    outputs = calls_of(net, inputs)
    written = sum(
        torch.einsum("...d,dm->...m", outputs[point.path][0], W.flatten(0, -2))
        for layer, W_O, W_out in zip(model.layers, model.W_O, model.W_out, strict=True)
        for point, W in (
            (names_of(net).point(layer.path[6:], "z"), W_O),
            (names_of(net).point(layer.path[6:], "mlp_post"), W_out),
        )
    )
    with model.trace(**inputs):
        first = model.layers[0].resid_pre
        last = model.resid_final
    torch.testing.assert_close(last - first - written, model.accumulated_bias(2).expand_as(first))


def test_accumulated_bias_counts_what_is_in_front() -> None:
    net, _ = with_random_biases("gpt2")
    model = LanguageModel(net)
    attn, out = model.b_O, model.b_out
    assert torch.equal(model.accumulated_bias(0), torch.zeros(32))
    torch.testing.assert_close(model.accumulated_bias(1), attn[0] + out[0])
    torch.testing.assert_close(
        model.accumulated_bias(1, mlp_input=True), attn[0] + out[0] + attn[1]
    )
    torch.testing.assert_close(
        model.accumulated_bias(2, include_mlp_biases=False), attn[0] + attn[1]
    )
    with pytest.raises(InputError, match="layer 2 has no MLP"):
        model.accumulated_bias(2, mlp_input=True)
    parallel = LanguageModel(with_random_biases("gptj")[0])
    in_front = parallel.accumulated_bias(1)
    assert torch.equal(parallel.accumulated_bias(1, mlp_input=True), in_front)


@pytest.mark.parametrize("mode", ["Q", "K", "V"])
def test_composition_scores_are_ratios_of_norms_from_earlier_to_later_layers(mode: str) -> None:
    model = LanguageModel(make("llama", num_hidden_layers=3)[0])
    scores = model.composition_scores(mode)
    assert scores.values.shape == (3, 4, 3, 4)
    assert scores.layers == (0, 1, 2)
    assert scores.labels[5] == "L1H1"
    norm = torch.linalg.matrix_norm
    for i, j in ((0, 1), (0, 2), (1, 2)):
        write = model.OV[i, 3].AB
        read = {"Q": model.QK[j, 2].AB, "K": model.QK[j, 2].AB.T, "V": model.OV[j, 2].AB}[mode]
        expected = norm(write @ read) / (norm(write) * norm(read))
        torch.testing.assert_close(scores.values[i, 3, j, 2], expected)
        assert not scores.values[j, :, i].any()
    assert not scores.values[1, :, 1].any()
    with pytest.raises(InputError, match="not 'q'"):
        model.composition_scores("q")


def test_directions_of_tokens_give_their_logits() -> None:
    model = LanguageModel("tracekit/tiny")
    ids = model.tokenizer("the sun", return_tensors="pt")["input_ids"]
    with model.trace(ids):
        normed = model.final_norm_out
        logits = model.logits
    for given in (7, torch.tensor(7)):
        torch.testing.assert_close(
            normed @ model.tokens_to_residual_directions(given), logits[..., 7]
        )
    several = model.tokens_to_residual_directions(torch.tensor([[3, 4], [5, 6]]))
    assert several.shape == (2, 2, 128)
    torch.testing.assert_close(normed @ several[1, 0], logits[..., 5])
    token = model.to_single_token(" the")
    assert torch.equal(model.tokens_to_residual_directions(" the"), model.W_U[:, token])
    with pytest.raises(InputError, match="is 6 tokens"):
        model.tokens_to_residual_directions("the sun is in the sky")
