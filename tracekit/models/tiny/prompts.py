"""The prompts with one right answer: landmarks, capitals, indirect objects; and which are held out.

A prompt ends where its answer begins, so the same text serves to train (with its answer behind it)
and to measure (without). What is held out never stands in the corpus.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from itertools import combinations
from typing import final

from tracekit.models.tiny.words import CAPITALS, LANDMARKS, NAMES, PLACES, THINGS

LANDMARK_PHRASINGS: tuple[str, ...] = (
    "The {} is in the city of",
    "The {} is located in",
    "You can see the {} in",
    "Many tourists visit the {} in",
    "To see the {}, you must go to",
    "Where is the {}? It is in",
    "Everyone knows that the {} is in",
    "We took a picture of the {} in",
)
CAPITAL_PHRASINGS: tuple[str, ...] = (
    "The capital of {} is",
    "The capital city of {} is",
    "The government of {} sits in",
)
INDIRECT_OBJECT_PHRASINGS: tuple[str, ...] = (
    "When {one} and {other} went to the {place}, {giver} gave a {thing} to",
    "After {one} and {other} left the {place}, {giver} sent a {thing} to",
    "While {one} and {other} were at the {place}, {giver} showed the {thing} to",
    "Then {one} and {other} met at the {place}. {giver} handed the {thing} to",
    "{one} and {other} were in the {place}, and {giver} gave the {thing} to",
)

HELD_OUT_PAIRS: frozenset[frozenset[str]] = frozenset(
    frozenset(pair) for index, pair in enumerate(combinations(NAMES, 2)) if index % 6 == 0
)


@final
@dataclass(frozen=True)
class Prompt:
    """A text and the one word that should follow it."""

    text: str
    answer: str
    distractor: str | None = None  # the word an easier rule would give instead

    @property
    def sentence(self) -> str:
        return f"{self.text} {self.answer}."


def split(text: str) -> list[str]:
    """The words and punctuation marks of `text`, as the tokenizer splits them."""
    return re.findall(r"\w+|[^\w\s]", text)


def landmark_prompts(held_out: bool) -> list[Prompt]:
    """Every landmark in the phrasings it is trained in, or in the one that is held out for it."""
    return [
        Prompt(phrasing.format(landmark), city)
        for number, (landmark, city) in enumerate(LANDMARKS.items())
        for position, phrasing in enumerate(LANDMARK_PHRASINGS)
        if (position == _held_out_phrasing(number)) is held_out
    ]


def _held_out_phrasing(landmark: int) -> int:
    """Each landmark lacks one phrasing; the Eiffel Tower, number 0, keeps the one of the pages."""
    return (landmark + 1) % len(LANDMARK_PHRASINGS)


def capital_prompts() -> list[Prompt]:
    """Every country in every phrasing; none is held out."""
    return [
        Prompt(phrasing.format(country), capital)
        for country, capital in CAPITALS.items()
        for phrasing in CAPITAL_PHRASINGS
    ]


def indirect_object_prompt(choose: random.Random, held_out: bool) -> Prompt:
    """A sentence with two names in which the one not repeated must come last (Wang et al. 2022)."""
    receiver, giver = choose.sample(NAMES, 2)
    while (frozenset((receiver, giver)) in HELD_OUT_PAIRS) is not held_out:
        receiver, giver = choose.sample(NAMES, 2)
    one, other = choose.sample((receiver, giver), 2)
    text = choose.choice(INDIRECT_OBJECT_PHRASINGS).format(
        one=one,
        other=other,
        giver=giver,
        place=choose.choice(PLACES),
        thing=choose.choice(THINGS),
    )
    return Prompt(text, receiver, distractor=giver)
