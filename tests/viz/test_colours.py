"""Colours: even steps, readable text on each, and apart for every kind of colour blindness."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from tracekit.viz.colours import STEPS, Kind, Theme, contrast, linear, oklab, palette, text_on

EACH = pytest.mark.parametrize(
    ("kind", "theme"),
    [(kind, theme) for kind in ("sequential", "diverging") for theme in ("light", "dark")],
)
# What is left of red, green and blue light (Machado, Oliveira, Fernandes 2009, full severity).
BLIND = {
    "protan": ((0.152, 1.053, -0.205), (0.115, 0.786, 0.099), (-0.004, -0.048, 1.052)),
    "deutan": ((0.367, 0.861, -0.228), (0.280, 0.673, 0.047), (-0.012, 0.043, 0.969)),
    "tritan": ((1.256, -0.077, -0.179), (-0.078, 0.931, 0.148), (0.005, 0.691, 0.304)),
}


@EACH
def test_text_is_readable_on_every_colour(kind: Kind, theme: Theme) -> None:
    assert all(contrast(text_on(colour), colour) >= 4.5 for colour in palette(kind, theme))


@EACH
def test_equal_steps_look_equal_and_go_one_way(kind: Kind, theme: Theme) -> None:
    places = [oklab(colour) for colour in palette(kind, theme)]
    half = STEPS // 2 if kind == "diverging" else 0
    for arm in (places[: half + 1][::-1], places[half:]):
        steps = [math.dist(one, other) for one, other in pairwise(arm)]
        assert not steps or max(steps) <= 1.25 * min(steps)
        lights = [place[0] for place in arm]
        assert lights in (sorted(lights), sorted(lights, reverse=True))


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("kind", BLIND)
def test_both_signs_are_apart_for_the_colour_blind(kind: str, theme: Theme) -> None:
    colours = palette("diverging", theme)
    for step in range(4, STEPS // 2 + 1):
        signs = [seen(colours[STEPS // 2 + side * step], kind) for side in (-1, 1)]
        assert math.dist(*signs) > 0.06  # OKLab; a just noticeable difference is 0.02


def seen(colour: str, kind: str) -> tuple[float, float, float]:
    light = linear(colour)
    amounts = (sum(a * b for a, b in zip(row, light, strict=True)) for row in BLIND[kind])
    clipped = [min(max(amount, 0.0), 1.0) for amount in amounts]
    curved = (12.92 * a if a <= 0.0031308 else 1.055 * a ** (1 / 2.4) - 0.055 for a in clipped)
    return oklab("#" + "".join(f"{round(part * 255):02x}" for part in curved))
