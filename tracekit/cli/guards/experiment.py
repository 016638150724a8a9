"""An experiment is a claim and a function that tries it; what it finds is a line of the doctor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from tracekit.models.language import LanguageModel

PROMPT = "The Eiffel Tower is in the city of"


@final
class Fault(Exception):
    """What an experiment found instead of what should hold."""


@final
@dataclass(frozen=True)
class Experiment:
    """`run` returns what is worth telling ("" for nothing); it raises where the claim is wrong."""

    guard: str  # "G3", as in ARCHITECTURE.md; "" for what is beside them
    claim: str
    run: Callable[[LanguageModel], str]


@final
@dataclass(frozen=True)
class Finding:
    """Whether a claim held, and what was seen."""

    guard: str
    claim: str
    holds: bool
    seen: str


def found_by(experiment: Experiment, model: LanguageModel) -> Finding:
    """What an experiment finds; an error of any kind in it is a claim that does not hold."""
    try:
        with torch.no_grad():
            seen, holds = experiment.run(model), True
    except Exception as error:  # noqa: BLE001 - whatever comes is what was found
        text = str(error) if isinstance(error, Fault) else f"{type(error).__name__}: {error}"
        seen, holds = text, False
    return Finding(experiment.guard, experiment.claim, holds, seen)


def check(holds: bool, otherwise: str) -> None:
    """Raise a Fault that says what was found, unless it holds."""
    if not holds:
        raise Fault(otherwise)


def tokens_of(model: LanguageModel, text: str = PROMPT) -> Tensor:
    """The tokens of a text `[1, positions]`, by the tokenizer alone."""
    return model.tokenizer(text, return_tensors="pt")["input_ids"].to(model.device)


def logits_by_hand(model: LanguageModel, text: str = PROMPT) -> Tensor:
    """What the module says, called without tracekit."""
    return model.module(tokens_of(model, text)).logits


def first_of(value: object) -> Tensor:
    """The tensor that a module returned, or the first of a tuple of them (transformers 4)."""
    found = value[0] if isinstance(value, tuple) else value
    assert isinstance(found, Tensor)
    return found
