"""Experiments on what is left behind: no hook, no changed number, no object that stays alive."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Generator
from contextlib import contextmanager, suppress
from typing import Any, Final

import torch
from torch import Tensor, nn

from tracekit.cli.guards.experiment import PROMPT, Experiment, check, logits_by_hand
from tracekit.core.quirks import HOOK_DICTS
from tracekit.models.language import LanguageModel


def _is_untouched(model: LanguageModel) -> str:
    before, logits = _state_of(model.module), logits_by_hand(model)
    for run in (_traced, _failing_block, _failing_model):
        run(model)
        name = run.__name__.strip("_").replace("_", " ")
        check(_state_of(model.module) == before, f"something stayed on a module ({name})")
        check(torch.equal(logits_by_hand(model), logits), f"the logits have changed ({name})")
    return ""


def _nothing_lives_on(model: LanguageModel) -> str:
    refs: list[weakref.ref[Tensor]] = []
    with _collector_off():
        for run in (_traced, _failing_block, _failing_model):
            refs += map(weakref.ref, run(model))
        alive = sum(ref() is not None for ref in refs)
    check(not alive, f"{alive} of {len(refs)} tensors are alive")
    return f"{len(refs)} tensors"


def _traced(model: LanguageModel) -> list[Tensor]:
    """The tensors of a trace that reads, writes and records."""
    with model.trace(PROMPT) as tracer:
        cache = tracer.cache()
        model.transformer.h[0].hidden[:] = 0
        hidden = model.transformer.h[1].hidden
        result = tracer.result
    return [hidden, result.logits, *(cache[path].hidden for path in cache)]


def _failing_block(model: LanguageModel) -> list[Tensor]:
    taken: list[Tensor] = []
    with suppress(ZeroDivisionError), model.trace(PROMPT) as tracer:
        tracer.cache()
        taken.append(model.transformer.h[1].hidden)
        taken.append(taken[0] * (1 / 0))
    return taken


def _failing_model(model: LanguageModel) -> list[Tensor]:
    """The model itself fails, in its third block, after something was read."""
    taken: list[Tensor] = []
    hook = model.transformer.h[2].module.register_forward_pre_hook(_fail)
    try:
        with suppress(ArithmeticError), model.trace(PROMPT) as tracer:
            tracer.cache()
            taken.append(model.transformer.h[1].hidden * 2)
            taken.append(model.lm_head.output)
    finally:
        hook.remove()
    return taken


def _fail(*_: Any) -> None:
    raise ArithmeticError


def _state_of(model: nn.Module) -> list[Any]:
    """Every hook of every module, and what its instance has of its own."""
    return [
        (path, sorted(vars(module)), [list(getattr(module, name).items()) for name in HOOK_DICTS])
        for path, module in model.named_modules()
    ]


@contextmanager
def _collector_off() -> Generator[None]:
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


TRACELESS: Final = (
    Experiment("G3", "after a trace, and after an error, the model is as it was", _is_untouched),
    Experiment("G4", "nothing of a run stays alive, with the collector off", _nothing_lives_on),
)
