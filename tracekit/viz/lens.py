"""A logit lens: layer by position, the likeliest token on the colour of its probability."""

from __future__ import annotations

from tracekit.analysis import Lens
from tracekit.viz.parts import Facts, Grid, Grids, Part, Places, Scale
from tracekit.viz.wording import as_numbers, brief, visible

MOST = 1500  # cells; of longer prompts the last positions are shown


def lens_of(lens: Lens) -> list[Part]:
    """The parts of the picture: the table, and the followed token at the last position."""
    first = max(0, len(lens.tokens) - max(1, MOST // len(lens.layers)))
    top = as_numbers(lens.top.values)[:, first:]
    words = [row[first:] for row in lens.words]

    def more(row: int, column: int) -> str:
        others = zip(words[row][column][1:], top[row, column, 1:].tolist(), strict=True)
        told = ", ".join(f"{visible(word)} {brief(value)}" for word, value in others)
        return f"then {told}" if told else ""

    grid = Grid(
        Places("layer", lens.layers),
        Places("position", lens.tokens[first:], first=first),
        top[..., 0],
        texts=[[cell[0] for cell in row] for row in words],
        more=more,
    )
    facts = [(f"{visible(lens.chosen[-1])} at the last position", _followed(lens))]
    if first:
        facts.append(
            ("shown", f"the last {len(lens.tokens) - first} of {len(lens.tokens)} positions")
        )
    return [
        Grids((grid,), Scale("sequential", 0.0, 1.0, "probability of the token")),
        Facts(tuple(facts)),
    ]


def _followed(lens: Lens) -> str:
    values = lens.probability.values[:, -1].tolist()
    ranks = lens.rank.values[:, -1].tolist()
    return ", ".join(
        f"{layer} {brief(value)} (rank {int(rank)})"
        for layer, value, rank in zip(lens.layers, values, ranks, strict=True)
    )
