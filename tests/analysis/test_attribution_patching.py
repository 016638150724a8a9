"""Attribution patching is a plain product of difference and gradient, and near to exact patches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.tiny_models import make
from tracekit import LanguageModel
from tracekit.analysis import attribution_patching, logit_difference, patch_sweep, probability
from tracekit.errors import InputError

CLEAN = "The Eiffel Tower is in the city of"
CORRUPTED = "The Trevi Fountain is in the city of"


@pytest.fixture(scope="module")
def tiny() -> LanguageModel:
    return LanguageModel("tracekit/tiny")


def metric(logits: Tensor) -> Tensor:
    return logits[:, 7] - logits[:, 9]


def spearman(one: Tensor, other: Tensor) -> float:
    """The correlation of ranks."""
    ranks = torch.stack([each.flatten().argsort().argsort().double() for each in (one, other)])
    return float(torch.corrcoef(ranks)[0, 1])


@torch.no_grad()
def exact(model: LanguageModel, into: str, source: str, wanted: Any, name: str) -> Tensor:
    """The change of the metric for each patch, each by a run of its own."""
    _, cache = model.run_with_cache(source, names_filter=name)
    base = wanted(model.forward(into)[:, -1])
    values = cache[name]  # [layers, 1, pos, ...]
    axis = 3 if name == "z" else 2
    found = torch.zeros(values.shape[0], values.shape[axis])
    for layer in range(found.shape[0]):
        for place in range(found.shape[1]):

            def patch(tensor: Tensor, hook: Any, layer: int = layer, place: int = place) -> None:
                index = (slice(None),) * (axis - 1)
                tensor[(*index, place)] = values[layer][(*index, place)]

            logits = model.run_with_hooks(into, fwd_hooks=[((name, layer), patch)])
            found[layer, place] = (wanted(logits[:, -1]) - base).item()
    return found


@pytest.mark.parametrize("name", ["gpt2", "llama", "gptj", "gemma2", "mixtral", "bloom"])
@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_it_is_difference_times_gradient_of_plain_hooks(name: str, direction: str) -> None:
    net, inputs = make(name)
    clean, corrupted = inputs["input_ids"][:2]
    seen: list[Tensor] = []
    layers = net.get_submodule("model.layers" if hasattr(net, "model") else "transformer.h")
    handle = layers[1].register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]),
        with_kwargs=True,
    )
    into, source = (corrupted, clean) if direction == "denoise" else (clean, corrupted)
    total = metric(net(into[None]).logits[:, -1]).sum()
    net(source[None])
    handle.remove()
    (gradient,) = torch.autograd.grad(total, seen[0])
    found = attribution_patching(LanguageModel(net), clean, corrupted, metric, direction=direction)
    expected = ((seen[1] - seen[0]) * gradient).sum(-1)[0].detach()
    torch.testing.assert_close(found.at(layer="1").values, expected)


@pytest.mark.parametrize(
    ("over", "name", "at_least"),
    [
        (("layer", "position"), "resid_pre", 0.8),
        (("layer", "position"), "attn_out", 0.6),
        (("layer", "position"), "mlp_out", 0.6),
        (("layer", "head"), "z", 0.6),
    ],
)
@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_it_ranks_patches_much_as_exact_patching_does(
    tiny: LanguageModel, over: tuple[str, str], name: str, at_least: float, direction: str
) -> None:
    wanted = logit_difference(tiny, "Paris", "Rome")
    found = attribution_patching(
        tiny, CLEAN, CORRUPTED, wanted, over, activation=name, direction=direction
    )
    into, source = (CORRUPTED, CLEAN) if direction == "denoise" else (CLEAN, CORRUPTED)
    true = exact(tiny, into, source, wanted, name)
    apart = true.abs() > 1e-4  # patches of what does not differ do nothing, in any order
    rank = spearman(found.values[apart], true[apart])
    print(f"\n{direction} {name} over {over}: Spearman {rank:.2f} of {int(apart.sum())} patches")
    assert rank > at_least


@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_it_takes_the_place_of_an_exact_sweep(tiny: LanguageModel, direction: Any) -> None:
    wanted = logit_difference(tiny, "Paris", "Rome")
    pair = (CLEAN, CORRUPTED, wanted, ("layer", "position"))
    found = attribution_patching(tiny, *pair, activation="mlp_out", direction=direction)
    sweep = patch_sweep(tiny, *pair, activation="mlp_out", direction=direction, progress=False)
    assert found.axes == sweep.values.axes
    base = sweep.corrupted if direction == "denoise" else sweep.clean
    change = sweep.values.values - base
    apart = change.abs() > 1e-4
    rank = spearman(found.values[apart], change[apart])
    print(f"\n{direction}, against patch_sweep of mlp_out: Spearman {rank:.2f}")
    assert rank > 0.8


def test_a_patch_of_what_is_the_same_in_both_runs_is_nothing(tiny: LanguageModel) -> None:
    wanted = logit_difference(tiny, "Paris", "Rome")
    found = attribution_patching(tiny, CLEAN, CORRUPTED, wanted)
    assert found.labels("position")[2:4] == ("Eiffel", "Tower")
    assert not found.at(layer=0, position=slice(4, None)).values.any()
    assert found.at(layer=0, position=2).item() != 0


def test_padded_pairs_are_each_as_they_are_alone(tiny: LanguageModel) -> None:
    pairs = [(CLEAN, CORRUPTED), ("We took a picture of the Eiffel Tower in",) * 2]
    pairs[1] = (pairs[1][0], "We took a picture of the Trevi Fountain in")
    wanted = logit_difference(tiny, "Paris", "Rome")
    each = [
        attribution_patching(tiny, *pair, wanted, ("layer", "head"), activation="z")
        for pair in pairs
    ]
    clean, corrupted = (list(side) for side in zip(*pairs, strict=True))
    over = ("layer", "head", "prompt")
    found = attribution_patching(tiny, clean, corrupted, wanted, over, activation="z")
    expected = torch.stack([one.values for one in each], -1)
    torch.testing.assert_close(found.values, expected, rtol=1e-3, atol=1e-4)
    with pytest.raises(InputError, match="these prompts are of different lengths"):
        attribution_patching(tiny, clean, corrupted, wanted)


def test_prompts_that_are_not_token_beside_token_are_refused(tiny: LanguageModel) -> None:
    wanted = logit_difference(tiny, "Paris", "Rome")
    with pytest.raises(InputError, match=r"of \[9\] and \[4\] tokens"):
        attribution_patching(tiny, CLEAN, "The Trevi Fountain", wanted)
    with pytest.raises(InputError, match=r"direction= is 'denoise' .* or 'noise' .*, not 'clean'"):
        attribution_patching(tiny, CLEAN, CORRUPTED, wanted, direction="clean")


@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_it_labels_positions_as_a_sweep_does_by_the_clean_prompts(
    tiny: LanguageModel, direction: Any
) -> None:
    names = ["Eiffel Tower", "Trevi Fountain", "Prado Museum"]
    clean = [f"The {name} is in the city of" for name in names]
    for pair, label in (((clean[0], clean[1]), "Eiffel"), ((clean, clean[::-1]), "2")):
        paris = probability(tiny, "Paris")
        first = attribution_patching(tiny, *pair, paris, direction=direction)
        exact = patch_sweep(tiny, *pair, paris, layers=[3], direction=direction)
        assert first.labels("position") == exact.values.labels("position")
        assert first.labels("position")[2] == label
