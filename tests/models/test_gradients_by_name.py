"""Gradients by standard name are those of plain autograd, or refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.tiny_models import make
from tracekit import LanguageModel
from tracekit.errors import GradientError


def scalar(out: Any) -> Tensor:
    return out.logits[0, -1, 7]


def gradient_of_the_mlp_alone(net: Any, inputs: dict[str, Any]) -> Tensor:
    """That of a copy of the residual stream which the norm in front of the MLP reads."""
    copies: list[Tensor] = []

    def copy(_: object, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        copies.append(args[0].clone())
        return (copies[0],)

    handle = net.transformer.h[0].ln_2.register_forward_pre_hook(copy)
    out = net(**inputs, use_cache=False)
    handle.remove()
    return torch.autograd.grad(scalar(out), copies[0])[0]


def test_what_the_model_reads_elsewhere_too_has_no_gradient_in_a_cache() -> None:
    net, inputs = make("gpt2")
    _, cache = LanguageModel(net).run_with_cache(**inputs, incl_bwd=scalar)
    alone = gradient_of_the_mlp_alone(net, inputs)
    assert not torch.allclose(cache.grad["resid_mid", 0], alone)
    for gradients in (cache.grad, cache.grad.to("cpu")):
        for key in (("mlp_in", 0), ("attn_in", 1), "mlp_in", "layers.0.attn_in"):
            assert key not in gradients
            with pytest.raises(GradientError, match="has no gradient in this cache"):
                gradients[key]
    assert not [key for key in cache.grad if key.endswith("mlp_in")]
    assert "layers.0.mlp_in" in cache


def test_the_way_that_the_error_names_gives_the_gradient_of_it_alone() -> None:
    net, inputs = make("gpt2")
    found: list[Tensor] = []

    def keep(gradient: Tensor, hook: object) -> None:
        found.append(gradient.clone())

    logits = LanguageModel(net).run_with_hooks(**inputs, bwd_hooks=[(("mlp_in", 0), keep)])
    logits[0, -1, 7].backward()
    torch.testing.assert_close(found[0], gradient_of_the_mlp_alone(net, inputs))
