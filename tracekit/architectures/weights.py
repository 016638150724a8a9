"""Weights by standard name: what a model multiplies with, divided as its activations are."""

# A weight is found by the activation that comes of it: W_Q is of the module that gives q, and its
# output features lie as q lies in the module's output; W_O is of the module that is given z.

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Final, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from tracekit.architectures.layouts import Grid, Rows
from tracekit.architectures.matrices import matrix_of, positions_of, table_of
from tracekit.architectures.schema import Lacks
from tracekit.core.factored import FactoredMatrix
from tracekit.core.site import Slot
from tracekit.core.words import BLOCK_WEIGHTS

if TYPE_CHECKING:
    from tracekit.architectures.binding import Bound, Names

Modules: TypeAlias = Mapping[str, nn.Module]
Weight: TypeAlias = Tensor | FactoredMatrix

_ACTIVATIONS: Final = {"Q": "q", "K": "k", "V": "v", "O": "z", "out": "mlp_post"}
_HEADS: Final = frozenset("QKVO")
_ROOT: Final = {"W_E": "embed", "W_pos": "pos_embed", "W_U": "unembed", "b_U": "unembed"}


class Stacked(NamedTuple):
    """A weight of several layers, `[layers, …]`, and which layers these are."""

    value: Weight
    layers: tuple[int, ...]


def weight_of(names: Names, modules: Modules, owner: str, name: str) -> Weight | Lacks:
    """The weight of that name in the layer at `owner`; in the whole model, of all its layers."""
    if name in names.family.lacks:
        return Lacks(names.family.lacks[name])
    if name in _ROOT:
        return _of_root(names, modules, name) if owner == "" else Lacks("it is the whole model's")
    if owner == "":
        return _of_all_layers(names, modules, name)
    if name in ("QK", "OV"):
        return _circuit(names, modules, owner, name)
    return _of_block(names, modules, owner, name)


def stacked(names: Names, modules: Modules, name: str, stack: str = "layers") -> Stacked | Lacks:
    """The weight of that name in the layers of a stack that have it."""
    places = names.stacks.get(stack, ())
    found = [weight_of(names, modules, path, name) for path, _ in places]
    layers = tuple(index for index, each in enumerate(found) if not isinstance(each, Lacks))
    having = [each for each in found if not isinstance(each, Lacks)]
    if not having:
        return next((each for each in found if isinstance(each, Lacks)), Lacks("it has no layers"))
    shapes = {tuple(each.shape) for each in having}
    if len(shapes) > 1:
        return Lacks(f"its layers have it in several shapes, {sorted(shapes)}: ask each of them")
    return Stacked(_stack(having), layers)


def _stack(weights: list[Weight]) -> Weight:
    """One behind the other, on the device of the first."""
    first = weights[0]
    if isinstance(first, FactoredMatrix):
        every = [each for each in weights if isinstance(each, FactoredMatrix)]
        A = torch.stack([each.A.to(first.A.device) for each in every])
        return FactoredMatrix(A, torch.stack([each.B.to(first.B.device) for each in every]))
    return torch.stack([each.to(first.device) for each in weights if isinstance(each, Tensor)])


def _of_all_layers(names: Names, modules: Modules, name: str) -> Weight | Lacks:
    found = stacked(names, modules, name)
    if isinstance(found, Lacks):
        return found
    count = len(names.stacks["layers"])
    if len(found.layers) < count:
        rest = sorted(set(range(count)) - set(found.layers))
        return Lacks(
            f"layers {', '.join(map(str, rest))} have none, so that places in a stack would not be "
            f"layers; weights({name!r}) has those of the others, and says which they are"
        )
    return found.value


def _of_root(names: Names, modules: Modules, name: str) -> Weight | Lacks:
    path = names.module("", _ROOT[name])
    if path is None:
        return Lacks(f"it has no {_ROOT[name]}")
    if name == "W_E":
        return table_of(modules[path], path)
    if name == "W_pos":
        return positions_of(modules[path], path)
    found = matrix_of(modules[path], path)
    if isinstance(found, Lacks):
        return found
    if name == "W_U":
        return found.weight
    return found.bias if found.bias is not None else Lacks(f"{path} has no bias")


