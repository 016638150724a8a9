"""Envoys as people use them: found by path, gone through, moved, and given new parts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests.tiny_models import make
from tests.tracing.plain import X, small
from tracekit import Envoy, LanguageModel, Model
from tracekit.errors import UnknownModuleError


@pytest.fixture(scope="module")
def gpt2() -> Any:
    return LanguageModel(make("gpt2")[0])


def test_get_finds_a_module_by_its_path_below(gpt2: Any) -> None:
    assert gpt2.get("transformer.h.1.mlp").path == "model.transformer.h.1.mlp"
    assert gpt2.transformer.get("h.1") == gpt2.transformer.h[1]
    with pytest.raises(UnknownModuleError, match=r"did you mean 'model\.transformer.h.1.mlp'"):
        gpt2.get("transformer.h.1.mpl")


def test_modules_are_envoys_each_once_with_full_paths(gpt2: Any) -> None:
    expected = [f"model.{path}" if path else "model" for path, _ in gpt2.module.named_modules()]
    assert [path for path, _ in gpt2.named_modules()] == expected
    assert [envoy.path for envoy in gpt2.modules()] == expected
    assert all(envoy.path == path for path, envoy in gpt2.named_modules())
    block = gpt2.transformer.h[0]
    inside = [path for path in expected if path.startswith("model.transformer.h.0")]
    assert [envoy.path for envoy in block.modules()] == inside
    attentions = gpt2.modules(lambda envoy: envoy.path.endswith(".attn"))
    assert [envoy.path for envoy in attentions] == [f"{b.path}.attn" for b in gpt2.transformer.h]


def test_a_parent_is_the_module_above(gpt2: Any) -> None:
    assert gpt2.transformer.h[0].attn.parent == gpt2.transformer.h[0]
    assert gpt2.transformer.parent == gpt2
    assert gpt2.parent is None


def test_the_device_is_that_of_the_weights() -> None:
    model = Model(nn.Sequential(nn.Linear(2, 2, device="meta"), nn.ReLU(), nn.Linear(2, 2)))
    assert model.device == model[0].device == torch.device("meta")
    assert model[1].device is None
    assert model[2].device == torch.device("cpu")


@pytest.mark.parametrize("method", ["cpu", "eval", "train", "double", "requires_grad_"])
def test_what_changes_a_module_returns_its_envoy(method: str) -> None:
    model: Any = Model(small())
    assert getattr(model, method)() is model
    layer = model[0]
    assert layer.to(torch.float16) is layer
    assert model.module[0].weight.dtype == torch.float16


def test_a_module_assigned_to_a_new_name_becomes_a_part_of_the_model() -> None:
    model: Any = Model(small())
    model[0].sae = nn.Linear(4, 4)
    sae = model.module[0].sae
    assert isinstance(model[0].sae, Envoy) and model[0].sae.path == "model.0.sae"
    assert "0.sae.weight" in dict(model.module.named_parameters())
    with model.trace(X) as tracer:
        model[0].output = model[0].sae(model[0].output)
        result = tracer.result
    assert torch.equal(result, model.module[1:](sae(nn.functional.linear(X, *weights(model)))))


def weights(model: Any) -> tuple[Any, Any]:
    return model.module[0].weight, model.module[0].bias


def test_an_envoy_assigned_stands_for_its_module() -> None:
    model: Any = Model(small())
    model.spare = model[2]
    assert model.module.spare is model.module[2]
    assert model["spare"].module is model.module[2]
    assert model.get("spare") == model[2]
