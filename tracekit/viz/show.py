"""`show(thing)`: the picture that fits what it is given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias, final

import torch
from torch import Tensor

from tracekit.analysis import (
    Axis,
    Circuit,
    DoseCurve,
    Edges,
    HeadScores,
    Integrated,
    Labelled,
    Lens,
    PatchSweep,
    Probes,
)
from tracekit.capture import showing_own_lines
from tracekit.errors import InputError
from tracekit.tracing.cache import Cache
from tracekit.tracing.envoy import Envoy
from tracekit.tracing.graph import Graph
from tracekit.tracing.named_cache import NamedCache
from tracekit.tracing.verified.report import EditReport
from tracekit.tracing.verify import Verification
from tracekit.viz import modules, requests
from tracekit.viz.answers import (
    doses_of,
    edges_of,
    integrated_of,
    probes_of,
    scores_of,
    sweep_of,
)
from tracekit.viz.attention import attention_of, pattern_in
from tracekit.viz.heat import heat_of
from tracekit.viz.lens import lens_of
from tracekit.viz.parts import Part
from tracekit.viz.picture import Picture
from tracekit.viz.reports import report_of, verification_of

_Told: TypeAlias = tuple[str, list[Part]]  # title and parts


class _Options(NamedTuple):
    """What a user may say beside the thing."""

    cache: Cache | None
    tokens: Sequence[str] | None
    layer: int | None
    low: float | None
    high: float | None
    panels: str | None


@final
class Show:
    """A Picture of what tracekit hands out: seen in a notebook, printed in a terminal, saved.

    `show(found)` of labelled numbers, a logit lens, a sweep, `tracer.graph`, a report;
    `show(model)` of its modules, `show(model, cache)` with what was recorded of them;
    `show(cache, layer=3, tokens=...)` or `show(pattern, tokens=...)` of attention;
    `show.tokens(strings, values)` of running text.
    """

    @showing_own_lines
    def __call__(
        self,
        thing: Any,
        cache: Cache | None = None,
        *,
        tokens: Sequence[str] | None = None,
        layer: int | None = None,
        title: str | None = None,
        low: float | None = None,
        high: float | None = None,
        panels: str | None = None,
    ) -> Picture:
        """The picture of `thing`.

        `cache` goes with a model, `tokens` and `layer` with attention; `low` and `high` are the
        ends of the colours of labelled numbers, and `panels` the axis of which there is one heat
        map for each place. InputError, which says what can be shown, for anything else.
        """
        options = _Options(cache, tokens, layer, low, high, panels)
        heading, parts = _picture_of(thing, options)
        return Picture(heading if title is None else title, parts)

    @showing_own_lines
    def tokens(
        self,
        strings: Sequence[str],
        values: Tensor | Sequence[float],
        *,
        what: str = "",
        title: str | None = None,
        low: float | None = None,
        high: float | None = None,
    ) -> Picture:
        """Running text with a number for each token, as its colour; `what` says of what."""
        numbers = torch.as_tensor(values)
        if numbers.shape != (len(strings),):
            raise InputError(
                f"{len(strings)} tokens, and values of shape {list(numbers.shape)}: "
                f"one number for each token."
            )
        found = Labelled(numbers, [Axis("position", tuple(strings))], what)
        return Picture(what if title is None else title, heat_of(found, low, high))


def _picture_of(thing: Any, options: _Options) -> _Told:
    match thing:
        case Labelled():
            parts = heat_of(thing, options.low, options.high, options.panels)
            return f"{thing.what or 'values'}, by {' and '.join(thing.names)}", parts
        case PatchSweep():
            run = "corrupted" if thing.direction == "denoise" else "clean"
            metric = thing.per_pair.what
            told = f"{thing.what} patched into the {run} run: {metric}, 0 as it is, 1 as the other"
            return told, sweep_of(thing, options.panels)
        case HeadScores():
            return "What each head attends to", scores_of(thing)
        case Integrated():
            return thing.scores.what, integrated_of(thing)
        case DoseCurve():
            return f"{thing.metric.what}, steered", doses_of(thing)
        case Probes():
            return "What can be read, by linear probes", probes_of(thing)
        case Edges() | Circuit():
            return "The edges that carry most, to first order", edges_of(thing)
        case Lens():
            return f"Logit lens: what each layer ({thing.activation}) would say", lens_of(thing)
        case Graph():
            return requests.told(thing), requests.graph_of(thing)
        case EditReport():
            return "Did the edit land?", report_of(thing)
        case Verification():
            return "Is what was recorded what one forward computes?", verification_of(thing)
        case Envoy():
            return modules.told(thing), modules.tree_of(thing, options.cache)
        case NamedCache():
            pattern = pattern_in(thing, options.layer)
            return f"Attention of layer {options.layer}", attention_of(pattern, options.tokens)
        case Tensor():
            layer = "" if options.layer is None else f" of layer {options.layer}"
            return f"Attention{layer}", attention_of(thing, options.tokens)
        case _:
            raise InputError(_no_picture(thing))


def _no_picture(thing: object) -> str:
    return (
        f"there is no picture of {type(thing).__name__}. What can be shown: labelled numbers, a "
        f"patch sweep, head scores, integrated gradients, edges, a dose curve, probes, a logit "
        f"lens; attention, by show(cache, layer=3) or as a pattern [heads, queries, keys]; a model "
        f"or a module, with a tracer.cache() too; tracer.graph; a report of edits, cache.verify(); "
        f"and texts, by show.tokens(strings, values)."
    )


show = Show()
