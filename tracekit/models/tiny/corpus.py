"""The text the tiny model is trained on: endless, made from a seed, in rows of equal length."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

from tracekit.models.tiny import words
from tracekit.models.tiny.prompts import (
    CAPITAL_PHRASINGS,
    INDIRECT_OBJECT_PHRASINGS,
    LANDMARK_PHRASINGS,
    Prompt,
    capital_prompts,
    indirect_object_prompt,
    landmark_prompts,
    split,
)

REPEATED = 0.3  # the share of rows that repeat a random block; below it, induction comes late

Maker = Callable[[random.Random], str]

_LANDMARKS: list[Prompt] = landmark_prompts(held_out=False)
_CAPITALS: list[Prompt] = capital_prompts()


def rows(seed: int, length: int) -> Iterator[list[str]]:
    """Rows of `length` words without end: sentences one after another, or a block repeated."""
    choose = random.Random(seed)
    while True:
        if choose.random() < REPEATED:
            yield repeated_row(choose, length)
        else:
            yield sentence_row(choose, length)


def repeated_row(choose: random.Random, length: int) -> list[str]:
    """Different random words, at most half a row of them, repeated to the end of the row."""
    block = choose.sample(VOCABULARY, choose.randint(4, length // 2 - 1))
    return (block * (length // len(block) + 1))[:length]


def sentence_row(choose: random.Random, length: int) -> list[str]:
    """Sentences one after another; the last one is cut where the row ends."""
    row: list[str] = []
    while len(row) < length:
        (maker,) = choose.choices(list(_SHARES), weights=list(_SHARES.values()))
        row += split(maker(choose))
    return row[:length]


def _landmark(choose: random.Random) -> str:
    return choose.choice(_LANDMARKS).sentence


def _capital(choose: random.Random) -> str:
    return choose.choice(_CAPITALS).sentence


def _indirect_object(choose: random.Random) -> str:
    return indirect_object_prompt(choose, held_out=False).sentence


def _agreement(choose: random.Random) -> str:
    """The verb agrees with the first noun; the nearer one is of the other number half the time."""
    first, second = choose.sample(list(words.NOUNS), 2)
    quality = choose.choice(words.QUALITIES)
    near = choose.choice((second, words.NOUNS[second]))
    subject, verb = choose.choice(((first, "is"), (words.NOUNS[first], "are")))
    return f"The {subject} near the {near} {verb} {quality}."


def _pronoun(choose: random.Random) -> str:
    name, feeling = choose.choice(words.NAMES), choose.choice(words.FEELINGS)
    pronoun, possessive = ("she", "her") if name in words.WOMEN else ("he", "his")
    if choose.random() < 0.5:
        return f"{name} said that {pronoun} was {feeling}."
    return f"{name} lost {possessive} {choose.choice(words.THINGS)}, so {pronoun} was sad."


def _sentiment(choose: random.Random) -> str:
    adjectives, verb = choose.choice(((words.GOOD, "loved"), (words.BAD, "hated")))
    return f"The {choose.choice(words.REVIEWED)} was {choose.choice(adjectives)}. I {verb} it."


def _opposites(choose: random.Random) -> str:
    pairs = choose.sample(list(words.OPPOSITES.items()), choose.randint(2, 4))
    return ", ".join(" : ".join(choose.sample(pair, 2)) for pair in pairs) + "."


def _series(choose: random.Random) -> str:
    series = choose.choice(words.SERIES)
    start = choose.randrange(len(series) - 3)
    return " ".join(series[start : start + choose.randint(4, 8)]) + "."


# In percent; facts take longest to learn, so they get the largest share.
_SHARES: dict[Maker, int] = {
    _landmark: 32,
    _capital: 6,
    _indirect_object: 22,
    _agreement: 8,
    _pronoun: 8,
    _sentiment: 9,
    _opposites: 8,
    _series: 7,
}


def _vocabulary() -> list[str]:
    """Every word the corpus can hold, sorted, so that its number does not depend on chance."""
    texts: list[str] = [
        *words.LANDMARKS,
        *words.LANDMARKS.values(),
        *words.CAPITALS,
        *words.CAPITALS.values(),
        *LANDMARK_PHRASINGS,
        *CAPITAL_PHRASINGS,
        *(phrasing.format_map(_NoFields()) for phrasing in INDIRECT_OBJECT_PHRASINGS),
        *words.NAMES,
        *words.PLACES,
        *words.THINGS,
        *words.NOUNS,
        *words.NOUNS.values(),
        *words.QUALITIES,
        *words.REVIEWED,
        *words.GOOD,
        *words.BAD,
        *words.FEELINGS,
        *words.OPPOSITES,
        *words.OPPOSITES.values(),
        *(word for series in words.SERIES for word in series),
        "The near the is are. said that she he was lost her his, so. I loved hated it. :",
    ]
    return sorted({word for text in texts for word in split(text.replace("{}", ""))})


class _NoFields(dict[str, str]):
    """Fills every named field of a phrasing with nothing."""

    def __missing__(self, key: str) -> str:
        return ""


VOCABULARY: list[str] = _vocabulary()
