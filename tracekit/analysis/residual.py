"""The residual stream, accumulated layer by layer or taken apart into what was added to it."""

# Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits"; the tools and the names
# of the parts are those of TransformerLens' ActivationCache.

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from tracekit.analysis.components import Components, Positions, at_positions, recorded, stacked
from tracekit.analysis.norming import apply_norm_to_stack, norm_at, number_of, stream_at
from tracekit.errors import CacheError, InputError
from tracekit.models.language import LanguageModel
from tracekit.tracing.named_cache import NamedCache

KINDS = {"all": None, "attn": ("attn_out", "cross_attn_out"), "mlp": ("mlp_out",)}
# What parts may be off, beside the largest number of the stream: rounding.
TOLERANCE = 1e-3
OF_HALF = 5e-2  # where numbers have 16 bits


def accumulated_resid(
    model: LanguageModel,
    cache: NamedCache,
    layer: int | None = None,
    incl_mid: bool = False,
    apply_norm: bool = False,
    pos_slice: Positions = None,
    mlp_input: bool = False,
) -> Components:
    """The residual stream in front of every layer up to `layer`: `[components, batch, pos, model]`.

    Labels are "0_pre", "0_mid" (with `incl_mid`), and "final_post" behind the last (layer=None).
    With `apply_norm` each is sent through the norm in front of `layer` as if it were the whole
    stream: unembedded, that is the logit lens (nostalgebraist 2020).
    """
    number = number_of(model, layer, mlp_input)
    parts = list(_accumulated(model, cache, number, incl_mid, mlp_input))
    found = stacked((label, at_positions(value, pos_slice)) for label, value in parts)
    if not apply_norm:
        return found
    with torch.no_grad():
        return Components(norm_at(model, number, mlp_input)(found.values), found.labels)


def _accumulated(
    model: LanguageModel, cache: NamedCache, layer: int, incl_mid: bool, mlp_input: bool
) -> Iterator[tuple[str, Tensor]]:
    for each in range(layer):
        yield f"{each}_pre", cache["resid_pre", each]
        if incl_mid and ("resid_mid", each) in cache:
            yield f"{each}_mid", recorded(cache, "resid_mid", each)
    is_last = layer == len(model.layers)
    label = "final_post" if is_last else f"{layer}_pre"
    yield label, stream_at(model, cache, layer, False)
    if mlp_input:
        yield f"{layer}_mid", recorded(cache, "resid_mid", layer)


def decompose_resid(
    model: LanguageModel,
    cache: NamedCache,
    layer: int | None = None,
    mlp_input: bool = False,
    mode: str = "all",
    apply_norm: bool = False,
    pos_slice: Positions = None,
    incl_embeds: bool = True,
) -> Components:
    """What was added to the stream in front of `layer`: `[components, batch, pos, model]`.

    "embed", "pos_embed" (where it is added in front of the first layer as it is), and of each layer
    what it added: "0_attn_out", "0_ssm_out", "0_mlp_out", scaled as the model adds it. `mode` is
    "all", "attn" or "mlp". All parts with the embeddings add up to the recorded stream, which is
    checked: CacheError if the run was edited in between. With `apply_norm` they are sent through
    the norm in front of `layer`, with the scale that it had.
    """
    if mode not in KINDS:
        raise InputError(f"mode is 'all', 'attn' or 'mlp', not {mode!r}.")
    number = number_of(model, layer, mlp_input)
    wanted = KINDS[mode]
    parts = list(embeddings(cache)) if incl_embeds else []
    parts += [
        (f"{each}_{name}", recorded(cache, name, each) * factor)
        for each, name, factor in additions(model, number, mlp_input)
        if wanted is None or name in wanted
    ]
    if mode == "all" and incl_embeds:
        check_sum(parts, stream_at(model, cache, number, mlp_input))
    found = stacked((label, at_positions(value, pos_slice)) for label, value in parts)
    if not apply_norm:
        return found
    return apply_norm_to_stack(model, cache, found, number, mlp_input, pos_slice)


def embeddings(cache: NamedCache) -> Iterator[tuple[str, Tensor]]:
    """What the stream begins with: tokens and positions apart, if that is all that it is."""
    whole = cache["resid_pre", 0]
    if "embed_out" in cache and "pos_embed_out" in cache:
        embed, positions = cache["embed_out"], cache["pos_embed_out"]
        is_sum = embed.shape == whole.shape and positions.shape[-2:] == whole.shape[-2:]
        if is_sum and torch.allclose(embed + positions, whole, rtol=1e-4, atol=1e-5):
            yield "embed", embed
            yield "pos_embed", positions.expand_as(whole)
            return
    yield "embed", whole


def additions(
    model: LanguageModel, layer: int, mlp_input: bool
) -> Iterator[tuple[int, str, float]]:
    """The layer, the name and the factor of all that is added in front of a layer, in order."""
    for each in range(layer + mlp_input):
        for name, factor, is_last in model.residual_additions(each):
            if each < layer or not is_last:
                yield each, name, factor


def tolerance(value: Tensor) -> float:
    """What two ways to the same numbers may differ by, beside the largest."""
    return TOLERANCE if value.element_size() > 2 else OF_HALF


def check_sum(parts: list[tuple[str, Tensor]], whole: Tensor) -> None:
    """CacheError if parts don't add up to the recorded stream."""
    total = sum((value for _, value in parts), torch.zeros_like(whole))
    off = (total - whole).abs().max().item()
    if off > tolerance(whole) * max(1.0, whole.abs().max().item()):
        raise CacheError(
            f"the parts do not add up to the recorded residual stream: they are off by {off:.2g}. "
            f"Was it written to in the run? Record a run without edits of the stream."
        )
