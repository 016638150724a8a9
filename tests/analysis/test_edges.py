"""An edge's score is the slope of the metric as hooks let one input have more of one output."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import ExitStack
from math import isnan
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.tiny_models import make
from tracekit import LanguageModel
from tracekit.analysis import Edges, edge_attribution, logit_difference
from tracekit.errors import MissingNameError, UnsupportedError

CLEAN = "The Eiffel Tower is in the city of"
CORRUPTED = "The Trevi Fountain is in the city of"


def metric(logits: Tensor) -> Tensor:
    return logits[:, 7] - logits[:, 9]


@pytest.fixture(scope="module")
def tiny() -> LanguageModel:
    return LanguageModel("tracekit/tiny")


@pytest.fixture(scope="module")
def edges(tiny: LanguageModel) -> Edges:
    return edge_attribution(tiny, CLEAN, CORRUPTED, logit_difference(tiny, "Paris", "Rome"))


class ByHand:
    """Edges of one model, patched by plain hooks on its modules."""

    blocks: str
    o: str
    mlp: str
    norm1: str
    final: str

    def __init__(self, net: Any) -> None:
        self.net = net
        self.layers = net.get_submodule(self.blocks)
        self.heads = net.config.num_attention_heads

    def written(self, ids: Tensor) -> dict[str, Tensor]:
        """What each component writes, but for biases."""
        seen: dict[str, Tensor] = {}
        with ExitStack() as stack:

            def keep(name: str, module: nn.Module, is_input: bool) -> None:
                def hook(_: Any, args: Any, output: Any) -> None:
                    seen[name] = args[0] if is_input else output

                stack.callback(module.register_forward_hook(hook).remove)

            for number, layer in enumerate(self.layers):
                keep(f"L{number}", layer.get_submodule(self.o), True)
                keep(f"L{number}.mlp", layer.get_submodule(self.mlp), False)
            keep("embed", self.layers[0].get_submodule(self.norm1), True)
            self.net(ids)
        for number, layer in enumerate(self.layers):
            z = seen.pop(f"L{number}").unflatten(-1, (self.heads, -1))
            weight = self.out(layer.get_submodule(self.o)).unflatten(0, (self.heads, -1))
            for head in range(self.heads):
                seen[f"L{number}H{head}"] = z[..., head, :] @ weight[head]
        return seen

    def patched(self, ids: Tensor, target: str, change: Tensor) -> Tensor:
        """The metric if the input of a target has that much more."""
        if target == "final":
            module, hook = self.net.get_submodule(self.final), more(change)
            return self._run(ids, module, None, hook)
        name, _, part = target.partition(".")
        layer = self.layers[int(name[1])]
        if part == "mlp":
            return self._run(ids, *self.into_mlp(layer, change))
        head = int(re.split("KV|H", name)[1])
        return self._run(ids, *self.into_head(layer, part, head, change))

    def _run(self, ids: Tensor, module: nn.Module, after: Any, before: Any) -> Tensor:
        register = module.register_forward_hook if after else module.register_forward_pre_hook
        handle = register(after or before)
        try:
            return metric(self.net(ids).logits[:, -1])
        finally:
            handle.remove()
            for layer in self.layers:  # what was put there to see
                layer.get_submodule(self.norm1)._forward_pre_hooks.clear()

    def out(self, module: Any) -> Tensor:
        return module.weight.T

    def into_mlp(self, layer: Any, change: Tensor) -> tuple[Any, Any, Any]:
        raise NotImplementedError

    def into_head(self, layer: Any, part: str, head: int, change: Tensor) -> tuple[Any, Any, Any]:
        raise NotImplementedError


def more(change: Tensor) -> Callable[..., Any]:
    return lambda _, args: (args[0] + change, *args[1:])


class Gpt2(ByHand):
    blocks, o, mlp, norm1 = "transformer.h", "attn.c_proj", "mlp", "ln_1"
    final = "transformer.ln_f"

    def out(self, module: Any) -> Tensor:
        return module.weight  # a Conv1D

    def into_mlp(self, layer: Any, change: Tensor) -> tuple[Any, Any, Any]:
        return layer.ln_2, None, more(change)

    def into_head(self, layer: Any, part: str, head: int, change: Tensor) -> tuple[Any, Any, Any]:
        width = layer.attn.c_attn.weight.shape[0]
        size = width // self.heads
        at = slice(
            "qkv".index(part) * width + head * size, "qkv".index(part) * width + (head + 1) * size
        )
        seen: list[Tensor] = []
        layer.ln_1.register_forward_pre_hook(lambda _, args: seen.append(args[0]))

        def after(module: Any, args: Any, output: Tensor) -> Tensor:
            changed = layer.ln_1(seen[0] + change) - layer.ln_1(seen[0])
            output = output.clone()
            output[..., at] += changed @ module.weight[:, at]
            return output

        return layer.attn.c_attn, after, None


class Llama(ByHand):
    blocks, o, mlp, norm1 = "model.layers", "self_attn.o_proj", "mlp", "input_layernorm"
    final = "model.norm"

    def into_mlp(self, layer: Any, change: Tensor) -> tuple[Any, Any, Any]:
        return layer.post_attention_layernorm, None, more(change)

    def into_head(self, layer: Any, part: str, head: int, change: Tensor) -> tuple[Any, Any, Any]:
        return of_projection(
            layer.input_layernorm,
            layer.self_attn.get_submodule(f"{part}_proj"),
            self.net.config.hidden_size // self.heads,
            head,
            change,
        )


class GptJ(ByHand):
    blocks, o, mlp, norm1 = "transformer.h", "attn.out_proj", "mlp", "ln_1"
    final = "transformer.ln_f"

    def into_mlp(self, layer: Any, change: Tensor) -> tuple[Any, Any, Any]:
        seen: list[Tensor] = []
        layer.ln_1.register_forward_pre_hook(lambda _, args: seen.append(args[0]))

        def before(_: Any, args: Any) -> Any:
            return (args[0] + layer.ln_1(seen[0] + change) - layer.ln_1(seen[0]),)

        return layer.mlp, None, before

    def into_head(self, layer: Any, part: str, head: int, change: Tensor) -> tuple[Any, Any, Any]:
        size = self.net.config.hidden_size // self.heads
        projection = layer.attn.get_submodule(f"{part}_proj")
        return of_projection(layer.ln_1, projection, size, head, change)


def of_projection(
    norm: Any, projection: Any, size: int, head: int, change: Tensor
) -> tuple[Any, Any, Any]:
    seen: list[Tensor] = []
    norm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    at = slice(head * size, (head + 1) * size)

    def after(module: Any, args: Any, output: Tensor) -> Tensor:
        changed = norm(seen[0] + change) - norm(seen[0])
        output = output.clone()
        output[..., at] += (changed @ module.weight.T)[..., at]
        return output

    return projection, after, None


@pytest.mark.parametrize(("name", "kind"), [("gpt2", Gpt2), ("llama", Llama), ("gptj", GptJ)])
@torch.no_grad()
def test_every_score_is_the_slope_along_its_edge(name: str, kind: type[ByHand]) -> None:
    net, inputs = make(name)
    net.double()
    clean, corrupted = inputs["input_ids"][:1], inputs["input_ids"][1:2]
    found = edge_attribution(LanguageModel(net), clean, corrupted, metric).scores
    by_hand = kind(net)
    here, there = by_hand.written(corrupted), by_hand.written(clean)
    assert set(found.labels("source")) == set(here)
    step = 1e-3  # softmax and norms are computed in float32
    largest = found.values.nan_to_num().abs().max().item()
    checked = 0
    for source in found.labels("source"):
        for target in found.labels("target"):
            score = found.at(source=source, target=target).item()
            if isnan(score):
                continue
            change = step * (there[source] - here[source])
            high = by_hand.patched(corrupted, target, change)
            low = by_hand.patched(corrupted, target, -change)
            slope = ((high - low) / (2 * step)).item()
            assert score == pytest.approx(slope, rel=1e-2, abs=1e-3 * largest)
            checked += 1
    assert checked == {"gpt2": 110, "llama": 82, "gptj": 102}[name]


@torch.no_grad()
def test_edges_are_ranked_much_as_exact_patches_rank_them(
    tiny: LanguageModel, edges: Edges
) -> None:
    by_hand = Gpt2(tiny.module)
    ids, other = tiny.to_tokens(CORRUPTED), tiny.to_tokens(CLEAN)
    wanted = logit_difference(tiny, "Paris", "Rome")
    base = wanted(tiny.module(ids).logits[:, -1])
    here, there = by_hand.written(ids), by_hand.written(other)
    some = [*edges.top(20), *edges.top(200)[20::6]]
    exact: list[float] = []
    for source, target, _ in some:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(f"{__name__}.metric", wanted)
            after = by_hand.patched(ids, target, there[source] - here[source])
        exact.append((after - base).item())
    scores = torch.tensor([edge.score for edge in some])
    pair = torch.stack([scores, torch.tensor(exact)])
    ranks = pair.argsort(1).argsort(1).double()
    spearman, pearson = (torch.corrcoef(each)[0, 1].item() for each in (ranks, pair))
    print(f"\n{len(some)} edges: Spearman {spearman:.2f}, Pearson {pearson:.2f}")
    assert spearman > 0.8 and pearson > 0.5


def test_a_circuit_is_the_edges_with_most_and_their_ends(edges: Edges) -> None:
    circuit = edges.circuit(8)
    sizes = [abs(edge.score) for edge in edges.top(8)]
    assert circuit.edges == edges.top(8) and sizes == sorted(sizes, reverse=True)
    assert "final" in circuit.nodes and "embed" in circuit.nodes
    assert all("." not in node or node.endswith("mlp") for node in circuit.nodes)
    assert repr(circuit).count("→") == 8 and "edges)\n" in repr(edges)
    assert circuit.to_json()["edges"][0]["source"] == circuit.edges[0].source
    assert edges.to_json()["axes"][0]["name"] == "source"


def test_what_reaches_a_target_is_the_gradient_at_its_input(tiny: LanguageModel) -> None:
    wanted = logit_difference(tiny, "Paris", "Rome")
    pair = (["The Eiffel Tower is in", CLEAN], ["The Trevi Fountain is in", CORRUPTED])
    whole = edge_attribution(tiny, *pair, wanted, heads=False)  # padded, too
    each = [edge_attribution(tiny, *one, wanted, heads=False) for one in zip(*pair, strict=True)]
    mean = (each[0].scores.values + each[1].scores.values) / 2
    torch.testing.assert_close(whole.scores.values, mean, equal_nan=True, rtol=1e-3, atol=1e-3)
    apart = edge_attribution(tiny, CLEAN, CORRUPTED, wanted)
    heads = [f"L0H{head}" for head in range(4)]
    found = sum(apart.scores.at(source=head, target="L2.mlp").item() for head in heads)
    assert each[1].scores.at(source="L0.attn", target="L2.mlp").item() == pytest.approx(
        found, rel=1e-3
    )


@pytest.mark.parametrize("heads", [True, False])
@pytest.mark.parametrize("name", ["gemma2", "mixtral", "falcon", "jamba", "olmo2", "mamba"])
def test_edges_from_the_embeddings_add_up_to_their_gradient(name: str, heads: bool) -> None:
    """Every way from them begins with an edge: their total derivative, by autograd alone."""
    net, inputs = make(name)
    ids = inputs["input_ids"]
    found = edge_attribution(LanguageModel(net), ids[:1], ids[1:2], metric, heads=heads).scores
    embed = net.get_input_embeddings()
    leaf = embed(ids[1:2]).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(metric(net(inputs_embeds=leaf).logits[:, -1]).sum(), leaf)
    whole = ((embed(ids[:1]) - leaf) * gradient).sum().item()
    assert found.at(source="embed").values.sum().item() == pytest.approx(whole, rel=1e-3)


def test_what_families_can_not_do_is_refused() -> None:
    for name, kind, told in (
        ("deepseek_v3", MissingNameError, "has no 'W_Q'"),
        ("zamba2", UnsupportedError, "neither the residual stream nor its norm"),
        ("bert", UnsupportedError, "does not just add to the residual stream"),
    ):
        net, inputs = make(name)
        ids = inputs["input_ids"]
        with pytest.raises(kind, match=told):
            edge_attribution(LanguageModel(net), ids[:1], ids[1:2], metric)
    net, inputs = make("t5")
    with pytest.raises(UnsupportedError, match="cross-attention"):
        edge_attribution(
            LanguageModel(net), inputs, {**inputs, "input_ids": inputs["input_ids"].flip(1)}, metric
        )


def test_half_precision_ranks_edges_alike(tiny: LanguageModel, edges: Edges) -> None:
    half = LanguageModel("tracekit/tiny", dtype=torch.bfloat16)
    found = edge_attribution(half, CLEAN, CORRUPTED, logit_difference(half, "Paris", "Rome"))
    assert {edge[:2] for edge in found.top(5)} == {edge[:2] for edge in edges.top(5)}
