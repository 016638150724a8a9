"""A run that ends in front of a layer computes nothing behind it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests.tiny_models import make
from tracekit import LanguageModel, Model
from tracekit.errors import CacheError, InputError

pytestmark = pytest.mark.usefixtures("without_gradients")


def modules_that_run(net: nn.Module, run: Any) -> set[str]:
    """The paths of the modules that are called by `run`."""
    found: set[str] = set()
    handles = [
        module.register_forward_pre_hook(lambda *_, path=path: found.add(path))
        for path, module in net.named_modules()
    ]
    run()
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("name", ["gpt2", "llama", "gptj"])
@pytest.mark.parametrize("layer", [0, 1, 2, -1])
def test_the_residual_stream_in_front_of_the_layer_is_returned(name: str, layer: int) -> None:
    net, inputs = make(name)
    model = LanguageModel(net)
    _, whole = model.run_with_cache(**inputs)
    residual, cache = model.run_with_cache(**inputs, stop_at_layer=layer)
    number = layer % 2 if layer < 0 else layer
    expected = whole["resid_pre", number] if number < 2 else whole["resid_post", 1]
    assert torch.equal(residual, expected)
    assert "logits" not in cache
    for key in cache:
        assert torch.equal(cache[key], whole[key])
    assert model.run_with_hooks(**inputs, stop_at_layer=layer).shape == residual.shape


def test_nothing_behind_runs() -> None:
    net, inputs = make("gpt2")
    model = LanguageModel(net)
    ran = modules_that_run(net, lambda: model.run_with_cache(**inputs, stop_at_layer=1))
    assert "transformer.h.0.mlp" in ran
    assert not any(path.startswith(("transformer.h.1.", "transformer.ln_f")) for path in ran)


def test_a_name_behind_is_refused_and_one_in_front_is_not() -> None:
    net, inputs = make("gpt2")
    model = LanguageModel(net)
    _, cache = model.run_with_cache(**inputs, stop_at_layer=1, names_filter=("resid_pre", 1))
    assert list(cache) == ["layers.1.resid_pre"]
    for key in (("mlp_out", 1), "logits"):
        with pytest.raises(CacheError, match="behind stop_at_layer=1"):
            model.run_with_cache(**inputs, stop_at_layer=1, names_filter=key)


def test_a_layer_that_is_not_there_is_refused() -> None:
    net, inputs = make("gpt2")
    with pytest.raises(InputError, match="there are 2 layers"):
        LanguageModel(net).run_with_cache(**inputs, stop_at_layer=3)
    with pytest.raises(InputError, match="not known"):
        Model(nn.Sequential(nn.Linear(2, 2))).run_with_cache(torch.ones(1, 2), stop_at_layer=1)


def test_a_model_of_no_known_family_is_recorded_by_paths() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    x = torch.randn(3, 2)
    out, cache = Model(net).run_with_cache(x)
    assert torch.equal(cache["0"], net[0](x))
    assert torch.equal(out, cache["1"])
