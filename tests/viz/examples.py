"""What is hard to show: tags, line breaks, what is no number; and one picture of each kind."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from tracekit import LanguageModel, Picture, show
from tracekit.analysis import (
    Axis,
    Labelled,
    head_scores,
    integrated_gradients,
    logit_difference,
    logit_lens,
    patch_sweep,
)
from tracekit.tracing.verified.report import (
    EditCheck,
    EditReport,
    Flip,
    Landing,
    LogitsChange,
    ModuleChange,
    Problem,
    RowCheck,
    Touched,
)

TOKENS = ("<bos>", " Eiffel", "\n", "<script>alert(1)</script>", " & \"'", "\x1b[31m", "日本")
PROMPT = "The Eiffel Tower is in the city of"


def heat() -> Labelled:
    """Layers by positions, with both signs, one nan and one inf."""
    values = torch.linspace(-1.25, 3.0, 21).reshape(3, 7)
    values[1, 2], values[2, 6] = float("nan"), float("inf")
    layers = Axis("layer", ("0", "1", "2"))
    return Labelled(values, [layers, Axis("position", TOKENS)], "logit of 'Paris'")


def heads() -> Labelled:
    """Layers by positions by heads, none negative."""
    values = torch.arange(3 * 7 * 2).reshape(3, 7, 2) / 42
    axes = [Axis("layer", ("0", "1", "2")), Axis("position", TOKENS), Axis("head", ("0", "1"))]
    return Labelled(values, axes, "share")


def attention(heads: int, tokens: int) -> torch.Tensor:
    """Patterns of causal attention, `[heads, tokens, tokens]`."""
    scores = torch.randn(heads, tokens, tokens, generator=torch.Generator().manual_seed(0)) * 3
    later = torch.ones(tokens, tokens).triu(1).bool()
    return scores.masked_fill(later, -torch.inf).softmax(-1)


def report() -> EditReport:
    """Of two edits, one of which was overwritten."""
    site = "model.layers.1.output"
    landed = Landing(
        site, 0, 0, (Touched(0, (1,), (" Eiffel",)),), (4, 8), (4, 56), 2.0, 0.125, 1.5,
        is_there=True, read_by=("model.layers.2",), in_cache=True,
    )  # fmt: skip
    lost = Landing(
        site, 0, 0, (Touched(0, (0, 1), ("<bos>", " Eiffel")),), None, (16, 56), 9.0, 0.75, 3.0,
        overwritten_by="line 8",
    )  # fmt: skip
    edits = (
        EditCheck(0, "assigned", site, "x.py", 7, "h[0] = '<b>'", 0, 1, 1, (landed,), "as written"),
        EditCheck(1, "skip", site, "x.py", 9, "skip()", 0, 1, 2, (lost,), "overwritten"),
    )
    shift = LogitsChange(
        ((0, 1, 2),), ((0.0, 0.25, 0.5),), ((0.0, 0.1, 0.7),), (Flip(0, 2, " a", " b"),), 4.0
    )
    return EditReport(
        edits,
        (Problem("overwritten", "what line 9 wrote was overwritten by line 8", 1),),
        12,
        (),
        (ModuleChange("model.layers.1.output", 0, 5, 1.5, 0.125, (0,)),),
        3,
        (RowCheck(0, 0, "x", "edited", 1.0), RowCheck(1, 0, "y", "bit-identical", 0.0)),
        shift,
        0.25,
        None,
        (("<bos>", " Eiffel", "\n"), ("<bos>",)),
        2,
        ("a note",),
    )


def every(model: LanguageModel) -> Mapping[str, Picture]:
    """A picture of each kind."""
    tokens = model.to_str_tokens(PROMPT)
    _, named = model.run_with_cache(PROMPT, names_filter="pattern")
    with model.trace(PROMPT) as tracer:
        cache = tracer.cache()
        model.layers[1].attn_out[:] = 0
        model.layers[3].mlp.output = model.layers[2].mlp.output * float("nan")
    metric = logit_difference(model, "Paris", "Rome")
    clean, corrupted = "The capital of France is", "The capital of Italy is"
    return {
        "heat map": show(heat()),
        "small multiples": show(heads()),
        "tokens": show.tokens(TOKENS * 5, range(35), what="surprise"),
        "attention": show(named, layer=2, tokens=tokens),
        "much attention": show(attention(2, 128), tokens=TOKENS * 18 + TOKENS[:2]),
        "lens": show(logit_lens(model, PROMPT)),
        "modules": show(model),
        "statistics": show(model, cache),
        "graph": show(tracer.graph),
        "report": show(report()),
        "sweep": show(patch_sweep(model, clean, corrupted, metric, check=0, progress=False)),
        "head scores": show(head_scores(model, rows=2)),
        "gradients": show(integrated_gradients(model, clean, metric, steps=2)),
    }
