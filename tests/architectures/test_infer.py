"""Names that are found by structure are those that a declaration has, or there are none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests.architectures.stirred import stirred
from tests.tiny_models import NAMES, make
from tracekit import Model
from tracekit.architectures import names_of
from tracekit.architectures.infer import inferred
from tracekit.architectures.witness import is_hookable, layers_of, observe
from tracekit.errors import MissingNameError

pytestmark = pytest.mark.usefixtures("without_gradients")
WIDTH = 16
# Whose every name is found by structure alone.
WHOLE = {
    "llama", "mistral", "qwen2", "qwen3", "gptj", "gemma", "gemma2", "gemma3_text", "olmo2",
    "cohere2", "smollm3", "vit",
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_what_is_inferred_is_what_is_declared(name: str) -> None:
    net, inputs = make(name)
    stirred(net)
    declared = names_of(net)
    assert declared is not None
    found = inferred(net, lambda: net(**inputs))
    if found is None:
        assert name not in WHOLE
        return
    one = observe(declared, lambda: net(**inputs))
    other = observe(found, lambda: net(**inputs))
    places = {(where.path, where.call): where for where in layers_of(declared)}
    for (where, word), seen in other.named.items():
        same = places.get((where.path, where.call), where)
        expected = one.value(same, word)
        assert expected is not None, f"{where} {word} is not declared"
        assert torch.equal(seen.value, expected), f"{where} {word} is another tensor"
    if name in WHOLE:
        assert {key[1] for key in other.named} == {key[1] for key in one.named}
        assert all(
            found.point(owner, bound.name) is not None
            for owner in declared.layers
            for bound in declared.points(owner)
            if is_hookable(declared, bound)
        )


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.v_proj, self.o_proj = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            each(x).unflatten(-1, (2, -1)).transpose(1, 2)
            for each in (self.q_proj, self.k_proj, self.v_proj)
        )
        z = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(z.transpose(1, 2).flatten(-2))


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up_proj, self.down_proj = nn.Linear(WIDTH, 32), nn.Linear(32, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(torch.relu(self.up_proj(x)))


class Layer(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.norm_1, self.self_attn = nn.LayerNorm(WIDTH), Attention()
        self.norm_2, self.mlp = nn.LayerNorm(WIDTH), Mlp()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.kind == "pre-norm":
            x = x + self.self_attn(self.norm_1(x))
            return x + self.mlp(self.norm_2(x))
        if self.kind == "post-norm":
            x = self.norm_1(x + self.self_attn(x))
            return self.norm_2(x + self.mlp(x))
        if self.kind == "parallel":
            return x + self.self_attn(self.norm_1(x)) + self.mlp(self.norm_2(x))
        normed = self.norm_1(x)  # the stream goes on from behind the norm
        x = normed + self.self_attn(normed)
        return x + 0.5 * self.mlp(self.norm_2(x))


class Net(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([Layer(kind) for _ in range(2)])
        self.config: Any = type("Config", (), {"num_attention_heads": 2, "model_type": "mine"})()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def input_of() -> torch.Tensor:
    return torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", ["pre-norm", "post-norm", "parallel"])
def test_a_model_of_ones_own_gets_names_once_they_are_proved(kind: str) -> None:
    net, x = stirred(Net(kind)), input_of()
    model = Model(net)
    with pytest.raises(MissingNameError, match=r"check_names\(input\) looks for standard names"):
        with model.trace(x):
            model.layers[0].attn_out
    proof = model.check_names(x)
    assert not proof.failed, "\n".join(map(str, proof.failed))
    with model.trace(x):
        q = model.layers[0].q.clone()
        attn = model.layers[0].attn_out.clone()
        post = model.layers[0].resid_post.clone()
    layer: Any = net.layers[0]
    given = x if kind == "post-norm" else layer.norm_1(x)
    assert torch.equal(q.flatten(-2), layer.self_attn.q_proj(given))
    torch.testing.assert_close(attn, layer.self_attn(given))
    torch.testing.assert_close(post, layer(x))


def test_a_parallel_block_has_no_middle() -> None:
    model = Model(stirred(Net("parallel")))
    model.check_names(input_of())
    with pytest.raises(MissingNameError, match="nothing between them"):
        with model.trace(input_of()):
            model.layers[0].resid_mid


def test_a_block_that_adds_up_in_a_way_of_its_own_gets_no_names() -> None:
    model = Model(stirred(Net("odd")))
    with pytest.raises(MissingNameError, match="it has no standard names"):
        model.check_names(input_of())
