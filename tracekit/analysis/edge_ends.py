"""The ends of edges: what writes into the residual stream, and the gradient of what reads it."""

# An input is the sum of what was written before it, so that the gradient at the input is that of
# each part of it (Syed et al. 2023). Of a head the inputs of its query, key and value are told
# apart: the gradient at q goes back through W_Q, and through the norm in front, by autograd.

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from tracekit.analysis.components import recorded
from tracekit.analysis.gradients import Gradients
from tracekit.analysis.parts import stack_head_results
from tracekit.analysis.residual import check_sum, tolerance
from tracekit.analysis.unembedding import final_name
from tracekit.errors import MissingNameError, UnsupportedError
from tracekit.models.language import LanguageModel
from tracekit.tracing.named_cache import NamedCache

_WHOLE: Final = {"attn_out": "attn", "mlp_out": "mlp", "ssm_out": "ssm", "conv_out": "conv"}
_READS: Final = {"attn_in": "attn", "mixer_in": "mixer", "mlp_in": "mlp"}


class Source(NamedTuple):
    """What a component wrote, `[prompts, pos, model]`; of layer -1, the embeddings."""

    label: str
    layer: int
    is_last: bool  # written behind what the MLP of its layer reads
    value: Tensor


class Target(NamedTuple):
    """The gradient at what a component reads of the stream, `[prompts, pos, model]`."""

    label: str
    layer: int
    reads_own: bool  # what attention of its own layer wrote
    gradient: Tensor


def is_edge(source: Source, target: Target) -> bool:
    """Whether what one writes is in what the other reads."""
    if source.layer == target.layer:
        return target.reads_own and not source.is_last
    return source.layer < target.layer


def sources_of(model: LanguageModel, cache: NamedCache, heads: bool) -> list[Source]:
    """All that adds up to the last residual stream of a run, which is checked; but for biases."""
    found = [Source("embed", -1, False, cache["resid_pre", 0])]
    constants: list[tuple[str, Tensor]] = []
    apart = _by_head(model, cache) if heads else {}
    for layer in range(len(model.layers)):
        for name, factor, is_last in model.residual_additions(layer):
            whole = recorded(cache, name, layer) * factor
            if name == "attn_out" and layer in apart:
                found += [Source(label, layer, is_last, part) for label, part in apart[layer]]
                constants.append(("", _constant(layer, whole, [part for _, part in apart[layer]])))
            else:
                found.append(Source(f"L{layer}.{_WHOLE.get(name, name)}", layer, is_last, whole))
    every = [*((each.label, each.value) for each in found), *constants]
    check_sum(every, cache[final_name(model)])
    return found


def _by_head(model: LanguageModel, cache: NamedCache) -> dict[int, list[tuple[str, Tensor]]]:
    found: dict[int, list[tuple[str, Tensor]]] = {}
    if not any(("z", layer) in cache for layer in range(len(model.layers))):
        return found
    stack = stack_head_results(model, cache, incl_remainder=True)  # so there is something
    for label, value in zip(stack.labels[:-1], stack.values[:-1], strict=True):
        layer = int(label.removeprefix("L").partition("H")[0])
        found.setdefault(layer, []).append((label, value))
    return found


def _constant(layer: int, whole: Tensor, parts: list[Tensor]) -> Tensor:
    """What an attention adds beside its heads: its bias, the same for all tokens."""
    rest = whole - torch.stack(parts).sum(0)
    if (rest - rest[:1, :1]).abs().max() > tolerance(whole) * whole.abs().max():
        raise UnsupportedError(
            f"layer {layer}: its attention adds more than its heads (a gate?): heads=False."
        )
    return rest


def names_of_targets(model: LanguageModel, cache: NamedCache, heads: bool) -> list[Any]:
    """The activations whose gradients tell those of the targets."""
    words = ["q", "k", "v"] if heads else []
    layers = range(len(model.layers))
    names = [(word, layer) for layer in layers for word in (*words, *_READS)]
    return [*(name for name in names if name in cache), final_name(model)]


def targets_of(
    model: LanguageModel, cache: NamedCache, gradients: dict[str, Gradients], heads: bool
) -> Iterator[Target]:
    """All that reads the stream, in the order of the model; `cache` is of the same run."""
    for layer in range(len(model.layers)):
        there = [name for name in _READS if layer in _of(gradients, name)]
        if not there:
            raise UnsupportedError(f"layer {layer}: what it reads of the stream has no name here.")
        for name in there:
            at = _Input(model, cache, layer, name)
            gradient = _of(gradients, name)[layer]
            if name == "attn_in" and heads and layer in _of(gradients, "q"):
                yield from _heads(model, cache, gradients, at, gradient)
            else:
                label = f"L{layer}.{_READS[name]}"
                yield Target(label, layer, at.reads_own, at.back(gradient[None])[0])
    last = final_name(model)
    word, layer = (last, None) if isinstance(last, str) else last
    yield Target("final", len(model.layers), False, gradients[word].gradients[layer])


