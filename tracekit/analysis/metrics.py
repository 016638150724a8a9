"""One number of a run, from its last logits: what a patch, an ablation, a gradient is judged by."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias, final

import torch
from torch import Tensor

from tracekit.errors import InputError
from tracekit.models.language import LanguageModel

# A token for all prompts, by its text or its number, or one for each.
Tokens: TypeAlias = str | int | Sequence[str | int]

# From the logits at the last token of each prompt, `[prompts, vocabulary]`, a number for each.
Measure: TypeAlias = Callable[[Tensor], Tensor]


@final
@dataclass(frozen=True)
class Metric:
    """A number for each prompt, `[prompts]`, from the logits at its last token; and its name.

    Called with logits `[prompts, vocabulary]`; any function of them will do where one is asked for.
    They have no axis of positions: `logits[:, -1]` is the last word of the vocabulary.
    """

    name: str
    measure: Measure = field(repr=False)

    def __call__(self, logits: Tensor) -> Tensor:
        return self.measure(logits)


def logit(model: LanguageModel, tokens: Tokens) -> Metric:
    """The logit of a token; of one for each prompt, if there are several."""
    ids = token_ids(model, tokens)
    return Metric(f"logit of {_told(tokens)}", partial(_at, ids=ids))


def logit_difference(model: LanguageModel, right: Tokens, wrong: Tokens) -> Metric:
    """By how much the logit of `right` is above that of `wrong` (Wang et al. 2022)."""
    high, low = token_ids(model, right), token_ids(model, wrong)
    name = f"logit of {_told(right)} - {_told(wrong)}"
    return Metric(name, partial(_difference, high=high, low=low))


def log_probability(model: LanguageModel, tokens: Tokens) -> Metric:
    """The natural logarithm of a token's probability, in nats."""
    ids = token_ids(model, tokens)
    name = f"log probability of {_told(tokens)}"
    return Metric(name, partial(_log_probability, ids=ids))


def probability(model: LanguageModel, tokens: Tokens) -> Metric:
    """A token's probability, from 0 to 1."""
    ids = token_ids(model, tokens)
    return Metric(f"probability of {_told(tokens)}", partial(_probability, ids=ids))


def measured(metric: Measure, logits: Tensor) -> Tensor:
    """What a metric says of logits `[prompts, vocabulary]`: `[prompts]`; InputError if not that."""
    found = _called(metric, logits)
    if not isinstance(found, Tensor) or found.shape not in {(), logits.shape[:1]}:  # pyright: ignore[reportUnnecessaryIsInstance] - what a user's function returns
        raise InputError(
            f"a metric gives a number for each prompt, a tensor [{len(logits)}], from the logits "
            f"[prompts, vocabulary] at their last tokens; not {_shape(found)}."
        )
    return found.expand(len(logits))


def _called(metric: Measure, logits: Tensor) -> Tensor:
    if not callable(metric):
        raise InputError(
            f"a metric is a function of logits, as logit(model, 'Paris') is; not {metric!r}."
        )
    try:
        return metric(logits)
    except IndexError as error:  # most of all logits[:, -1, token], of logits at all positions
        raise InputError(
            f"the metric failed: {error}. Its logits are [prompts, vocabulary], here "
            f"{list(logits.shape)}, at the last tokens already: logits[:, token]."
        ) from error


def name_of(metric: Measure) -> str:
    """What a metric is called."""
    found = getattr(metric, "name", None) or getattr(metric, "__name__", "")
    return str(found) if found and found != "<lambda>" else "metric"


def traced(model: LanguageModel) -> LanguageModel:
    """`model`; InputError for what is none, as a module of PyTorch that was not wrapped."""
    if isinstance(model, LanguageModel):  # pyright: ignore[reportUnnecessaryIsInstance] - what a user gives
        return model
    kind, cure = type(model).__name__, ""
    if isinstance(model, torch.nn.Module):
        cure = ": give LanguageModel(model, tokenizer=tokenizer)"
    raise InputError(f"the first argument is a LanguageModel, not {kind}{cure}.")


def token_ids(model: LanguageModel, tokens: Tokens) -> list[int]:
    """The numbers of tokens that are given by text or number."""
    each: Any = [tokens] if isinstance(tokens, (str, int)) else tokens
    if not isinstance(each, Iterable):
        raise InputError(
            f"a token is its text or its number, or there is a list of them; not "
            f"{type(tokens).__name__}."
        )
    traced(model)
    return [model.to_single_token(one) if isinstance(one, str) else int(one) for one in each]


def _at(logits: Tensor, ids: list[int]) -> Tensor:
    if len(ids) not in (1, len(logits)):
        raise InputError(f"{len(ids)} tokens for {len(logits)} prompts: give one, or one for each.")
    count = logits.shape[-1]
    beyond = [each for each in ids if not 0 <= each < count]
    if beyond:
        raise InputError(f"token {beyond[0]}: the model's logits are of {count} tokens, from 0.")
    chosen = torch.tensor(ids, device=logits.device).expand(len(logits))
    return logits.gather(-1, chosen[:, None])[:, 0]


def _difference(logits: Tensor, high: list[int], low: list[int]) -> Tensor:
    return _at(logits, high) - _at(logits, low)


def _log_probability(logits: Tensor, ids: list[int]) -> Tensor:
    return _at(logits.float().log_softmax(-1), ids)


def _probability(logits: Tensor, ids: list[int]) -> Tensor:
    return _at(logits.float().softmax(-1), ids)


def _told(tokens: Tokens) -> str:
    if isinstance(tokens, (str, int)):
        return repr(tokens)
    return repr(tokens[0]) if len(tokens) == 1 else f"{len(tokens)} tokens"


def _shape(found: object) -> str:
    return str(list(found.shape)) if isinstance(found, Tensor) else type(found).__name__
