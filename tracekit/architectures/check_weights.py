"""Are the named values what the weights of their modules make of each other, head by head?"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tracekit.architectures.binding import Bound, Names
from tracekit.architectures.findings import Claim, compared
from tracekit.architectures.witness import Testimony, Where, is_hookable
from tracekit.core.offload import at_hand
from tracekit.core.site import Slot

_BEHIND: Final = ("norm1_post", "attn_scale", "cross_norm_post", "norm2_post", "mlp_scale")
_ELSEWHERE: Final = "it is what becomes of that in the block's own forward"
_PROJECTED: Final = ("q", "k", "v", "cross_q")
_ACTIVATIONS: Final = {
    "gelu": F.gelu,
    "gelu (tanh)": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "relu": F.relu,
    "relu squared": lambda x: F.relu(x).square(),
    "quick gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "tanh": torch.tanh,
}


def weights(names: Names, where: Where, seen: Testimony) -> Iterator[Claim]:
    """The claims about one layer that its weights can prove."""
    for name in _PROJECTED:
        yield from _projected(names, where, name, seen)
    yield from _heads_add_up(names, where, seen, "z", "o", "attn")
    yield from _heads_add_up(names, where, seen, "cross_z", "cross_o", "cross_attn")
    yield from _down(names, where, seen)
    yield from _activated(names, where, seen)


def linear(module: nn.Module) -> tuple[Tensor, Tensor | None] | None:
    """The weight of a linear map as `[in, out]`, and its bias; None of any other module."""
    module = at_hand(module)
    weight: Any = getattr(module, "weight", None)
    bias: Any = getattr(module, "bias", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2 or not weight.is_floating_point():
        return None
    if type(module).__name__ == "Conv1D":  # transformers': it holds [in, out]
        return weight, bias
    return (weight.T, bias) if isinstance(module, nn.Linear) else None


def _projected(names: Names, where: Where, name: str, seen: Testimony) -> Iterator[Claim]:
    bound, value = names.point(where.path, name), seen.value(where, name)
    if bound is None or value is None or not is_hookable(names, bound):
        return
    found, given = (
        linear(names.modules[bound.path]),
        seen.raw.get((bound.path, Slot.INPUT, where.call + bound.call)),
    )
    if found is None or given is None or bound.slot is not Slot.OUTPUT:
        return
    expected = torch.stack(list(_by_head(bound, given, *found)), dim=-2)
    yield compared(
        str(where), name, "x @ W + b, head by head", value.reshape(expected.shape), expected
    )


def _by_head(bound: Bound, given: Tensor, weight: Tensor, bias: Tensor | None) -> Iterator[Tensor]:
    parts = bound.view(weight)
    biases = None if bias is None else bound.view(bias)
    heads = parts.flatten(1, -2)
    for head in range(heads.shape[1]):
        found = given @ heads[:, head]
        yield found if biases is None else found + biases.flatten(0, -2)[head]


def _heads_add_up(
    names: Names, where: Where, seen: Testimony, name: str, o: str, attn: str
) -> Iterator[Claim]:
    layer = names.layers.get(where.path)
    z, bound = seen.value(where, name), names.point(where.path, name)
    if layer is None or bound is None or z is None or o not in layer.modules:
        return
    path = layer.modules[o]
    found, given = (
        linear(names.modules[path]),
        seen.raw.get((path, Slot.OUTPUT, where.call + bound.call)),
    )
    if found is None or given is None or bound.path != path:
        return
    weight, bias = found
    by_head = weight.unflatten(0, (z.shape[-2], -1))
    total = torch.zeros((), dtype=z.dtype) if bias is None else bias
    for head in range(z.shape[-2]):
        total = total + z[..., head, :] @ by_head[head]
    yield compared(
        str(where), name, f"through {o}, head by head, it adds up to what {o} gives", given, total
    )
    yield from _reaches(names, where, seen, total, name, attn)


def _reaches(
    names: Names, where: Where, seen: Testimony, total: Tensor, name: str, attn: str
) -> Iterator[Claim]:
    """That the sum over heads is what attention adds to the residual stream."""
    out = f"{attn}_out"
    added, bound = seen.value(where, out), names.point(where.path, out)
    if added is None or bound is None:
        return
    modules = names.layers[where.path].modules
    after = _behind(modules, bound)
    if not after and bound.path not in (modules.get(attn), modules[name.replace("z", "o")]):
        yield Claim(str(where), name, f"the sum over heads is {out}", None, why=_ELSEWHERE)
        return
    if after:
        total = names.modules[bound.path](total)
    claim = f"the sum over heads{f', through {after},' if after else ''} is {out}"
    yield compared(str(where), name, claim, total.reshape(added.shape), added)


def _behind(modules: Mapping[str, str], bound: Bound) -> str:
    """The norm or scale behind attention or MLP that a value comes out of; "" if it is none."""
    return next((word for word in _BEHIND if modules.get(word) == bound.path), "")


def _down(names: Names, where: Where, seen: Testimony) -> Iterator[Claim]:
    layer, post = names.layers.get(where.path), seen.value(where, "mlp_post")
    bound = names.point(where.path, "mlp_post")
    if layer is None or post is None or bound is None or "down" not in layer.modules:
        return
    found = linear(names.modules[layer.modules["down"]])
    if found is None:
        return
    weight, bias = found
    total = post @ weight + (0 if bias is None else bias)
    given = seen.raw[bound.path, Slot.OUTPUT, where.call + bound.call]
    yield compared(
        str(where),
        "mlp_post",
        "through down's weights it is what down gives",
        given.reshape(total.shape),
        total,
    )
    out, bound = seen.value(where, "mlp_out"), names.point(where.path, "mlp_out")
    if out is None or bound is None or {"experts", "router", "down_gate"} & set(layer.modules):
        return
    after = _behind(layer.modules, bound)
    if not after and bound.path not in (layer.modules.get("mlp"), layer.modules["down"]):
        yield Claim(str(where), "mlp_post", "through down it is mlp_out", None, why=_ELSEWHERE)
        return
    total = names.modules[bound.path](total) if after else total
    claim = f"through down{f' and {after}' if after else ''} it is mlp_out"
    yield compared(str(where), "mlp_post", claim, total.reshape(out.shape), out)


def _own_activation(names: Names, where: Where) -> dict[str, Callable[[Tensor], Tensor]]:
    """The module that is the nonlinearity of an MLP, if it has one under its usual name."""
    mlp = names.layers[where.path].modules.get("mlp", "")
    found = names.modules.get(f"{mlp}.act_fn")
    return {} if found is None else {"act_fn": found}


def _activated(names: Names, where: Where, seen: Testimony) -> Iterator[Claim]:
    """That the neurons are the activation of mlp_pre, times the linear part of a gated MLP."""
    pre, post = seen.value(where, "mlp_pre"), seen.value(where, "mlp_post")
    gated = seen.value(where, "mlp_pre_linear")
    layer = names.layers.get(where.path)
    is_partial = layer is not None and layer.why_not("mlp_pre_linear") is not None
    if pre is None or post is None or pre.shape != post.shape or is_partial:
        return
    times = "" if gated is None else " * mlp_pre_linear"
    found = [
        compared(
            str(where), "mlp_post", f"{name}(mlp_pre){times}",
            post, function(pre) * (1 if gated is None else gated),
        )
        for name, function in {**_ACTIVATIONS, **_own_activation(names, where)}.items()
    ]  # fmt: skip
    best = min(found, key=lambda claim: claim.deviation or 0.0)
    yield best
