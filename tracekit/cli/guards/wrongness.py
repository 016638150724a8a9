"""Experiments on silent wrongness (G7): what can't be right is an error, and not a number."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import nn

from tracekit.cli.guards.experiment import (
    PROMPT,
    Experiment,
    Fault,
    check,
    logits_by_hand,
)
from tracekit.errors import NeverRanError, OverwrittenError, SiteOrderError
from tracekit.models.language import LanguageModel
from tracekit.models.model import Model

_SHORT: Final = "The Colosseum is in"
_CLOSE: Final = 1e-4  # of logits in float32: two batch sizes may sum in two orders


def _unfired_edits(model: LanguageModel) -> str:
    """A block of the model is called once, and its second call is edited."""
    try:
        with model.trace(PROMPT):
            model.transformer.h[1].calls[1].hidden = torch.zeros(1)
    except NeverRanError:
        return ""
    raise Fault("it was silently ignored")


def _order(model: LanguageModel) -> str:
    try:
        with model.trace(PROMPT):
            late = model.transformer.h[2].hidden
            early = model.transformer.h[0].hidden
    except SiteOrderError:
        return ""
    raise Fault(f"it gave {[*late.shape]} and {[*early.shape]}")


def _padding(model: LanguageModel) -> str:
    with model.trace([PROMPT, _SHORT]):
        logits = model.lm_head.output[:, -1]
    far = max(
        (row - logits_by_hand(model, text)[0, -1]).abs().max().item()
        for row, text in zip(logits, (PROMPT, _SHORT), strict=True)
    )
    check(far <= _CLOSE, f"logits differ by {far:.1e}")
    return f"logits differ by {far:.1e}"


def _overwritten(_: LanguageModel) -> str:
    """Of a model that works in place, a cache has the old value, and a held one is refused."""
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 4))
    given = torch.linspace(-1, 1, 12).reshape(3, 4)
    model, expected = Model(net), net[0](given)
    with model.trace(given) as tracer:
        cache = tracer.cache()
    check(torch.equal(cache["model.0"].output, expected), "the cache has the new value")
    try:
        with model.trace(given):
            held: Any = model[0].output
    except OverwrittenError:
        return ""
    raise Fault(f"a value of shape {[*held.shape]} was handed out that is another one now")


WRONGNESS: Final = (
    Experiment("G7", "an edit that never fires is an error", _unfired_edits),
    Experiment("G7", "what is asked for too late is an error", _order),
    Experiment("G7", "a row of a padded batch is what it is alone", _padding),
    Experiment("G7", "what the model overwrites in place is noticed", _overwritten),
)
