"""How well a model learned the corpus: four figures, each a share of right answers.

Also from the command line: python -m tracekit.models.tiny.evaluate [DIRECTORY]
"""

from __future__ import annotations

import argparse
import random
from dataclasses import dataclass
from pathlib import Path
from typing import final

import torch
from torch import Tensor
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

from tracekit.models.tiny import WEIGHTS
from tracekit.models.tiny.corpus import VOCABULARY
from tracekit.models.tiny.prompts import (
    Prompt,
    capital_prompts,
    indirect_object_prompt,
    landmark_prompts,
)
from tracekit.models.tiny.tokenizer import BEGIN

INDIRECT_OBJECTS = 200  # prompts
INDUCTION_ROWS = 64
INDUCTION_BLOCK = 25  # words, repeated once


@final
@dataclass(frozen=True)
class Figures:
    """What the model gets right; shares from 0 to 1, except the logit difference."""

    facts: float
    held_out_facts: float
    indirect_objects: float
    logit_difference: float
    induction: float

    def __str__(self) -> str:
        return f"""\
facts, trained phrasings        {self.facts:7.1%}
facts, held-out phrasings       {self.held_out_facts:7.1%}
indirect object, held-out pairs {self.indirect_objects:7.1%}
    its logit difference        {self.logit_difference:7.1f}
induction, random words         {self.induction:7.1%}"""


def measure(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> Figures:
    """The four figures; `seed` chooses the names and the random words, never the facts."""
    choose = random.Random(seed)
    pairs = [indirect_object_prompt(choose, held_out=True) for _ in range(INDIRECT_OBJECTS)]
    logits = next_word_logits(model, tokenizer, pairs)
    return Figures(
        facts=accuracy(model, tokenizer, landmark_prompts(held_out=False) + capital_prompts()),
        held_out_facts=accuracy(model, tokenizer, landmark_prompts(held_out=True)),
        indirect_objects=_share_right(logits, _answers(tokenizer, pairs)),
        logit_difference=_logit_difference(logits, tokenizer, pairs),
        induction=_induction(model, tokenizer, choose),
    )


def accuracy(
    model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, prompts: list[Prompt]
) -> float:
    """The share of `prompts` whose answer is the most probable next word."""
    return _share_right(next_word_logits(model, tokenizer, prompts), _answers(tokenizer, prompts))


@torch.inference_mode()
def next_word_logits(
    model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, prompts: list[Prompt]
) -> Tensor:
    """The logits behind each prompt, shape "prompts vocabulary"; padded on the right inside."""
    encoded = tokenizer(
        [prompt.text for prompt in prompts], padding=True, padding_side="right", return_tensors="pt"
    )
    mask = encoded["attention_mask"]
    logits = model(input_ids=encoded["input_ids"], attention_mask=mask).logits
    return logits[torch.arange(len(prompts)), mask.sum(dim=1) - 1]


def _answers(tokenizer: PreTrainedTokenizerFast, prompts: list[Prompt]) -> Tensor:
    return _ids(tokenizer, [prompt.answer for prompt in prompts])


def _ids(tokenizer: PreTrainedTokenizerFast, words: list[str]) -> Tensor:
    return torch.tensor(tokenizer.convert_tokens_to_ids(words))


def _share_right(logits: Tensor, answers: Tensor) -> float:
    return (logits.argmax(dim=-1) == answers).float().mean().item()


def _logit_difference(
    logits: Tensor, tokenizer: PreTrainedTokenizerFast, prompts: list[Prompt]
) -> float:
    """By how much the right name stands above the repeated one, on average."""
    wrong = _ids(tokenizer, [prompt.distractor or "" for prompt in prompts])
    right = _answers(tokenizer, prompts)
    row = torch.arange(len(prompts))
    return (logits[row, right] - logits[row, wrong]).mean().item()


@torch.inference_mode()
def _induction(
    model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, choose: random.Random
) -> float:
    """The share right in the second copy of random words, its first word excepted."""
    blocks = [choose.sample(VOCABULARY, INDUCTION_BLOCK) for _ in range(INDUCTION_ROWS)]
    ids = torch.stack([_ids(tokenizer, [BEGIN, *block, *block]) for block in blocks])
    guesses = model(input_ids=ids).logits[:, -INDUCTION_BLOCK:-1].argmax(dim=-1)
    return (guesses == ids[:, 1 - INDUCTION_BLOCK :]).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path, nargs="?", default=WEIGHTS)
    directory: Path = parser.parse_args().directory
    model = GPT2LMHeadModel.from_pretrained(directory, dtype=torch.float32)
    print(measure(model, PreTrainedTokenizerFast.from_pretrained(directory)))


if __name__ == "__main__":
    main()
