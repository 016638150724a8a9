"""Renames: other names for modules, by path, by glob and by class; or refused when made."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests.tiny_models import make
from tracekit import LanguageModel, Model
from tracekit.errors import AliasError, UnknownModuleError, UnknownPathError

IDS = torch.tensor([[11, 3, 7]])
RENAME: dict[Any, Any] = {
    "transformer.h": ["layers", "blocks"],
    "transformer.h.*.attn": "self_attn",
    "mlp.c_fc": "mlp.up_proj",
    "mlp.c_proj": "down_proj",
}


@pytest.fixture(scope="module")
def gpt2() -> Any:
    return LanguageModel(make("gpt2")[0], rename=RENAME)


def test_an_alias_is_an_attribute_and_its_module_keeps_its_own_path(gpt2: Any) -> None:
    assert gpt2.layers == gpt2.transformer.h
    assert gpt2.blocks[1].path == "model.transformer.h.1"
    assert gpt2.layers[1].self_attn.path == "model.transformer.h.1.attn"
    assert gpt2.layers[0].mlp.up_proj.path == "model.transformer.h.0.mlp.c_fc"
    assert gpt2.layers[0].down_proj.path == "model.transformer.h.0.mlp.c_proj"
    assert gpt2["layers"][0]["self_attn"] == gpt2.transformer.h[0].attn
    assert {"layers", "blocks"} <= set(dir(gpt2)) and "self_attn" in dir(gpt2.layers[0])


def test_an_alias_is_valid_in_traces_selectors_and_keys(gpt2: Any) -> None:
    with gpt2.trace(IDS) as tracer:
        named = tracer.cache(modules=["layers.1", "model.blocks.0.self_attn"])
        globbed = tracer.cache(modules="layers.*.mlp.up_proj")
        cache = tracer.cache()
        live = gpt2.layers[1].hidden
    assert list(named) == ["model.transformer.h.0.attn", "model.transformer.h.1"]
    assert list(globbed) == [f"model.transformer.h.{i}.mlp.c_fc" for i in range(len(gpt2.layers))]
    for found in (
        cache["model.layers.1"],
        cache["blocks.1"],
        cache.model.layers[1],
        cache[gpt2.layers[1]],
        cache["transformer.h.1"],
    ):
        assert torch.equal(found.hidden, live)
    assert cache["layers.0.self_attn"][0] is cache["transformer.h.0.attn"][0]


def test_classes_name_the_modules_of_that_kind() -> None:
    model: Any = Model(
        nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), nn.ReLU()),
        rename={nn.ReLU: "activation", nn.Linear: ("matrices", "matrix")},
    )
    assert model[0].activation == model[0][1]
    assert model.activation == model[1]
    assert model[0].matrix == model[0].matrices == model[0][0]


def test_aliases_follow_modules_that_are_replaced() -> None:
    model: Any = Model(nn.Sequential(nn.Sequential(nn.Linear(2, 2))), rename={"0.0": "first"})
    other = nn.Linear(2, 2)
    model.module[0][0] = other
    assert model.first.module is other
    model.module[0] = nn.Identity()
    model.module.add_module("1", nn.ReLU())
    with model.trace(torch.ones(1, 2)) as tracer:
        cache = tracer.cache(modules=model[1])
    assert list(cache) == ["model.1"]
    with pytest.raises(UnknownModuleError):
        model.first


def test_errors_suggest_aliases(gpt2: Any) -> None:
    with gpt2.trace(IDS) as tracer:
        cache = tracer.cache()
    with pytest.raises(UnknownModuleError, match="did you mean 'layers'"):
        gpt2.layrs
    with pytest.raises(UnknownModuleError, match="did you mean 'self_attn'"):
        gpt2.layers[0]["self_atn"]
    with pytest.raises(UnknownPathError, match=r"'model.layers.0.self_attn'"):
        cache["model.layers.0.self_atn"]
    with pytest.raises(UnknownPathError, match=r"'layers.0.self_attn'"):
        with gpt2.trace(IDS) as tracer:
            tracer.cache(modules="layers.0.self_atn")


@pytest.mark.parametrize(
    ("rename", "text"),
    [
        ({"transformer.hh": "x"}, "no module of GPT2LMHeadModel; did you mean 'transformer.h'"),
        ({"h.*.atn": "x"}, "no module of GPT2LMHeadModel; did you mean"),
        ({nn.Conv2d: "x"}, "every Conv2d, and GPT2LMHeadModel has none"),
        ({"transformer.h": "config"}, "model.config is something else already"),
        ({"transformer.h": "output"}, "model.output is something else already"),
        ({"attn": "mlp"}, "model.transformer.h.0.mlp is something else already"),
        ({nn.LayerNorm: "norm"}, "another name of model.transformer.h.0.ln_1 as well"),
        ({"transformer.h.*": "block"}, "another name of model.transformer.h.0 as well"),
        ({"transformer.h": "core.layers"}, "model.core is not a module that contains it"),
        ({"transformer.h": "the layers"}, "letters, digits and underscores"),
    ],
)
def test_what_cannot_be_an_alias_is_refused_when_the_model_is_made(rename: Any, text: str) -> None:
    with pytest.raises(AliasError, match=text):
        LanguageModel(make("gpt2")[0], rename=rename)
