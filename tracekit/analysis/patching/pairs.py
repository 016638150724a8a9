"""The two runs of a sweep: the one that is patched, and the one that gives values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast, final

from torch import Tensor

from tracekit.analysis.batches import part
from tracekit.analysis.patching.patches import Target, Where
from tracekit.analysis.prompts import Prompts, last_logits, read_prompts
from tracekit.errors import InputError
from tracekit.models.language import LanguageModel


def prompts_of(model: LanguageModel, given: Any, what: str) -> list[Prompts]:
    """The prompts, each by itself: of texts, tokens `[pos]` or `[rows, pos]`, encodings, lists."""
    if _is_several(given):
        items = cast("Sequence[Any]", given)
        return [each for item in items for each in prompts_of(model, item, what)]
    # Of a text to_tokens leaves out what the model has no positions for, and warns.
    prompts = read_prompts(model, model.to_tokens(given) if isinstance(given, str) else given)
    if prompts.is_padded:
        raise InputError(
            f"{what} has padding: a sweep runs each prompt by itself, so give a list of texts, "
            f"or of tokens without padding."
        )
    _check_decodes(model, prompts)
    if not isinstance(given, Mapping) or set(prompts.inputs) == {"input_ids", "attention_mask"}:
        prompts = replace(prompts, inputs={"input_ids": prompts.ids})
    return [part(prompts, slice(row, row + 1)) for row in range(len(prompts))]


def _is_several(given: Any) -> bool:
    """Whether it is a list of what may be prompts, not the ids of one."""
    if not isinstance(given, Sequence) or isinstance(given, str):
        return False
    return bool(len(given)) and not isinstance(given[0], int)


def _check_decodes(model: LanguageModel, prompts: Prompts) -> None:
    config = getattr(model.module, "config", None)
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" not in prompts.inputs:
        raise InputError(
            f"{type(model.module).__name__} decodes behind an encoder: give encodings, "
            f"{{'input_ids': …, 'decoder_input_ids': …}}; positions are those of the decoder."
        )


@final
class Pair:
    """A run that is patched, `base`, and the values of the other at what may be patched."""

    def __init__(
        self, model: LanguageModel, base: Prompts, source: Prompts, wheres: Mapping[str, Where]
    ) -> None:
        self.base, self.source, self._wheres = base, source, wheres
        names = list(wheres)
        self.logits, own = _run(model, base, names)
        self.source_logits, other = _run(model, source, names)
        self.values = {key: wheres[key].laid_out(other[key], 1)[0] for key in names}
        mine = {key: wheres[key].laid_out(own[key], 1)[0] for key in names}
        self._differs = {key: _differs(self.values[key], mine[key], wheres[key]) for key in names}

    @property
    def length(self) -> int:
        """How many positions there are."""
        return self.base.length

    @property
    def sizes(self) -> dict[str, tuple[int, int]]:
        """How many positions and heads each activation has; 0 if it has no heads."""
        return {
            key: (len(value), value.shape[1] if self._wheres[key].has_heads else 0)
            for key, value in self.values.items()
        }

    def changed(self, target: Target) -> list[int]:
        """The positions at which the values of the other run are others than what is there."""
        differs = self._differs[target.key]
        if target.heads is not None:
            differs = differs[:, list(target.heads)]
        found: list[int] = differs.any(1).nonzero()[:, 0].tolist()
        return found if target.positions is None else sorted({*found} & {*target.positions})


def _run(model: LanguageModel, prompt: Prompts, names: list[str]) -> tuple[Tensor, Any]:
    """The logits at the last position, `[1, vocabulary]`, and what was recorded."""
    logits, cache = model.run_with_cache(**prompt.inputs, names_filter=names)
    return last_logits(prompt, logits), cache


def _differs(new: Tensor, old: Tensor, where: Where) -> Tensor:
    """Where two values differ in any bit that counts: `[positions, heads]`, or `[positions, 1]`."""
    if new.shape != old.shape:
        raise InputError(
            f"{where.spot.spelled} is {list(new.shape)} in one run and {list(old.shape)} in the "
            f"other, so its values can't go from one to the other."
        )
    differs = (new != old).reshape(len(new), new.shape[1] if where.has_heads else 1, -1)
    return differs.any(-1).cpu()
