"""`tracekit patch`: which place of a model carries what two prompts differ in."""

from __future__ import annotations

import itertools
import math
import sys
from argparse import Namespace
from collections.abc import Sequence
from typing import Any

import torch

from tracekit.analysis import Axis, Labelled, Metric, PatchSweep, logit_difference, patch_sweep
from tracekit.cli.opening import open_decoder, quiet_transformers
from tracekit.cli.output import clipped, save, say, say_json, shown, styled, table, width
from tracekit.cli.status import FINE, INTERRUPTED
from tracekit.errors import InputError
from tracekit.models.language import LanguageModel

_TOP = 10  # patches that are listed where there is no table


def run(options: Namespace) -> int:
    """Print the sweep; what is done of one that was interrupted, too."""
    with quiet_transformers():
        model = open_decoder(options)
        _check(model, options)
        right, wrong, told = _answers(model, options)
        metric = _metric(model, right, wrong)
        found = patch_sweep(
            model,
            options.clean,
            options.corrupted,
            metric,
            tuple(options.over.split(",")),
            activation=options.activation,
            direction=options.direction,
            progress=sys.stderr.isatty() and not options.json,
        )
    if options.html:
        save(found, options.html)
    if options.json:
        words = [model.to_single_str_token(each) for each in (right, wrong)]
        asked = {"model": options.model, "prompts": [options.clean, options.corrupted]}
        say_json({**asked, "right": words[0], "wrong": words[1], **found.to_json()})
    else:
        _tell(options, found, told)
    return FINE if found.is_complete else INTERRUPTED


def _check(model: LanguageModel, options: Namespace) -> None:
    """InputError, with both tokenisations side by side, for prompts of unequal length."""
    clean, corrupted = (model.to_str_tokens(text) for text in (options.clean, options.corrupted))
    if clean == corrupted:
        raise InputError("--clean and --corrupted are the same tokens: no patch changes anything.")
    if len(clean) == len(corrupted):
        return
    pairs = itertools.zip_longest(map(shown, map(str, clean)), map(shown, map(str, corrupted)))
    rows = [
        [str(index), one or "", other or "", "" if one == other else "differs"]
        for index, (one, other) in enumerate(pairs)
    ]
    lines = table([["", "clean", "corrupted"], *rows], right=[0])
    told = "\n".join(f"  {line}" for line in lines)
    raise InputError(
        f"a patch goes from a position to the same position, and the prompts have {len(clean)} and "
        f"{len(corrupted)} tokens:\n{told}\nGive prompts of as many tokens."
    )


def _answers(model: LanguageModel, options: Namespace) -> tuple[int, int, list[str]]:
    """The token that speaks for the clean prompt, the one against it, and how they were found."""
    told: list[str] = []

    def token(given: str | None, prompt: str, name: str) -> int:
        if given is not None:
            return model.to_single_token(given)
        with torch.no_grad():
            found = int(model.run_with_hooks(prompt)[0, -1].argmax())
        told.append(f"--{name} {shown(model.to_single_str_token(found))}")
        return found

    right = token(options.right, options.clean, "right")
    wrong = token(options.wrong, options.corrupted, "wrong")
    if right == wrong:
        word = shown(model.to_single_str_token(right))
        raise InputError(f"right and wrong are both {word}: give --right and --wrong that differ.")
    return right, wrong, told


def _metric(model: LanguageModel, right: int, wrong: int) -> Metric:
    """By how much the logit of one token is above that of another, named by their texts."""
    one, other = (shown(model.to_single_str_token(each)) for each in (right, wrong))
    return Metric(f"logit of {one} - {other}", logit_difference(model, right, wrong))


def _tell(options: Namespace, found: PatchSweep, told: Sequence[str]) -> None:
    into = "corrupted" if options.direction == "denoise" else "clean"
    of = "clean" if options.direction == "denoise" else "corrupted"
    if told:
        say(f"taken as {' and '.join(told)}, what the model says")
    say(f"{options.model}: {found.what} of the {of} run, written into the {into} run")
    say(f"{found.per_pair.what}: clean {found.clean:.3f}, corrupted {found.corrupted:.3f}\n")
    has_scale = found.base != found.other
    values = found.normalised() if has_scale else found.values
    if has_scale:
        say(f"0: as in the {into} run; 1: as in the {of} run\n")
    _tell_values(values)
    whole = f"{found.layer_tokens:,} layer-tokens of {found.naive_layer_tokens:,}"
    saved = f"{found.saved:.0%} saved" if found.saved >= 0 else "no fewer: there are few patches"
    say(f"\ncomputed {whole} ({saved}): {found.how}")
    say(f"{found.checked} drawn at random and computed whole: logits off by {found.deviation:.1e}")
    if not found.is_complete:
        say(f"interrupted: {int(found.done.sum())} of {found.done.numel()} patches are done")


def _tell_values(values: Labelled) -> None:
    """A table of two axes, the longer one downward; of more or fewer, the largest numbers."""
    if len(values.axes) != 2:
        rows = [[f"{cell.value:.3f}", *_place(values, cell.place)] for cell in values.top(_TOP)]
        head = ["", *values.names]
    else:
        down, across = values.axes
        numbers: Any = values.values
        if len(across.labels) > len(down.labels) or across.name == "position":
            down, across, numbers = across, down, numbers.T
        labels = [_label(across, at) for at in range(len(across.labels))]
        head = [down.name, f"{across.name} {labels[0]}", *labels[1:]]
        rows = [
            [_label(down, at), *(_short(each) for each in row)]
            for at, row in enumerate(numbers.tolist())
        ]
    lines = [clipped(line, width()) for line in table([head, *rows], right=range(1, len(head)))]
    say(styled(lines[0], "bold"))
    say("\n".join(lines[1:]))


def _short(value: float) -> str:
    """Two decimals, zero without a sign; nothing where nothing was computed."""
    if math.isnan(value):
        return ""
    text = f"{value:.2f}"
    return text.removeprefix("-") if float(text) == 0 else text


def _place(values: Labelled, place: Sequence[int]) -> list[str]:
    return [_label(axis, at) for axis, at in zip(values.axes, place, strict=True)]


def _label(axis: Axis, at: int) -> str:
    """A number, or a number with the token there."""
    label = axis.labels[at]
    return f"{at} {shown(label)}" if axis.name == "position" else label
