"""Prove a model's standard names: by plain hooks, and that a trace reads and writes them so."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final

import torch
from torch import Tensor, nn

from tracekit.architectures import Names
from tracekit.architectures.check import prove
from tracekit.architectures.check_writes import delta_for
from tracekit.architectures.findings import Claim, Proof, compared
from tracekit.architectures.infer import inferred
from tracekit.architectures.schema import Sharing
from tracekit.architectures.witness import ROOT, Run, Testimony, Where, Write, layers_of, observe
from tracekit.core.nest import tensors
from tracekit.errors import MissingNameError, OverwrittenError, TracekitError

Trace = Callable[[], Any]  # the tracer of one forward pass
_PIECES: Final = ("attn_q", "attn_k", "attn_v", "scores", "pattern")


def names_by_structure(root: nn.Module, trace: Trace) -> Names:
    """The names of a model of no declared family that a forward pass proves."""
    with torch.no_grad():
        found = inferred(root, _bare(root, trace))
    if found is None:
        raise MissingNameError(
            f"{type(root).__name__} is of no declared family, and nothing that its structure "
            f"suggests is what its numbers are: it has no standard names."
        )
    return found


def check_names(model: Any, names: Names, trace: Trace) -> Proof:
    """Every claim about the names of a model; `trace` makes the tracer of one forward pass."""
    with torch.no_grad():
        run = _bare(names.modules[""], trace)
        proof = prove(names, run)
        seen = observe(names, run)
        claims = [*_read(model, trace, seen), *_written(model, names, run, trace, seen)]
        for where in layers_of(names):
            claims += _patterns(model, names, trace, where)
    return Proof(proof.family, [*proof, *claims])


def envoy_of(model: Any, where: Where) -> Any:
    """What stands for a layer in a trace; for the model itself, the model."""
    return model if where == ROOT else getattr(model, where.stack)[where.index]


def _bare(root: nn.Module, trace: Trace) -> Run:
    """The forward pass of a trace without it: the model, called with what it is called with."""
    given: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    handle = root.register_forward_pre_hook(
        lambda _, args, kwargs: given.append((args, kwargs)), with_kwargs=True
    )
    try:
        trace().run(_nothing)
    finally:
        handle.remove()
    args, kwargs = given[0]
    return lambda: root(*args, **kwargs)


def _nothing() -> None:
    return None


def _read(model: Any, trace: Trace, seen: Testimony) -> Iterator[Claim]:
    """That a trace, which asks for every name in the model's order, reads what hooks saw."""
    order = sorted(seen.named, key=lambda key: seen.named[key].order)

    def block() -> dict[tuple[Where, str], Tensor]:
        return {key: getattr(envoy_of(model, key[0]), key[1]).clone() for key in order}

    try:
        found = trace().run(block)
    except TracekitError as error:
        yield Claim("model", "", "a trace reads every name", False, why=str(error))
        return
    for (where, name), value in found.items():
        claim = "a trace reads what a hook sees"
        yield compared(str(where), name, claim, value, seen.named[where, name].value)


def _written(model: Any, names: Names, run: Run, trace: Trace, seen: Testimony) -> Iterator[Claim]:
    """That a write in a trace has the result of the same write by a plain hook."""
    claim = "a write in a trace has the result of the same write by a hook"
    for (where, name), each in seen.named.items():
        bound = names.point(where.path, name)
        if not each.value.is_floating_point() or bound is None:
            continue
        if bound.sharing is Sharing.UNUSED:
            continue
        write = Write(where, name, delta_for(each.value))
        by_hand = list(tensors(observe(names, run, write).result))
        try:
            found = list(tensors(_result_of(model, trace, write)))
        except TracekitError as error:
            is_refused = isinstance(error, OverwrittenError)
            yield Claim(str(where), name, claim, None if is_refused else False, why=str(error))
            continue
        pairs = zip(by_hand, found, strict=True)
        yield Claim(str(where), name, claim, all(torch.equal(one, two) for one, two in pairs))


def _result_of(model: Any, trace: Trace, write: Write) -> Any:
    def block(tracer: Any) -> Any:
        layer = envoy_of(model, write.where)
        setattr(layer, write.name, getattr(layer, write.name) + write.delta)
        return tracer.result

    return trace().run(block)


def _patterns(model: Any, names: Names, trace: Trace, where: Where) -> Iterator[Claim]:
    """What the values inside an attention are of each other."""
    if not _is_there(names, where, "pattern"):
        return
    found: dict[str, Tensor] = {}
    for name in (*_PIECES, "z"):
        value = _value_of(model, trace, where, name) if _is_there(names, where, name) else "no name"
        if isinstance(value, Tensor):
            found[name] = value
        elif name != "z":
            yield Claim(str(where), name, "it is there", None, why=value)
    if {"scores", "pattern"} <= found.keys():
        yield from _of_attention(str(where), found)


def _is_there(names: Names, where: Where, name: str) -> bool:
    return names.point(where.path, name) is not None


def _value_of(model: Any, trace: Trace, where: Where, name: str) -> Tensor | str:
    """What a trace reads; or why it reads nothing."""
    try:
        return trace().run(lambda: getattr(envoy_of(model, where), name).clone())
    except TracekitError as error:
        return str(error)


def _of_attention(where: str, found: dict[str, Tensor]) -> Iterator[Claim]:
    scores, pattern = found["scores"], found["pattern"]
    total = pattern.double().sum(-1)
    if bool((total <= 1 + 1e-5).all()) and not bool((total > 1 - 1e-2).all()):
        why = "sinks take a part of it"
        yield Claim(where, "pattern", "rows sum to one", None, why=why)
    else:
        yield compared(
            where, "pattern", "rows sum to one", total.to(pattern), torch.ones_like(total)
        )
    soft = torch.softmax(scores.float(), -1).to(pattern)
    if soft.shape == pattern.shape and bool((total > 1 - 1e-2).all()):
        yield compared(where, "pattern", "it is the softmax of scores", pattern, soft)
    if {"attn_v", "z"} <= found.keys():
        yield _weighed(where, pattern, found["attn_v"], found["z"])


def _weighed(where: str, pattern: Tensor, v: Tensor, z: Tensor) -> Claim:
    claim = "with attn_v it gives z"
    values = v.transpose(1, 2).repeat_interleave(pattern.shape[1] // v.shape[2], 1)
    if values.shape[-2] == pattern.shape[-1]:
        expected = (pattern @ values).transpose(1, 2)
        same = compared(where, "pattern", claim, z.reshape(expected.shape), expected)
        if same.is_right:
            return same
    why = "something comes between attention and o, or its keys are not those of one pattern"
    return Claim(where, "pattern", claim, None, why=why)
