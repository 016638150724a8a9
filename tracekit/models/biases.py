"""What the biases of the layers add to the residual stream, whatever the input."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn

from tracekit.architectures import Lacks, Names
from tracekit.architectures.binding import Layer
from tracekit.architectures.matrices import matrix_of, table_of
from tracekit.architectures.schema import Residual
from tracekit.errors import InputError, UnsupportedError

# What adds to the stream, and the projection whose bias comes last in it.
_MIXERS: Final = {"attn": "o", "ssm": "out_proj", "conv": "out_proj", "cross_attn": "cross_o"}
_MLP: Final = {"mlp": "down"}
_FIRST: Final = ("attn_out", "ssm_out", "conv_out", "cross_attn_out")
_ADDING: Final = (Residual.SEQUENTIAL, Residual.PARALLEL, Residual.SINGLE)


def accumulated_bias(
    names: Names, root: nn.Module, layer: int, mlp_input: bool, include_mlp_biases: bool
) -> Tensor:
    """The sum of the biases that are in the residual stream in front of a layer (or its MLP)."""
    layers = [names.layers.get(path) for path, _ in names.stacks.get("layers", ())]
    if not 0 <= layer <= len(layers) - mlp_input:
        raise InputError(
            f"layer {layer} {'has no MLP' if layer == len(layers) else 'is none'}: there are "
            f"{len(layers)} layers, and layer={len(layers)} is behind the last."
        )
    kinds = {**_MIXERS, **(_MLP if include_mlp_biases else {})}
    every = [each for index in range(layer) for each in _biases(root, layers[index], index, kinds)]
    if mlp_input:
        own = layers[layer]
        reads_before = own is not None and _residual(own) is Residual.PARALLEL
        every += [] if reads_before else _biases(root, own, layer, _MIXERS)
    zero = _zero(names, root)
    return sum((bias.to(zero.device) for bias in every), zero)


class Addition(NamedTuple):
    """An activation that is added to the residual stream, times a factor."""

    name: str
    factor: float
    is_last: bool  # behind resid_mid, where there is one


def additions(names: Names, root: nn.Module, layer: int) -> tuple[Addition, ...]:
    """What a layer adds, in order."""
    path = names.stacks["layers"][layer].path
    found = names.layers.get(path)
    if found is None or found.block is None or _residual(found) not in _ADDING:
        raise UnsupportedError(
            f"layer {layer} does not just add to the residual stream: it can't be taken apart."
        )
    last = found.block.added_last
    first = [name for name in _FIRST if name not in last]
    return tuple(
        Addition(name, factor_of(root, found, name), name in last)
        for name in (*first, *last)
        if names.point(path, name) is not None
    )


def _zero(names: Names, root: nn.Module) -> Tensor:
    path = names.module("", "embed")
    table = table_of(root.get_submodule(path), path) if path is not None else Lacks("")
    if isinstance(table, Lacks):
        raise UnsupportedError("the width of the residual stream is not known: no embedding is.")
    return torch.zeros_like(table[0])


def _residual(layer: Layer) -> Residual:
    return layer.block.residual if layer.block is not None else Residual.OTHER


def _biases(
    root: nn.Module, layer: Layer | None, index: int, kinds: dict[str, str]
) -> Iterator[Tensor]:
    """Of one layer, as they arrive in the stream."""
    if layer is None or _residual(layer) not in _ADDING:
        raise UnsupportedError(
            f"layer {index} does not just add to the residual stream, so that no bias stays in it "
            f"as it is."
        )
    for holder, projection in kinds.items():
        bias = _bias(root, layer, holder, projection, index)
        if bias is not None:
            yield bias * factor_of(root, layer, f"{holder}_out")


def _bias(root: nn.Module, layer: Layer, holder: str, projection: str, index: int) -> Tensor | None:
    """The bias of one part of a layer; None if it has none."""
    path, at = layer.modules.get(holder), layer.modules.get(projection)
    is_last = at is not None and (path is None or f"{at}.".startswith(f"{path}."))
    found = matrix_of(root.get_submodule(at), at) if is_last and at is not None else None
    if found is None or isinstance(found, Lacks):
        _refuse_hidden_biases(root, path)
        return None
    normed = {"attn": "norm1_post", "mlp": "norm2_post"}.get(holder, "")
    if found.bias is not None and normed in layer.modules:
        raise UnsupportedError(
            f"layer {index}: what {at} gives goes through {layer.modules[normed]} before it is "
            f"added, so that its bias is not in the stream as it is."
        )
    return found.bias


def _refuse_hidden_biases(root: nn.Module, path: str | None) -> None:
    """As of experts: which of their biases are added depends on the token."""
    if path is None:
        return
    hidden = [name for name, _ in root.get_submodule(path).named_parameters() if "bias" in name]
    if hidden:
        raise UnsupportedError(
            f"{path} has biases ({hidden[0]} …) that it does not add to every token alike, or not "
            f"last: they are no constant of the residual stream."
        )


def factor_of(root: nn.Module, layer: Layer, name: str) -> float:
    """What an activation is multiplied by when it is added to the stream: Granite's residuals."""
    config: Any = getattr(root, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return layer.block.factor(name, text) if layer.block is not None else 1.0
