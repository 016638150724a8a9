"""Centre what writes into the residual stream, and the logits; fold value biases."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor, nn

from tracekit.architectures import Lacks, Names
from tracekit.architectures.matrices import Matrix, is_transposed, matrix_of
from tracekit.core.norms import known_kind
from tracekit.core.quirks import LOGIT_CAPS
from tracekit.models.folding import add_bias, every, put, reading_norms, why_not_fold

_WRITERS: Final = ("o", "cross_o", "out_proj", "down")
_POST: Final = ("norm1_post", "norm2_post")
_OTHER_WRITERS: Final = ("embed_norm", "vision_tower", "audio_tower", "projector")


def why_not_center_writing(names: Names, root: nn.Module) -> str | None:
    """Why the means of what is written can't be dropped; None if they can."""
    why = why_not_fold(names, root)
    if why is not None:
        return why
    for path in reading_norms(names):
        norm = root.get_submodule(path)
        kind = known_kind(norm)
        if kind is None or not kind.centers:
            return (
                f"{path} ({type(norm).__name__}) does not take the mean off, so that the mean of "
                f"the residual stream counts"
            )
    for word in _OTHER_WRITERS:
        if names.module("", word) is not None:
            return f"its {word} writes into the residual stream, and no weight centres that"
    for path, _ in names.stacks["layers"]:
        modules = names.layers[path].modules
        if "experts" in modules or any(word in modules for word in _POST):
            return f"what {path} adds comes of no single matrix"
    return None


def center_writing_weights(names: Names, root: nn.Module) -> None:
    """Let everything that is added to the residual stream have mean zero."""
    for word in ("embed", "pos_embed"):
        path = names.module("", word)
        if path is not None:
            table: Any = root.get_submodule(path)
            put(table, "weight", _less_mean(table.weight, -1))
    layers = [names.layers[path] for path, _ in names.stacks["layers"]]
    for path in every(layer.modules.get(word) for layer in layers for word in _WRITERS):
        module: Any = root.get_submodule(path)
        put(module, "weight", _less_mean(module.weight, 1 if is_transposed(module) else 0))
        if module.bias is not None:
            put(module, "bias", _less_mean(module.bias, 0))


def why_not_center_unembed(names: Names, root: nn.Module) -> str | None:
    """Why the mean of the logits can't be dropped; None if it can."""
    config: Any = getattr(root, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    if any(getattr(text, cap, None) is not None for cap in LOGIT_CAPS):
        return "its logits are capped, which is no addition: their mean counts"
    return None


def center_unembed(names: Names, root: nn.Module) -> None:
    """Let the logits of each position have mean zero: their probabilities stay."""
    path = names.module("", "unembed")
    assert path is not None
    module: Any = root.get_submodule(path)
    put(module, "weight", _less_mean(module.weight, 0))
    if module.bias is not None:
        put(module, "bias", _less_mean(module.bias, 0))


def why_not_fold_value_biases(names: Names, root: nn.Module) -> str | None:
    """Why value biases can't become a part of b_O; None if they can."""
    having = [path for path, _ in names.stacks["layers"] if _value_bias(names, path) is not None]
    if not having:
        return "its values have no bias, or lie in no projection of their own"
    for path in having:
        core = names.layers[path].modules.get("attn_core", "")
        if any("sink" in name for name, _ in root.get_submodule(core).named_parameters()):
            return f"the patterns of {path} do not sum to one: part of them goes into a sink"
    return None


def fold_value_biases(names: Names, root: nn.Module) -> None:
    """Move b_V into b_O: patterns sum to one, so that every query gets it whole."""
    for path, _ in names.stacks["layers"]:
        bias = _value_bias(names, path)
        point = names.point(path, "v")
        weight = names.weight(path, "W_O")
        if bias is None or point is None or not isinstance(weight, Tensor):
            continue
        output = root.get_submodule(names.layers[path].modules["o"])
        values = bias.double().repeat_interleave(weight.shape[0] // bias.shape[0], dim=0)
        add_bias(output, torch.einsum("hd,hdm->m", values, weight.detach().double()))
        module: Any = root.get_submodule(point.path)
        rest = module.bias.detach().clone()
        point.view(rest).zero_()
        put(module, "bias", rest)


def _value_bias(names: Names, path: str) -> Tensor | None:
    bias = names.weight(path, "b_V")
    is_there = isinstance(bias, Tensor) and isinstance(names.weight(path, "W_O"), Tensor)
    return bias.detach() if is_there and isinstance(bias, Tensor) else None


def _less_mean(weight: Tensor, dim: int) -> Tensor:
    exact = weight.detach().double()
    return exact - exact.mean(dim, keepdim=True)


def unread(names: Names, root: nn.Module) -> Matrix | Lacks:
    """The unembedding as a matrix; Lacks if it is none."""
    path = names.module("", "unembed")
    return Lacks("it has no unembed") if path is None else matrix_of(root.get_submodule(path), path)
