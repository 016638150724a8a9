"""Many variants of prompts as rows of one batch, as many as a budget of memory allows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final

from torch import Tensor

from tracekit.analysis.prompts import Prompts
from tracekit.errors import UnsupportedError
from tracekit.models.language import LanguageModel

MEMORY: Final = 2**30  # bytes of what one batch keeps for its backward pass
# What a layer keeps of a token, in widths of the residual stream, and of logits, in vocabularies;
# after Korthikanti et al. 2022, "Reducing Activation Recomputation", in elements, rounded up.
_WIDTHS: Final = 40
_SCORES: Final = 5
_LOGITS: Final = 4


def rows_that_fit(model: LanguageModel, prompts: Prompts, memory: int) -> int:
    """How many times these prompts may be in one batch: at least once."""
    config: Any = model.module.config.get_text_config()
    positions = prompts.length
    width = getattr(config, "hidden_size", None) or 1024
    heads = getattr(config, "num_attention_heads", None) or 0
    of_token = len(model.layers) * (_WIDTHS * width + _SCORES * heads * positions)
    of_token += _LOGITS * (getattr(config, "vocab_size", None) or 0)
    size = next(model.module.parameters()).element_size()
    return max(1, int(memory // max(1, prompts.ids.numel() * of_token * size)))


def chunks(count: int, rows: int) -> Iterator[slice]:
    """`count` rows in batches of at most `rows`."""
    for begin in range(0, count, rows):
        yield slice(begin, min(count, begin + rows))


def repeated(prompts: Prompts, times: int) -> Prompts:
    """All prompts, and all again, that many times."""
    return _by_row(prompts, lambda value: value.repeat(times, *[1] * (value.dim() - 1)))


def part(prompts: Prompts, rows: slice) -> Prompts:
    """Some of the prompts."""
    if len(range(*rows.indices(len(prompts)))) == len(prompts):
        return prompts
    return _by_row(prompts, lambda value: value[rows])


def _by_row(prompts: Prompts, change: Callable[[Tensor], Tensor]) -> Prompts:
    count = len(prompts)
    inputs = {name: _changed(name, each, count, change) for name, each in prompts.inputs.items()}
    return Prompts(inputs, change(prompts.ids), change(prompts.is_token))


def _changed(name: str, value: Any, count: int, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, (bool, int, float, str, type(None))):
        return value
    if not isinstance(value, Tensor):
        raise UnsupportedError(f"{name}= can't be divided or repeated by rows: it is no tensor.")
    if value.dim() == 0 or value.shape[0] != count:
        raise UnsupportedError(
            f"{name}= has the shape {list(value.shape)}, not a row for each of {count} prompts: "
            f"it can't be divided or repeated by rows."
        )
    return change(value)


def in_parts(model: LanguageModel, prompts: Prompts, memory: int) -> Iterator[Prompts]:
    """The prompts, in batches for which the memory is enough."""
    one = Prompts({}, prompts.ids[:1], prompts.is_token[:1])
    for rows in chunks(len(prompts), rows_that_fit(model, one, memory)):
        yield part(prompts, rows)
