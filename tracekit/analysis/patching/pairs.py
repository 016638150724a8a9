"""The two runs of a sweep: the one that is patched, and the one that gives values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast, final

import torch
from torch import Tensor

from tracekit.analysis.patching.patches import Target, Where
from tracekit.errors import InputError
from tracekit.models.language import LanguageModel


@final
@dataclass(frozen=True)
class Prompt:
    """One prompt as a model is given it, in one row; `ids` are the tokens that have positions."""

    inputs: dict[str, Any]
    ids: Tensor

    @property
    def length(self) -> int:
        """How many positions it has."""
        return int(self.ids.shape[1])

    @property
    def is_tokens_alone(self) -> bool:
        """Whether the tokens are all that it is."""
        return set(self.inputs) == {"input_ids"}


def prompts_of(model: LanguageModel, given: Any, what: str) -> list[Prompt]:
    """The prompts, each by itself: of texts, tokens `[pos]` or `[rows, pos]`, encodings."""
    if isinstance(given, str):
        return [_prompt(model, {"input_ids": model.to_tokens(given)})]
    if isinstance(given, Tensor) and given.dtype in (torch.int64, torch.int32):
        rows = given[None] if given.dim() == 1 else given
        return [_prompt(model, {"input_ids": row[None]}) for row in rows]
    if isinstance(given, Mapping):
        return _encoded(model, cast("Mapping[str, Any]", given), what)
    if isinstance(given, Sequence) and len(cast("Sequence[Any]", given)):
        items = list(cast("Sequence[Any]", given))
        if isinstance(items[0], int):
            return prompts_of(model, torch.tensor(items), what)
        return [each for item in items for each in prompts_of(model, item, what)]
    raise InputError(
        f"{what} is a text, token ids, an encoding, or a list of these; not {type(given).__name__}."
    )


def _encoded(model: LanguageModel, given: Mapping[str, Any], what: str) -> list[Prompt]:
    tensors = {name: value for name, value in given.items() if isinstance(value, Tensor)}
    rows = {len(value) for value in tensors.values()}
    if len(rows) != 1 or len(tensors) < len(given):
        raise InputError(
            f"the encoding given as {what} is to have tensors alone, with a row for each prompt."
        )
    found: list[Prompt] = []
    for row in range(rows.pop()):
        inputs = {name: value[row : row + 1] for name, value in tensors.items()}
        mask = inputs.get("attention_mask")
        if mask is not None and not bool(mask.all()):
            raise InputError(
                f"{what} has padding: a sweep runs each prompt by itself, so give a list of texts, "
                f"or of tokens without padding."
            )
        if mask is not None and set(inputs) == {"input_ids", "attention_mask"}:
            del inputs["attention_mask"]
        found.append(_prompt(model, inputs))
    return found


def _prompt(model: LanguageModel, inputs: dict[str, Any]) -> Prompt:
    config = getattr(model.module, "config", None)
    name = "decoder_input_ids" if getattr(config, "is_encoder_decoder", False) else "input_ids"
    if name not in inputs:
        raise InputError(
            f"{type(model.module).__name__} decodes behind an encoder: give encodings, "
            f"{{'input_ids': …, 'decoder_input_ids': …}}; positions are those of the decoder."
        )
    device = next(model.module.parameters()).device
    inputs = {key: value.to(device) for key, value in inputs.items()}
    return Prompt(inputs, inputs[name])


@final
class Pair:
    """A run that is patched, `base`, and the values of the other at what may be patched."""

    def __init__(
        self, model: LanguageModel, base: Prompt, source: Prompt, wheres: Mapping[str, Where]
    ) -> None:
        if base.length != source.length:
            raise InputError(
                f"the clean prompt has {source.length} tokens and the corrupted one "
                f"{base.length}, or the other way round: a value goes to the position that it is "
                f"from, so they must be of one length. Compare model.to_str_tokens of both."
            )
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


def _run(model: LanguageModel, prompt: Prompt, names: list[str]) -> tuple[Tensor, Any]:
    """The logits at the last position, `[1, vocabulary]`, and what was recorded."""
    logits, cache = model.run_with_cache(**prompt.inputs, names_filter=names)
    if not isinstance(logits, Tensor) or logits.dim() != 3:
        raise InputError(f"{type(model.module).__name__} gives no logits [rows, pos, vocabulary].")
    return logits[:, -1].clone(), cache


def _differs(new: Tensor, old: Tensor, where: Where) -> Tensor:
    """Where two values differ in any bit that counts: `[positions, heads]`, or `[positions, 1]`."""
    if new.shape != old.shape:
        raise InputError(
            f"{where.spot.spelled} is {list(new.shape)} in one run and {list(old.shape)} in the "
            f"other, so its values can't go from one to the other."
        )
    differs = (new != old).reshape(len(new), new.shape[1] if where.has_heads else 1, -1)
    return differs.any(-1).cpu()
