"""Colours for numbers: equal steps of a value look like equal steps, to colour-blind eyes as well.

Anchors are sky blue, blue and vermillion of the set that people with each kind of colour blindness
can tell apart (Okabe and Ito 2008, "Color Universal Design"). Between them colours go straight, at
even speed, through OKLab (Ottosson 2020), a space in which distance is the difference that is seen.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Final, Literal, TypeAlias

Theme: TypeAlias = Literal["light", "dark"]
Kind: TypeAlias = Literal["sequential", "diverging"]

KINDS: Final[tuple[Kind, ...]] = ("sequential", "diverging")
STEPS: Final = 33  # colours of a scale; odd, so that 0 has one of its own
_FINE: Final = 64  # points of a path between two anchors, along which lengths are measured

# From paper to ink; what is near nothing is near the background.
_BLUES: Final = {
    "light": ("#f7f9fb", "#56b4e9", "#0072b2", "#062f4f"),
    "dark": ("#1d2126", "#0072b2", "#56b4e9", "#b5e1fb"),
}
_ORANGES: Final = {
    "light": ("#f7f9fb", "#f0a36b", "#d55e00", "#571f00"),
    "dark": ("#1d2126", "#b04d00", "#f0954f", "#ffc896"),
}
_DARK_TEXT: Final = "#000000"
_LIGHT_TEXT: Final = "#ffffff"


def palette(kind: Kind, theme: Theme = "light") -> tuple[str, ...]:
    """The STEPS colours of a scale, lowest value first, as "#rrggbb".

    A diverging one is orange below 0, like the background at 0, blue above.
    """
    if kind == "sequential":
        return _along(_BLUES[theme], STEPS)
    half = STEPS // 2 + 1
    return (*reversed(_along(_ORANGES[theme], half)), *_along(_BLUES[theme], half)[1:])


def text_on(colour: str) -> str:
    """Black or white: what is easier to read on a colour."""
    return max((_DARK_TEXT, _LIGHT_TEXT), key=lambda text: contrast(text, colour))


def contrast(one: str, other: str) -> float:
    """The contrast ratio of two colours, 1 to 21, as WCAG 2 defines it; text wants 4.5."""
    lights = sorted(_luminance(colour) for colour in (one, other))
    return (lights[1] + 0.05) / (lights[0] + 0.05)


def oklab(colour: str) -> tuple[float, float, float]:
    """A colour's place in OKLab: lightness 0 to 1, green to red, blue to yellow."""
    r, g, b = linear(colour)
    long = _root(0.4122214708 * r + 0.5363325363 * g + 0.0514459929 * b)
    middle = _root(0.2119034982 * r + 0.6806995451 * g + 0.1073969566 * b)
    short = _root(0.0883024619 * r + 0.2817188376 * g + 0.6299787005 * b)
    return (
        0.2104542553 * long + 0.7936177850 * middle - 0.0040720468 * short,
        1.9779984951 * long - 2.4285922050 * middle + 0.4505937099 * short,
        0.0259040371 * long + 0.7827717662 * middle - 0.8086757660 * short,
    )


def linear(colour: str) -> tuple[float, float, float]:
    """Red, green and blue as amounts of light, 0 to 1."""
    parts = (int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5))
    red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return red, green, blue


def _root(amount: float) -> float:
    return amount ** (1 / 3)  # math.cbrt is of Python 3.11; no amount is below 0


def _luminance(colour: str) -> float:
    red, green, blue = linear(colour)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def _along(anchors: tuple[str, ...], count: int) -> tuple[str, ...]:
    """So many colours on the way through the anchors, each as far from the next as all others."""
    places = [oklab(anchor) for anchor in anchors]
    path = [places[0]]
    for start, end in pairwise(places):
        path += [_between(start, end, step / _FINE) for step in range(1, _FINE + 1)]
    lengths = [0.0]
    for one, other in pairwise(path):
        lengths.append(lengths[-1] + math.dist(one, other))
    found: list[str] = []
    at = 0
    for step in range(count):
        wanted = lengths[-1] * step / (count - 1)
        while at < len(path) - 2 and lengths[at + 1] < wanted:
            at += 1
        share = (wanted - lengths[at]) / (lengths[at + 1] - lengths[at])
        found.append(_hex(_between(path[at], path[at + 1], share)))
    return tuple(found)


def _between(
    one: tuple[float, ...], other: tuple[float, ...], share: float
) -> tuple[float, float, float]:
    light, red, yellow = (a + (b - a) * share for a, b in zip(one, other, strict=True))
    return light, red, yellow


def _hex(place: tuple[float, float, float]) -> str:
    light, red, yellow = place
    long = (light + 0.3963377774 * red + 0.2158037573 * yellow) ** 3
    middle = (light - 0.1055613458 * red - 0.0638541728 * yellow) ** 3
    short = (light - 0.0894841775 * red - 1.2914855480 * yellow) ** 3
    amounts = (
        4.0767416621 * long - 3.3077115913 * middle + 0.2309699292 * short,
        -1.2684380046 * long + 2.6097574011 * middle - 0.3413193965 * short,
        -0.0041960863 * long - 0.7034186147 * middle + 1.7076147010 * short,
    )
    return "#" + "".join(f"{_byte(amount):02x}" for amount in amounts)


def _byte(amount: float) -> int:
    amount = min(max(amount, 0.0), 1.0)
    curved = 12.92 * amount if amount <= 0.0031308 else 1.055 * amount ** (1 / 2.4) - 0.055
    return round(curved * 255)
