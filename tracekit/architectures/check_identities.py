"""Do the named values of a layer add up as its family says they do?"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any, Final

from torch import Tensor

from tracekit.architectures.binding import Names
from tracekit.architectures.findings import Claim, compared
from tracekit.architectures.schema import Residual
from tracekit.architectures.witness import ROOT, Testimony, Where
from tracekit.core.quirks import LOGIT_CAPS
from tracekit.core.site import Slot

MIXED: Final = ("attn_out", "ssm_out", "conv_out")
ADDED: Final = (*MIXED, "cross_attn_out", "mlp_out")
FINAL_NORMS: Final = {
    "layers": "final_norm",
    "encoder_layers": "encoder_norm",
    "vision_layers": "vision_norm",
    "audio_layers": "audio_norm",
    "text_layers": "text_norm",
}


def identities(names: Names, where: Where, seen: Testimony) -> Iterator[Claim]:
    """What the residual stream of one layer adds up to, as its block states it."""
    layer = names.layers.get(where.path)
    if layer is None or layer.block is None:
        return
    stream = _Stream(names, where, seen)
    yield from _BY_RESIDUAL[layer.block.residual](stream)


def joints(names: Names, stack: str, seen: Testimony) -> Iterator[Claim]:
    """That each layer is given what the one before has made, and the final norm the last."""
    places = [Where(stack, index, *place) for index, place in enumerate(names.stacks[stack])]
    declared = names.family.stacks[stack]
    for before, after in pairwise(places):
        is_next_stage = before.path.rpartition(".")[0] != after.path.rpartition(".")[0]
        if declared.between and (is_next_stage or not declared.has_stages):
            continue
        yield from _equal(
            before, "resid_post", f"it is resid_pre of {after}",
            seen.value(before, "resid_post"), seen.value(after, "resid_pre"),
        )  # fmt: skip
    norm = names.layers[""].modules.get(FINAL_NORMS.get(stack, "no norm"))
    if norm is not None and places and not declared.behind:
        given = seen.raw.get((norm, Slot.INPUT, 0))
        claim = f"it is what {FINAL_NORMS[stack]} is given"
        yield from _equal(
            places[-1], "resid_post", claim, seen.value(places[-1], "resid_post"), given
        )


def head(names: Names, seen: Testimony) -> Iterator[Claim]:
    """That the final norm, then the unembedding, of the last residual stream are the logits."""
    final = seen.value(ROOT, "final_norm_out")
    unembed = names.layers[""].modules.get("unembed")
    given = None if unembed is None else seen.raw.get((unembed, Slot.INPUT, 0))
    before = seen.value(ROOT, "resid_final")
    if final is not None and before is not None:
        norm = names.modules[names.layers[""].modules["final_norm"]]
        yield compared("model", "final_norm_out", "final_norm(resid_final)", final, norm(before))
    if unembed is None or given is None:
        return
    logits = seen.value(ROOT, "logits")
    if logits is not None:
        claim = "unembed of what it is given"
        yield compared("model", "logits", claim, logits, names.modules[unembed](given))
    if final is not None and "unembed_head" not in names.layers[""].modules:
        found = _proportional("logits", "unembed is given final_norm_out", given, final)
        why = "another module comes between"
        yield found if found.is_right else replace(found, is_right=None, deviation=None, why=why)
    result = getattr(seen.result, "logits", None)
    if logits is not None and isinstance(result, Tensor):
        yield _ending(names, logits, result)


def _ending(names: Names, logits: Tensor, result: Tensor) -> Claim:
    """That what the model returns is the logits: themselves, scaled, or soft-capped."""
    if result.shape == logits.shape:
        root: Any = names.modules[""]
        text = getattr(root.config, "get_text_config", lambda: root.config)()
        caps = (getattr(text, each, None) for each in LOGIT_CAPS)
        cap = next(filter(None, caps), None)
        if cap:
            capped = cap * (logits / cap).tanh()
            return compared(
                "model", "logits", f"the model returns them, capped at {cap:g}", result, capped
            )
    return _proportional("logits", "the model returns them", result, logits)


def _proportional(name: str, claim: str, found: Tensor, expected: Tensor) -> Claim:
    """The claim that `found` is `expected`, or one number times it, which is then named."""
    if found.shape != expected.shape:
        return compared("model", name, claim, found, expected)
    exact = compared("model", name, claim, found, expected)
    if exact.is_right:
        return exact
    one, other = found.double().flatten(), expected.double().flatten()
    factor = ((one @ other) / (other @ other)).item()
    return compared("model", name, f"{claim}, times {factor:.4g}", found, expected * factor)


# -- the ways of adding up ------------------------------------------------------------------------


class _Stream:
    """The named values of one layer, and how its contributions are scaled."""

    def __init__(self, names: Names, where: Where, seen: Testimony) -> None:
        self.where = where
        self.layer = names.layers[where.path]
        self.names, self.seen = names, seen
        self.config = _config(names, where)

    def has(self, name: str) -> bool:
        return self.names.point(self.where.path, name) is not None

    def __getitem__(self, name: str) -> Tensor | None:
        return self.seen.value(self.where, name)

    def norm(self, word: str) -> Callable[[Tensor], Tensor]:
        return self.names.modules[self.layer.modules[word]]

    def sum(self, start: str, added: tuple[str, ...]) -> Tensor | None:
        """`start`, and what is added to it of what there is; None if one of these was not seen."""
        found = self[start]
        for name in filter(self.has, added):
            each = self[name]
            if found is None or each is None:
                return None
            found = found + _shaped(each, found) * self.factor(name)
        return found

    def factor(self, name: str) -> float:
        """What a contribution is multiplied by."""
        return self.layer.block.factor(name, self.config) if self.layer.block is not None else 1.0

    def _term(self, name: str) -> str:
        factor = self.factor(name)
        return name if factor == 1 else f"{factor:g} * {name}"

    @property
    def added_last(self) -> tuple[str, ...]:
        """What is added behind resid_mid."""
        return self.layer.block.added_last if self.layer.block is not None else ()

    def claim(
        self, name: str, start: str, added: tuple[str, ...], norm: str = ""
    ) -> Iterator[Claim]:
        terms = " + ".join([start, *map(self._term, filter(self.has, added))])
        total = self.sum(start, added)
        if norm and total is not None:
            total = self.norm(norm)(total)
        yield from _equal(
            self.where, name, f"{norm}({terms})" if norm else terms, self[name], total
        )


def _sequential(stream: _Stream) -> Iterator[Claim]:
    start, added = "resid_pre", MIXED
    if not stream.has("resid_mid"):
        yield from stream.claim("resid_post", "resid_pre", ADDED)
        return
    if stream.has("cross_attn_out"):
        yield from stream.claim("resid_cross", "resid_pre", MIXED)
        start, added = "resid_cross", ("cross_attn_out",)
    yield from stream.claim("resid_mid", start, added)
    yield from stream.claim("resid_post", "resid_mid", stream.added_last)


def _one_sum(stream: _Stream) -> Iterator[Claim]:
    yield from stream.claim("resid_post", "resid_pre", ADDED)


def _post_norm(stream: _Stream) -> Iterator[Claim]:
    start, added, norm = "resid_pre", MIXED, "norm1"
    if stream.has("cross_attn_out"):
        yield from stream.claim("resid_cross", start, added, norm)
        start, added, norm = "resid_cross", ("cross_attn_out",), "cross_norm"
    yield from stream.claim("resid_mid", start, added, norm)
    yield from stream.claim("resid_post", "resid_mid", stream.added_last, "norm2")


def _other(stream: _Stream) -> Iterator[Claim]:
    yield Claim(
        str(stream.where),
        "resid_post",
        Residual.OTHER.value,
        None,
        why="nothing to hold it against",
    )


_BY_RESIDUAL: Final = {
    Residual.SEQUENTIAL: _sequential,
    Residual.PARALLEL: _one_sum,
    Residual.SINGLE: _one_sum,
    Residual.POST_NORM: _post_norm,
    Residual.OTHER: _other,
}


def _config(names: Names, where: Where) -> Any:
    config: Any = getattr(names.modules[""], "config", None)
    inside = names.family.stacks[where.stack].config
    return getattr(config, inside, config) if inside else config


def _shaped(added: Tensor, stream: Tensor) -> Tensor:
    """A sum where one side has rows and positions in one axis."""
    return added.reshape(stream.shape) if added.numel() == stream.numel() else added


def _equal(
    where: Where, name: str, claim: str, found: Tensor | None, expected: Tensor | None
) -> Iterator[Claim]:
    if found is None or expected is None:
        yield Claim(str(where), name, claim, False, why="a value of it was not seen")
        return
    yield compared(str(where), name, claim, found, _shaped(expected, found))