def _of(gradients: dict[str, Gradients], name: str) -> dict[int | None, Tensor]:
    return gradients[name].gradients if name in gradients else {}


class _Input:
    """What a component of a layer reads, and the stream that it is made of."""

    def __init__(self, model: LanguageModel, cache: NamedCache, layer: int, name: str) -> None:
        self.layer = layer
        self.name = name
        is_behind = name == "mlp_in" and ("resid_mid", layer) in cache
        self.reads_own = is_behind
        self.stream = (
            recorded(cache, "resid_mid", layer) if is_behind else cache["resid_pre", layer]
        )
        block = model.layers[layer]
        self.norm: Any = block.norm1.module if hasattr(block, "norm1") else None
        given = recorded(cache, name, layer)
        self.is_stream = _is_close(given, self.stream)
        if not self.is_stream and not _is_close(given, self.normed()):
            raise UnsupportedError(
                f"layer {layer}: {name} is neither the residual stream nor its norm, so that what "
                f"of it each component wrote can't be told."
            )

    @torch.no_grad()
    def normed(self) -> Tensor:
        """The stream behind the norm in front of the layer."""
        return self.stream if self.norm is None else self.norm(self.stream)

    def back(self, gradients: Tensor) -> Tensor:
        """Gradients at what is read, `[n, prompts, pos, model]`, as gradients of the stream."""
        if self.is_stream:
            return gradients.reshape(-1, *self.stream.shape)
        return self.through_norm(gradients.reshape(-1, *self.stream.shape))

    def through_norm(self, gradients: Tensor) -> Tensor:
        """Gradients behind the norm as gradients in front of it."""
        if self.norm is None:
            return gradients
        with torch.inference_mode(False), torch.enable_grad():
            stream = self.stream.detach().expand_as(gradients).clone().requires_grad_()
            return torch.autograd.grad(self.norm(stream), stream, gradients)[0]


def _heads(
    model: LanguageModel,
    cache: NamedCache,
    gradients: dict[str, Gradients],
    at: _Input,
    whole: Tensor,
) -> Iterator[Target]:
    """The inputs of each head's query, key and value."""
    labels: list[str] = []
    found: list[Tensor] = []
    count = recorded(cache, "q", at.layer).shape[-2]
    for word in ("q", "k", "v"):
        gradient = _of(gradients, word)[at.layer]
        weight = _weight(model, cache, at, word)
        gradient = gradient.reshape(*at.stream.shape[:2], *gradient.shape[-2:])
        found += torch.einsum("bphd,hmd->hbpm", gradient, weight).unbind()
        letter = "H" if len(weight) == count else "KV"
        labels += [f"L{at.layer}{letter}{head}.{word}" for head in range(len(weight))]
    behind = torch.stack(found)
    front = at.through_norm(behind)
    if not _is_close((front if at.is_stream else behind).sum(0), whole.reshape(at.stream.shape)):
        raise UnsupportedError(
            f"layer {at.layer}: its attention reads more of the stream than queries, keys and "
            f"values (a gate?), so that its heads' inputs are not all there is: heads=False."
        )
    for label, each in zip(labels, front, strict=True):
        yield Target(label, at.layer, False, each)


def _weight(model: LanguageModel, cache: NamedCache, at: _Input, word: str) -> Tensor:
    """W_Q, W_K or W_V, if it gives what the run had."""
    block = model.layers[at.layer]
    weight: Tensor = getattr(block, f"W_{word.upper()}").detach()
    try:
        bias = getattr(block, f"b_{word.upper()}").detach()
    except MissingNameError:
        bias = torch.zeros(())
    value = recorded(cache, word, at.layer)
    given = torch.einsum("bpm,hmd->bphd", at.normed(), weight) + bias
    if not _is_close(given, value.reshape(given.shape)):
        raise UnsupportedError(
            f"layer {at.layer}: {word} is not the normed stream times W_{word.upper()}, so that "
            f"its heads' inputs can't be told apart: heads=False."
        )
    return weight


def _is_close(one: Tensor, other: Tensor) -> bool:
    size = other.abs().max()
    other = other.reshape(one.shape) if one.numel() == other.numel() else other
    return one.shape == other.shape and bool((one - other).abs().max() <= tolerance(one) * size)
