"""The residual stream taken apart into heads, neurons, embeddings and biases."""

# Elhage et al. 2021: attention adds up what its heads write, each z @ W_O; an MLP what its neurons
# write, each its activation times its row of W_out. Behind a norm of what is added (Gemma 2) each
# part is sent through that norm with the scale that it had, so that they add up there too.

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from tracekit.analysis.components import Components, Positions, at_positions, recorded, stacked
from tracekit.analysis.norming import apply_norm_to_stack, number_of, stream_at, through
from tracekit.analysis.residual import additions, check_sum, embeddings
from tracekit.errors import MissingNameError, UnsupportedError
from tracekit.models.language import LanguageModel
from tracekit.tracing.named_cache import NamedCache


def stack_head_results(
    model: LanguageModel,
    cache: NamedCache,
    layer: int | None = None,
    incl_remainder: bool = False,
    pos_slice: Positions = None,
    apply_norm: bool = False,
) -> Components:
    """What each head in front of `layer` added: `[heads of all layers, batch, pos, model]`.

    Labels are "L0H3", and "remainder" for all else of the stream, with `incl_remainder`. Layers
    without heads are in the remainder.
    """
    return _results(model, cache, "attn_out", layer, incl_remainder, pos_slice, apply_norm)


def stack_neuron_results(
    model: LanguageModel,
    cache: NamedCache,
    layer: int | None = None,
    incl_remainder: bool = False,
    pos_slice: Positions = None,
    apply_norm: bool = False,
) -> Components:
    """What each neuron in front of `layer` added: `[neurons of all layers, batch, pos, model]`.

    Labels are "L0N3". It is large: ask for few positions. Layers with experts are in the remainder.
    """
    return _results(model, cache, "mlp_out", layer, incl_remainder, pos_slice, apply_norm)


def get_neuron_results(
    model: LanguageModel,
    cache: NamedCache,
    layer: int,
    neuron_slice: slice | list[int] | None = None,
    pos_slice: Positions = None,
) -> Tensor:
    """What each neuron of one layer added: `[batch, pos, neurons, model]`."""
    number = number_of(model, layer, mlp_input=True)
    factors = {name: factor for _, name, factor in additions(model, number + 1, False)}
    values, _ = _written(model, cache, "mlp_out", number, pos_slice, neuron_slice)
    return values * factors.get("mlp_out", 1.0)


def full_resid_decomposition(
    model: LanguageModel,
    cache: NamedCache,
    layer: int | None = None,
    mlp_input: bool = False,
    expand_neurons: bool = True,
    apply_norm: bool = False,
    pos_slice: Positions = None,
) -> Components:
    """All that the stream is made of: heads, neurons, "embed", "pos_embed", "bias".

    What has no heads or neurons that add up (state-space mixers, experts) is whole: "0_ssm_out".
    Without `expand_neurons` MLPs are whole, biases and all. It adds up to the recorded stream,
    which is checked. `[components, batch, pos, model]`.
    """
    number = number_of(model, layer, mlp_input)
    parts: dict[str, list[tuple[str, Tensor]]] = {"attn_out": [], "mlp_out": [], "": []}
    biases: list[Tensor] = []
    for each, name, factor in additions(model, number, mlp_input):
        is_apart = name == "attn_out" or (name == "mlp_out" and expand_neurons)
        if not is_apart or not _has_parts(model, each, name):
            whole = at_positions(recorded(cache, name, each), pos_slice) * factor
            parts[name if name in parts else ""].append((f"{each}_{name}", whole))
            continue
        values, bias = _written(model, cache, name, each, pos_slice)
        parts[name] += _labelled(name, each, values * factor)
        biases += [bias * factor] if bias is not None else []
    begin = [(label, at_positions(value, pos_slice)) for label, value in embeddings(cache)]
    whole = at_positions(stream_at(model, cache, number, mlp_input), pos_slice)
    last = [("bias", sum(biases, torch.zeros_like(whole)))]
    every = [*parts["attn_out"], *parts["mlp_out"], *parts[""], *begin, *last]
    check_sum(every, whole)
    found = stacked(every)
    if not apply_norm:
        return found
    return apply_norm_to_stack(model, cache, found, number, mlp_input, pos_slice)


def _results(
    model: LanguageModel,
    cache: NamedCache,
    name: str,
    layer: int | None,
    incl_remainder: bool,
    pos_slice: Positions,
    apply_norm: bool,
) -> Components:
    number = number_of(model, layer)
    parts: list[tuple[str, Tensor]] = []
    for each, added, factor in additions(model, number, False):
        if added == name and _has_parts(model, each, name):
            values, _ = _written(model, cache, name, each, pos_slice)
            parts += _labelled(name, each, values * factor)
    if incl_remainder:
        whole = at_positions(stream_at(model, cache, number, False), pos_slice)
        parts.append(("remainder", whole - sum(value for _, value in parts)))
    found = stacked(parts)
    return (
        apply_norm_to_stack(model, cache, found, number, False, pos_slice) if apply_norm else found
    )


def _labelled(name: str, layer: int, values: Tensor) -> Iterator[tuple[str, Tensor]]:
    letter = "H" if name == "attn_out" else "N"
    for index, value in enumerate(values.unbind(-2)):
        yield f"L{layer}{letter}{index}", value


def _has_parts(model: LanguageModel, layer: int, name: str) -> bool:
    try:
        _weights(model, layer, name)
    except (MissingNameError, UnsupportedError):
        return False
    return True


def _weights(model: LanguageModel, layer: int, name: str) -> tuple[Tensor, Tensor | None]:
    block = model.layers[layer]
    weight, bias = ("W_O", "b_O") if name == "attn_out" else ("W_out", "b_out")
    found: Tensor = getattr(block, weight)
    try:
        return found.detach(), getattr(block, bias).detach()
    except MissingNameError:
        return found.detach(), None


def _written(
    model: LanguageModel,
    cache: NamedCache,
    name: str,
    layer: int,
    pos_slice: Positions,
    only: slice | list[int] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """What each head or neuron of a layer adds, `[…, parts, model]`, and what its bias adds."""
    weight, bias = _weights(model, layer, name)
    if name == "attn_out":
        z = at_positions(recorded(cache, "z", layer), pos_slice, axis=-3)
        values = torch.einsum("...hd,hdm->...hm", z, weight)
        whole = values.sum(-2)
    else:
        post = at_positions(recorded(cache, "mlp_post", layer), pos_slice)
        chosen = slice(None) if only is None else only
        values, whole = post[..., chosen, None] * weight[chosen], post @ weight
    whole = whole if bias is None else whole + bias
    norm = _norm_behind(model, layer, name)
    if norm is None:
        return values, bias
    shift = getattr(norm, "bias", None)
    own = torch.zeros_like(whole) if bias is None else through(norm, bias, whole)
    parts = through(norm, values, whole.unsqueeze(-2))
    return parts, own if shift is None else own + shift.detach()


def _norm_behind(model: LanguageModel, layer: int, name: str) -> torch.nn.Module | None:
    """The norm of what a layer adds, if there is one."""
    block = model.layers[layer]
    word = "norm1_post" if name == "attn_out" else "norm2_post"
    return getattr(block, word).module if hasattr(block, word) else None
