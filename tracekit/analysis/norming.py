"""The norm in front of a layer, as it was in a run: applied to parts of what it read."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tracekit.analysis.components import Components, Positions, at_positions, recorded
from tracekit.core.norms import known_kind
from tracekit.core.offload import at_hand
from tracekit.errors import UnsupportedError
from tracekit.models.language import LanguageModel
from tracekit.tracing.named_cache import NamedCache


def stream_at(model: LanguageModel, cache: NamedCache, layer: int, mlp_input: bool) -> Tensor:
    """The residual stream in front of a layer (or its MLP, or behind the last), as recorded."""
    if mlp_input:
        return recorded(cache, "resid_mid", layer)
    return cache["resid_final"] if layer == len(model.layers) else cache["resid_pre", layer]


def norm_at(model: LanguageModel, layer: int, mlp_input: bool) -> Any:
    """The norm that reads the residual stream there."""
    if layer == len(model.layers):
        return model.final_norm.module
    return model.layers[layer].norm2.module if mlp_input else model.layers[layer].norm1.module


def number_of(model: LanguageModel, layer: int | None, mlp_input: bool = False) -> int:
    """`layer` as a number; None is behind the last, and negative ones count from the end."""
    count = len(model.layers)
    found = count if layer is None else layer + count if layer < 0 else layer
    if not 0 <= found <= count - mlp_input:
        raise UnsupportedError(f"there are {count} layers; layer={layer} is none of them.")
    return found


@torch.no_grad()
def through(norm: Any, parts: Tensor, whole: Tensor) -> Tensor:
    """What a norm makes of parts of `whole`, with the scale that it had for `whole`.

    Parts that add up to `whole` add up to what it gives for it, but for its bias.
    """
    held = at_hand(norm)
    kind = known_kind(held)
    if kind is None:
        raise UnsupportedError(f"{type(norm).__name__} is no norm that parts can be sent through.")
    gain = kind.gain(held).to(whole.device, whole.dtype)
    parts = parts.to(whole.device)

    def centred(value: Tensor) -> Tensor:
        return value - value.mean(-1, keepdim=True) if kind.centers else value

    bias = getattr(held, "bias", None)
    given = norm(whole).to(whole.device)
    given = given if bias is None else given - bias.to(whole.device)
    size = torch.linalg.vector_norm(given, dim=-1, keepdim=True)
    full = torch.linalg.vector_norm(centred(whole) * gain, dim=-1, keepdim=True)
    return centred(parts) * gain * (size / full)


def apply_norm_to_stack(
    model: LanguageModel,
    cache: NamedCache,
    stack: Components | Tensor,
    layer: int | None = None,
    mlp_input: bool = False,
    pos_slice: Positions = None,
) -> Any:
    """A stack of parts, `[components, …, model]`, through the norm in front of a layer.

    With the scale that the norm had in the run, of the recorded stream there; None is the final
    norm. LayerNorm takes the mean off each part, RMSNorm does not. The gain is applied, so that the
    parts add up to what the norm gave but for its bias; after model.processed() there are neither.
    As TransformerLens' apply_ln_to_stack, which leaves the gain out. `pos_slice` is the one that
    the stack was made with.
    """
    number = number_of(model, layer, mlp_input)
    whole = at_positions(stream_at(model, cache, number, mlp_input), pos_slice)
    norm = norm_at(model, number, mlp_input)
    if isinstance(stack, Tensor):
        return through(norm, stack, whole)
    return Components(through(norm, stack.values, whole), stack.labels)
