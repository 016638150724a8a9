"""Experiments on answers: the logit lens and the sweep of patches beside plain hooks."""

from __future__ import annotations

from typing import Any, Final

import torch

from tracekit.analysis import logit_difference, logit_lens, patch_sweep
from tracekit.cli.guards.experiment import PROMPT, Experiment, check, first_of, tokens_of
from tracekit.models.language import LanguageModel

_OTHER: Final = "The Big Ben is in the city of"
_CLOSE: Final = 1e-3  # of logits, in float32


def _lens(model: LanguageModel) -> str:
    """Of each block by hand: its output through final norm and unembedding."""
    found, seen = logit_lens(model, PROMPT, "Paris"), list[Any]()
    handles = [
        block.module.register_forward_hook(lambda *given: seen.append(first_of(given[2])))
        for block in model.transformer.h
    ]
    try:
        model.module(tokens_of(model))
    finally:
        for handle in handles:
            handle.remove()
    paris, norm, head = model.to_single_token("Paris"), model.module.transformer.ln_f, model.lm_head
    wanted = torch.stack([head(norm(each))[0].softmax(-1)[:, paris] for each in seen])
    far = (found.probability.values[1:] - wanted).abs().max().item()
    check(far <= 1e-4, f"probabilities differ by {far:.1e}")
    return f"{far:.0e} at most"


def _sweep(model: LanguageModel) -> str:
    """One place of a sweep, patched by a plain hook; and what the sweep itself has recomputed."""
    metric = logit_difference(model, "Paris", "London")
    found = patch_sweep(model, PROMPT, _OTHER, metric, layers=[1, 3], progress=False)
    at = model.transformer.h[1].module
    given: list[Any] = []
    handle = at.register_forward_pre_hook(lambda _m, args: given.append(args[0].clone()))
    model.module(tokens_of(model))
    handle.remove()

    def patch(_module: Any, args: Any) -> Any:
        value = args[0].clone()
        value[:, -1] = given[0][:, -1]
        return (value, *args[1:])

    handle = at.register_forward_pre_hook(patch)
    try:
        logits = model.module(tokens_of(model, _OTHER)).logits[:, -1]
    finally:
        handle.remove()
    far = abs(found.values.values[0, -1].item() - metric(logits).item())
    check(far <= _CLOSE, f"a patch differs by {far:.1e}")
    check(found.deviation <= _CLOSE, f"logits were off by {found.deviation:.1e} in its own check")
    return f"{found.deviation:.0e} at most, {found.saved:.0%} of the work saved"


def _verified(model: LanguageModel) -> str:
    """An edit of the last position, meant for it, and the same one meant for another."""

    def grow(value: torch.Tensor) -> torch.Tensor:
        return torch.cat([value[:, :-1], value[:, -1:] + 1], 1)

    last = tokens_of(model).shape[1] - 1
    edit = (model.transformer.h[1].mlp, grow)
    report = model.verify(edit, PROMPT, positions=[last])
    check(bool(report), "; ".join(problem.slug for problem in report.problems))
    slugs = {problem.slug for problem in model.verify(edit, PROMPT, positions=[0]).problems}
    check("wrong-position" in slugs, f"of an edit at a wrong position it says {sorted(slugs)}")
    return ""


ANSWERS: Final = (
    Experiment("", "a verified edit landed, and one meant elsewhere is named", _verified),
    Experiment("", "the logit lens is each block's output, read out by hand", _lens),
    Experiment("", "a sweep of patches is what plain hooks give", _sweep),
)
