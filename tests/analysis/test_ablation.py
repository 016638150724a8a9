"""An ablation sweep is a loop of runs in which a plain hook replaces one component."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.tiny_models import make
from tracekit import LanguageModel
from tracekit.analysis import ablate, ablation_sweep, logit, logit_difference, patch_sweep
from tracekit.errors import InputError

CITY = "The {} is in the city of"
TEXT = CITY.format("Eiffel Tower")
OTHERS = [CITY.format(each) for each in ("Trevi Fountain", "Prado Museum", "Willis Tower")]
OUT = {
    "gpt2": "transformer.h.{}.attn.c_proj",
    "llama": "model.layers.{}.self_attn.o_proj",
    "gptj": "transformer.h.{}.attn.out_proj",
    "mixtral": "model.layers.{}.self_attn.o_proj",
    "bloom": "transformer.h.{}.self_attention.dense",
}


@pytest.fixture(scope="module")
def tiny() -> LanguageModel:
    return LanguageModel("tracekit/tiny")


def metric(logits: Tensor) -> Tensor:
    return logits[:, 7] - logits[:, 9]


@torch.no_grad()
def loop(net: Any, path: str, inputs: Any, put: Callable[[Tensor, int, int], Tensor]) -> Tensor:
    """The change of the metric with each head of two layers replaced, by hooks."""
    base = metric(net(**inputs).logits[:, -1])
    heads = net.config.num_attention_heads
    found = torch.zeros(2, heads)
    for layer in range(2):
        for head in range(heads):

            def replace(_: Any, args: Any, layer: int = layer, head: int = head) -> Any:
                z = args[0].clone().unflatten(-1, (heads, -1))
                z[..., head, :] = put(z, layer, head)
                return (z.flatten(-2),)

            handle = net.get_submodule(path.format(layer)).register_forward_pre_hook(replace)
            found[layer, head] = (metric(net(**inputs).logits[:, -1]) - base).mean()
            handle.remove()
    return found


@torch.no_grad()
def usual(net: Any, path: str, inputs: Any) -> list[Tensor]:
    """z of two layers, as hooks see it."""
    seen: list[Tensor] = []
    for layer in range(2):
        module = net.get_submodule(path.format(layer))
        handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
        net(**inputs)
        handle.remove()
    return [each.unflatten(-1, (net.config.num_attention_heads, -1)) for each in seen]


@pytest.mark.parametrize("name", OUT)
def test_zero_and_mean_are_those_of_a_loop_of_hooks(name: str) -> None:
    net, inputs = make(name)
    ids = {"input_ids": inputs["input_ids"]}
    model = LanguageModel(net)
    zero = loop(net, OUT[name], ids, lambda z, *_: torch.zeros_like(z[..., 0, :]))
    torch.testing.assert_close(
        ablation_sweep(model, ids, metric).values, zero, rtol=1e-4, atol=1e-6
    )
    z = usual(net, OUT[name], ids)
    mean = loop(net, OUT[name], ids, lambda _, layer, head: z[layer][..., head, :].mean((0, 1)))
    found = ablation_sweep(model, ids, metric, how="mean", memory=1)  # a row at a time
    torch.testing.assert_close(found.values, mean, rtol=1e-4, atol=1e-6)
    each = loop(net, OUT[name], ids, lambda _, layer, head: z[layer][..., head, :].mean(0))
    found = ablation_sweep(model, ids, metric, how="mean", by_position=True)
    torch.testing.assert_close(found.values, each, rtol=1e-4, atol=1e-6)


def test_resampling_takes_the_activation_of_another_prompt() -> None:
    net, inputs = make("gpt2")
    ids = inputs["input_ids"][:2]
    z = usual(net, OUT["gpt2"], {"input_ids": ids})  # each of two has one other
    expected = loop(
        net, OUT["gpt2"], {"input_ids": ids}, lambda _, layer, head: z[layer][[1, 0], :, head]
    )
    found = ablation_sweep(LanguageModel(net), ids, metric, how="resample")
    torch.testing.assert_close(found.values, expected, rtol=1e-4, atol=1e-6)
    one = ablation_sweep(LanguageModel(net), ids[:1], metric, how="resample", reference=ids)
    assert one.values.any()
    with pytest.raises(InputError, match="needs other prompts"):
        ablation_sweep(LanguageModel(net), ids[:1], metric, how="resample")


def test_padding_is_no_part_of_a_mean_and_prompts_are_as_alone(tiny: LanguageModel) -> None:
    wanted = logit_difference(tiny, "Paris", "Rome")
    prompts = [TEXT, "Many tourists visit the Trevi Fountain in"]
    each = [
        ablation_sweep(tiny, one, wanted, how="mean", reference=prompts).values for one in prompts
    ]
    for side in ("left", "right"):
        inputs = tiny.to_inputs(prompts, padding_side=side)
        found = ablation_sweep(tiny, inputs, wanted, how="mean")
        mean = (each[0] + each[1]) / 2
        torch.testing.assert_close(found.values, mean, rtol=1e-3, atol=1e-4)
    _, one = tiny.run_with_cache(prompts[0], names_filter="z")
    _, two = tiny.run_with_cache(prompts[1], names_filter="z")
    tokens = torch.cat([one["z"][:, 0], two["z"][:, 0]], 1)  # [layers, tokens, heads, head_dim]
    with ablate(tiny, [("z", 1, 2)], how="mean", reference=prompts):
        _, cache = tiny.run_with_cache(TEXT, names_filter="z")
    expected = tokens[1, :, 2].mean(0).expand(9, -1)
    torch.testing.assert_close(cache["z", 1][0, :, 2], expected)
    torch.testing.assert_close(cache["z", 1][0, :, 1], one["z"][1, 0, :, 1])


@pytest.mark.parametrize(
    ("activation", "over", "shape"),
    [
        ("mlp_out", ("layer",), (4,)),
        ("mlp_post", ("layer", "neuron"), (4, 512)),
        ("resid_pre", ("position", "layer"), (9, 4)),
        ("attn_out", ("layer", "position"), (4, 9)),
        ("embed_out", ("position",), (9,)),
        ("pattern", ("layer", "head"), (4, 4)),
    ],
)
def test_any_axes_of_any_activation_are_swept(
    tiny: LanguageModel, activation: str, over: tuple[str, ...], shape: tuple[int, ...]
) -> None:
    wanted = logit_difference(tiny, "Paris", "Rome")
    found = ablation_sweep(tiny, TEXT, wanted, over, activation)
    assert found.shape == shape and found.names == over
    place = tuple(int(each) for each in torch.tensor(shape) // 2)  # one of them, by hand
    at = dict(zip(over, place, strict=True))
    axis = {"neuron": (..., at.get("neuron")), "head": (slice(None), at.get("head"))}
    index = next((axis[each] for each in over if each in axis), (slice(None), at.get("position")))
    index = (...,) if over == ("layer",) else index

    def zero(tensor: Tensor, _: Any) -> None:
        tensor[index] = 0

    name: Any = (activation, at["layer"]) if "layer" in at else activation
    with torch.no_grad():
        logits = tiny.run_with_hooks(TEXT, fwd_hooks=[(name, zero)])[:, -1]
        change = wanted(logits) - wanted(tiny.forward(TEXT)[:, -1])
    assert found.values[place].item() == pytest.approx(change.item(), rel=1e-3, abs=1e-4)


def test_several_are_ablated_together(tiny: LanguageModel) -> None:
    with ablate(tiny, [("z", 2, 1), ("z", 2, -1), ("mlp_out", 0), ("mlp_post", 3, 7)]):
        _, cache = tiny.run_with_cache(TEXT)
    assert not cache["z", 2][:, :, [1, 3]].any() and cache["z", 2][:, :, [0, 2]].all()
    assert not cache["mlp_out", 0].any() and cache["mlp_out", 1].all()
    assert not cache["mlp_post", 3][..., 7].any() and cache["mlp_post", 3][..., 8].all()
    assert tiny.run_with_cache(TEXT)[1]["mlp_out", 0].all()  # no trace is left


def test_what_is_no_ablation_is_refused(tiny: LanguageModel) -> None:
    with pytest.raises(InputError, match="how= is 'zero', 'mean' or 'resample', not 'none'"):
        ablation_sweep(tiny, TEXT, metric, how="none")
    with pytest.raises(InputError, match="of another length"):
        ablation_sweep(tiny, TEXT, metric, how="resample", reference="The Tower is in")
    with pytest.raises(InputError, match="these prompts are of different lengths"):
        ablation_sweep(tiny, TEXT, metric, how="mean", by_position=True, reference=["The", TEXT])
    with pytest.raises(InputError, match="is of layers"):
        ablation_sweep(tiny, TEXT, metric, over=("head",))
    with pytest.raises(InputError, match="pattern has no mean over positions"):
        ablation_sweep(tiny, TEXT, metric, activation="pattern", how="mean")
    with pytest.raises(InputError, match="a place is"):
        ablate(tiny, [("z",)])
    with pytest.raises(InputError, match=r"as in \('z', 2, 1\); not \(2, 1\)"):
        ablate(tiny, [(2, 1)])


def test_a_model_is_as_it_was_when_an_ablation_is_over(tiny: LanguageModel) -> None:
    before = tiny.forward(TEXT)
    with ablate(tiny, [("z", 2, 1)]):
        assert not torch.equal(tiny.forward(TEXT), before)
    other = "The Trevi Fountain is in the city of"
    found = patch_sweep(tiny, TEXT, other, logit(tiny, "Paris"), layers=[3])  # refuses edited ones
    assert found.clean == pytest.approx(logit(tiny, "Paris")(before[:, -1]).item())
    assert torch.equal(tiny.forward(TEXT), before)