def _of_block(names: Names, modules: Modules, owner: str, name: str) -> Tensor | Lacks:
    kind, _, which = name.partition("_")
    bound = _activation(names, owner, which)
    if isinstance(bound, Lacks):
        return bound
    module = modules.get(bound.path)
    if module is None or bound.key is not None:
        return Lacks(f"{bound.name} does not come of a projection of its own")
    found = matrix_of(module, bound.path)
    if isinstance(found, Lacks):
        return found
    if kind == "b":
        return _bias(found.bias, bound, which)
    if which in "QKV" and not _reads_the_stream(names, modules, owner, found.weight.shape[0]):
        return Lacks(f"{bound.path} reads no residual stream, but a projection of it")
    return _divided(found.weight, bound, which)


def _activation(names: Names, owner: str, which: str) -> Bound | Lacks:
    """The activation that the weight gives, or that it is given."""
    activation = _ACTIVATIONS.get(which, "mlp_pre")
    if which == "gate" and names.point(owner, "mlp_pre_linear") is None:
        return Lacks(f"its MLP has no gate: W_in is what gives {activation}")
    if which == "in" and names.point(owner, "mlp_pre_linear") is not None:
        activation = "mlp_pre_linear"
    found = names.point(owner, activation)
    if found is None:
        return Lacks(f"there is no {activation}: {names.why_not(owner, activation)}")
    return found


def _divided(weight: Tensor, bound: Bound, which: str) -> Tensor:
    """`weight`, `[in, out]`, divided as its activation is."""
    if bound.slot is Slot.INPUT:
        parts = _view(bound, weight.T)  # [out, (heads, head_dim) | in]
        return parts.permute(1, 2, 0) if which in _HEADS else parts.T
    parts = _view(bound, weight)  # [in, (heads…, head_dim) | out]
    return parts.flatten(1, -2).transpose(0, 1) if which in _HEADS else parts


def _bias(bias: Tensor | None, bound: Bound, which: str) -> Tensor | Lacks:
    if bias is None:
        return Lacks(f"{bound.path} has no bias")
    if bound.slot is Slot.INPUT:
        return bias
    parts = _view(bound, bias)
    return parts.flatten(0, -2) if which in _HEADS else parts


def _view(bound: Bound, tensor: Tensor) -> Tensor:
    """The features of `tensor`, its last axis, divided; how positions lie is not of weights."""
    return tensor if isinstance(bound.layout, Rows | Grid) else bound.view(tensor)


def _reads_the_stream(names: Names, modules: Modules, owner: str, width: int) -> bool:
    """Whether what it reads is as wide as what attention adds, or as the norm in front of it."""
    o, norm = names.layers[owner].modules.get("o"), names.layers[owner].modules.get("norm1")
    gain = getattr(modules[norm], "weight", None) if norm is not None else None
    out = matrix_of(modules[o], o) if o is not None else None
    widths = [gain.numel()] if isinstance(gain, Tensor) else []
    widths += [out.weight.shape[1]] if out is not None and not isinstance(out, Lacks) else []
    return not widths or width in widths


def _circuit(names: Names, modules: Modules, owner: str, name: str) -> FactoredMatrix | Lacks:
    """QK: `resid @ QK @ resid.mT` are a head's scores, norms, rotation and scale aside.

    OV: `resid @ OV` is what a head writes, from where it looks.
    """
    of_heads, of_keys = ("W_Q", "W_K") if name == "QK" else ("W_O", "W_V")
    first, second = (_of_block(names, modules, owner, each) for each in (of_heads, of_keys))
    if isinstance(first, Lacks):
        return first
    if isinstance(second, Lacks):
        return second
    second = second.repeat_interleave(first.shape[0] // second.shape[0], dim=0)
    return FactoredMatrix(first, second.mT) if name == "QK" else FactoredMatrix(second, first)


def is_weight(name: str, of_model: bool) -> bool:
    """Whether `name` is a standard name of weights, of a layer or of the whole model."""
    return name in BLOCK_WEIGHTS or (of_model and name in _ROOT)
