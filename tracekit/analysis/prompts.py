"""Prompts as a model is fed them: their tokens, which are padding, and where each one ends."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeAlias, cast, final, get_args

import torch
from torch import Tensor

from tracekit.analysis.labelled import Axis
from tracekit.analysis.metrics import traced
from tracekit.errors import InputError, UnsupportedError
from tracekit.models.language import LanguageModel

# Which run is patched: the corrupted one, with clean values, or the other way round.
Direction: TypeAlias = Literal["denoise", "noise"]
DIRECTIONS: Final[tuple[str, ...]] = get_args(Direction)


@final
@dataclass(frozen=True)
class Prompts:
    """What a run is given for some prompts; of an encoder-decoder, its decoder's tokens count."""

    inputs: dict[str, Any]
    ids: Tensor  # [prompts, pos]
    is_token: Tensor  # [prompts, pos]; False at padding

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def length(self) -> int:
        """How many positions there are."""
        return int(self.ids.shape[1])

    @property
    def is_tokens_alone(self) -> bool:
        """Whether the tokens are all that the run is given."""
        return set(self.inputs) == {"input_ids"}

    @property
    def last(self) -> Tensor:
        """The column of each prompt's last token: `[prompts]`."""
        columns = torch.arange(self.length, device=self.ids.device)
        return (columns * self.is_token).argmax(-1)

    @property
    def is_padded(self) -> bool:
        """Whether a prompt has padding."""
        return not bool(self.is_token.all())

    def at_last(self, value: Tensor) -> Tensor:
        """What `value`, `[prompts, pos, …]`, has at each prompt's last token: `[prompts, …]`."""
        if value.shape[:2] != self.ids.shape:
            raise UnsupportedError(
                f"the model gives {list(value.shape[:2])} positions for tokens "
                f"{list(self.ids.shape)}: what is its last token is not told."
            )
        rows = torch.arange(len(self), device=value.device)
        return value[rows, self.last.to(value.device)]


def read_prompts(model: LanguageModel, given: Any) -> Prompts:
    """The prompts that `given` stands for: whatever a trace takes; InputError in training mode."""
    check_is_the_same(model)
    inputs: dict[str, Any] = model.to_inputs(given)
    is_both = "decoder_input_ids" in inputs
    ids = inputs.get("decoder_input_ids" if is_both else "input_ids")
    if not isinstance(ids, Tensor) or ids.dim() != 2:
        raise InputError(
            f"prompts are texts or token ids; of {', '.join(inputs)} none is tokens to count by."
        )
    mask = inputs.get("decoder_attention_mask" if is_both else "attention_mask")
    is_token = torch.ones_like(ids, dtype=torch.bool)
    if isinstance(mask, Tensor) and mask.shape == ids.shape:
        is_token = mask.bool()
    return Prompts(inputs, ids, is_token)


def check_is_the_same(model: LanguageModel) -> None:
    """InputError for a model in training mode, which is another one in each run."""
    traced(model).dispatch()
    training = next((path for path, it in model.module.named_modules() if it.training), None)
    if training is not None:
        part = f" ({training})" if training else ""
        raise InputError(
            f"the model{part} is in training mode, where dropout is random: model.eval()."
        )


def one_prompt(model: LanguageModel, given: Any, what: str) -> Prompts:
    """The one prompt that `given` is, without padding; InputError for several."""
    prompts = read_prompts(model, given)
    if len(prompts) != 1:
        raise InputError(
            f"{what} is of one prompt, and {len(prompts)} were given: "
            f"[{what}(model, each) for each in prompts]."
        )
    if prompts.is_padded:
        raise InputError(f"{what}: the one prompt has padding; give its own tokens alone.")
    return prompts


def alike(prompts: Prompts, what: str) -> Prompts:
    """`prompts`; InputError if their tokens don't stand at the same positions."""
    if prompts.is_padded:
        raise InputError(
            f"{what} is by position, and these prompts are of different lengths: a position is "
            f"not the same place in all of them. Give prompts of as many tokens, or one at a time."
        )
    return prompts


def read_pair(model: LanguageModel, clean: Any, corrupted: Any) -> tuple[Prompts, Prompts]:
    """The prompts of two runs, token beside token; InputError if they are not alike."""
    pair = read_prompts(model, clean), read_prompts(model, corrupted)
    check_pairs([pair])
    return pair


def check_pairs(pairs: Sequence[tuple[Prompts, Prompts]]) -> None:
    """InputError if two runs have tokens at other positions, or no pair differs in anything."""
    for clean, corrupted in pairs:
        _check_pair(clean, corrupted)
    if all(_is_same(clean.inputs, corrupted.inputs) for clean, corrupted in pairs):
        raise InputError("clean and corrupted are the same: no patch changes anything.")


def _is_same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(value, other[name]) if isinstance(value, Tensor) else value == other[name]
        for name, value in one.items()
    )


def _check_pair(clean: Prompts, corrupted: Prompts) -> None:
    one, other = clean.is_token, corrupted.is_token
    if one.shape != other.shape or not torch.equal(one, other):
        raise InputError(
            f"clean and corrupted prompts must be of one length, token beside token: a value goes "
            f"to the position that it is from; and they are of {one.sum(1).tolist()} and "
            f"{other.sum(1).tolist()} tokens. Compare model.to_str_tokens of both."
        )


def check_direction(direction: str) -> None:
    """InputError for a direction that is none."""
    if direction not in DIRECTIONS:
        raise InputError(
            f"direction= is 'denoise' (clean values into the corrupted run) or 'noise' (the other "
            f"way round), not {direction!r}."
        )


def last_logits(prompts: Prompts, output: object) -> Tensor:
    """The logits at each prompt's last token, `[prompts, vocabulary]`, of a run's output."""
    logits = getattr(output, "logits", output)
    if isinstance(output, Mapping):
        logits = cast("Mapping[str, Any]", output).get("logits")
    if not isinstance(logits, Tensor) or logits.dim() != 3:
        raise UnsupportedError("the model gives no logits [batch, pos, vocabulary].")
    return prompts.at_last(logits)


# -- axes -----------------------------------------------------------------------------------------


def words_of(model: LanguageModel, ids: Tensor) -> tuple[str, ...]:
    """The text of each token; its number, of a model without tokenizer."""
    flat = [int(each) for each in ids.flatten()]
    if model.tokenizer is None:
        return tuple(map(str, flat))
    return tuple(model.to_single_str_token(each) for each in flat)


def position_axis(model: LanguageModel, prompts: Prompts) -> Axis:
    """Positions, labelled by their tokens; where prompts differ, by both, or by their number."""
    return Axis("position", joined([words_of(model, row) for row in prompts.ids]))


def joined(words: Iterable[Sequence[str]]) -> tuple[str, ...]:
    """The label of each position of several prompts: "is"; of two, "Eiffel/Trevi"; of more, "2"."""
    columns = [tuple(dict.fromkeys(column)) for column in zip(*words, strict=True)]
    return tuple("/".join(one) if len(one) <= 2 else str(at) for at, one in enumerate(columns))


def prompt_axis(model: LanguageModel, prompts: Prompts) -> Axis:
    """Prompts, labelled by their text."""
    rows = zip(prompts.ids, prompts.is_token, strict=True)
    return Axis("prompt", tuple(" ".join(words_of(model, ids[own])) for ids, own in rows))


def numbered(name: str, count: int) -> Axis:
    """An axis whose places are labelled by their numbers."""
    return Axis(name, tuple(map(str, range(count))))
