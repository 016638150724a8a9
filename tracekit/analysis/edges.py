"""Edge attribution patching: what each edge between two components carries, to first order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, final

import torch

from tracekit.analysis.edge_ends import is_edge, names_of_targets, sources_of, targets_of
from tracekit.analysis.gradients import gradients_of
from tracekit.analysis.labelled import Axis, Labelled
from tracekit.analysis.metrics import Measure, name_of
from tracekit.analysis.prompts import Direction, Prompts, check_direction, read_pair
from tracekit.capture import showing_own_lines
from tracekit.errors import UnsupportedError
from tracekit.models.language import LanguageModel
from tracekit.tracing.named_cache import NamedCache

SHOWN: Final = 10  # edges in the text
_RECORDED: Final = frozenset(
    {
        *("resid_pre", "resid_mid", "resid_post", "resid_final"),
        *("attn_in", "mixer_in", "mlp_in", "q", "k", "v", "z"),
    }
)


class Edge(NamedTuple):
    """From what writes to what reads it, and how much the metric would change by its patch."""

    source: str
    target: str
    score: float


@final
@dataclass(frozen=True, repr=False)
class Edges:
    """The score of each edge, `[source, target]`; where there is none, it is no number.

    Sources are "embed", heads ("L0H3") or whole attentions ("L0.attn"), "L0.mlp" (biases are the
    same in both runs). Targets are "L1H0.q", "L1H0.k", "L1H0.v" ("L1KV0.k" where heads share them)
    or "L1.attn", "L1.mlp", and "final".
    """

    scores: Labelled

    def top(self, count: int = SHOWN) -> tuple[Edge, ...]:
        """The edges with the largest scores by size, the largest first."""
        cells = self.scores.top(count)
        return tuple(Edge(cell.labels[0], cell.labels[1], cell.value) for cell in cells)

    def circuit(self, count: int) -> Circuit:
        """The `count` edges with the largest scores, and what they connect."""
        edges = self.top(count)
        ends = [component_of(end) for edge in edges for end in edge[:2]]
        return Circuit(edges, tuple(dict.fromkeys(ends)))

    def to_json(self) -> dict[str, Any]:
        """All of it in lists and strings."""
        return self.scores.to_json()

    def __repr__(self) -> str:
        count = int(self.scores.values.isfinite().sum())
        return f"Edges({self.scores.what}: {count} edges){_lines(self.top())}"


@final
@dataclass(frozen=True, repr=False)
class Circuit:
    """Some edges, and the components that they connect: "embed", "L0H3", "L1.mlp", "final"."""

    edges: tuple[Edge, ...]
    nodes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """All of it in lists and strings."""
        return {"nodes": list(self.nodes), "edges": [edge._asdict() for edge in self.edges]}

    def __repr__(self) -> str:
        return f"Circuit({len(self.nodes)} components){_lines(self.edges)}"


@showing_own_lines
@torch.no_grad()
def edge_attribution(
    model: LanguageModel,
    clean: Any,
    corrupted: Any,
    metric: Measure,
    *,
    heads: bool = True,
    direction: Direction = "denoise",
) -> Edges:
    """By how much the metric would change, to first order, if one edge were patched; for all.

    An edge is what one component wrote into the residual stream, as another reads it: (what it
    wrote in the other run, less what it wrote here) times the gradient at that input. "denoise"
    puts the clean into the corrupted run, "noise" the other way round. Without `heads` attentions
    are whole. Sums over positions, means over prompts; two forward passes and one backward.
    UnsupportedError for what does not just add to the stream, or reads more of it than is named.
    Syed et al. 2023, "Attribution Patching Outperforms Automated Circuit Discovery".
    """
    check_direction(direction)
    into, other = read_pair(model, clean, corrupted)[:: -1 if direction == "denoise" else 1]
    if "decoder_input_ids" in into.inputs:
        raise UnsupportedError(
            "edge_attribution: what a decoder's cross-attention reads of the encoder is no part of "
            "its residual stream; attribution_patching takes such a model."
        )
    cache = _cached(model, into)
    before = sources_of(model, cache, heads)
    after = sources_of(model, _cached(model, other), heads)
    gradients = gradients_of(model, into, names_of_targets(model, cache, heads), metric)
    targets = list(targets_of(model, cache, gradients, heads))
    change = torch.stack([new.value - old.value for old, new in zip(before, after, strict=True)])
    sums = torch.stack(
        [torch.einsum("sbpm,bpm->s", change, each.gradient) / len(into) for each in targets], 1
    )
    there = torch.tensor([[is_edge(one, each) for each in targets] for one in before])
    scores = sums.masked_fill(~there.to(sums.device), torch.nan)
    axes = _axes([one.label for one in before], [each.label for each in targets])
    return Edges(Labelled(scores, axes, f"change of {name_of(metric)} by edge, {direction}"))


def component_of(end: str) -> str:
    """The component that an end of an edge is of: "L1H0" of "L1H0.q"."""
    head, _, part = end.partition(".")
    return head if part in ("q", "k", "v") else end


def _cached(model: LanguageModel, prompts: Prompts) -> NamedCache:
    layers = range(len(model.layers))
    added = {each.name for layer in layers for each in model.residual_additions(layer)}

    def is_needed(name: str) -> bool:
        return name.rpartition(".")[2] in _RECORDED | added

    return model.run_with_cache(**prompts.inputs, names_filter=is_needed)[1]


def _axes(sources: Sequence[str], targets: Sequence[str]) -> tuple[Axis, Axis]:
    return Axis("source", tuple(sources)), Axis("target", tuple(targets))


def _lines(edges: Sequence[Edge]) -> str:
    return "".join(f"\n  {edge.source:>8} → {edge.target:8} {edge.score:+.3g}" for edge in edges)
