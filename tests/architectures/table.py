"""ARCHITECTURES.md, made from the matrix: families, their names, what each lacks and why.

python -m tests.architectures.table > ARCHITECTURES.md
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

import torch

from tests.tiny_models import NAMES, make
from tracekit.architectures import Names, known_families, names_of
from tracekit.architectures.schema import Family
from tracekit.core.words import (
    BLOCK_ACTIVATIONS,
    BLOCK_MODULES,
    PART_MODULES,
    ROOT_ACTIVATIONS,
    ROOT_MODULES,
)

_HEAD = """# Architectures

Made by `python -m tests.architectures.table > ARCHITECTURES.md`; do not edit it. Each model below
is a row of the matrix in `tests/architectures/test_matrix.py`, where names are proved by numbers.
`model.check_names(input)` does so for a model of yours, of these families or of none.
"""
# What nearly every block could have: a block that has one of these not says why.
_EXPECTED = (
    "attn_out",
    "q",
    "k",
    "v",
    "z",
    "pattern",
    "resid_mid",
    "mlp_in",
    "mlp_post",
    "mlp_out",
)


def page() -> str:
    """The whole page."""
    return "\n".join([_HEAD, *_declared(), *_glossary(), *_models()])


def _declared() -> Iterator[str]:
    families: dict[str, tuple[Family, list[str]]] = {}
    for model_type, family in sorted(known_families().items()):
        families.setdefault(family.name, (family, []))[1].append(model_type)
    yield "## Declared families\n\n| family | model types |\n|---|---|"
    for name, (_, types) in sorted(families.items()):
        yield f"| {name} | {', '.join(f'`{each}`' for each in types)} |"
    yield ""


def _glossary() -> Iterator[str]:
    for title, words in (
        ("Modules of a model", ROOT_MODULES),
        ("Modules of a block", BLOCK_MODULES),
        ("Modules inside those", PART_MODULES),
        ("Values of a model", ROOT_ACTIVATIONS),
        ("Values of a block", BLOCK_ACTIVATIONS),
    ):
        yield f"## {title}\n\n| name | shape | meaning |\n|---|---|---|"
        for name, word in words.items():
            yield f"| `{name}` | {word.shape.replace('|', ' or ')} | {word.meaning} |"
        yield ""


def _models() -> Iterator[str]:
    yield "## The matrix"
    for name in NAMES:
        net, _ = make(name)
        names = names_of(net)
        assert names is not None
        yield from _row(name, net, names)


def _row(name: str, net: torch.nn.Module, names: Names) -> Iterator[str]:
    yield f"\n### {name}\n\n`{type(net).__name__}`, family {names.family.name}"
    root = names.words("")
    yield f"\n- the model: {_listed(root)}"
    for stack, places in names.stacks.items():
        layers = [(index, names.words(place.path)) for index, place in enumerate(places)]
        for words, group in groupby(layers, key=lambda each: each[1]):
            indices = [str(index) for index, _ in group]
            path = places[int(indices[0])].path
            yield f"- `{stack}` {', '.join(indices)}: {_listed(words)}"
            yield from _lacking(names, path, words)


def _lacking(names: Names, path: str, words: list[str]) -> Iterator[str]:
    for word in _EXPECTED:
        if word not in words:
            yield f"  - no `{word}`: {names.why_not(path, word)}"


def _listed(words: list[str]) -> str:
    return ", ".join(f"`{word}`" for word in words)


if __name__ == "__main__":
    print(page())
