"""Experiments on a block beside a forward pass: turns, order, names, errors, torch's state."""

from __future__ import annotations

import itertools
import tempfile
import traceback
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import torch

from tracekit.cli.guards.experiment import (
    PROMPT,
    Experiment,
    check,
    first_of,
    logits_by_hand,
)
from tracekit.models.language import LanguageModel

_USERS_CODE: Final = """\
def fail(model):
    with model.trace("The Eiffel Tower is in"):
        hidden = model.transformer.h[1].hidden
        hidden.no_such_thing
"""


def _takes_turns(model: LanguageModel) -> str:
    """What the model and a live block do, told by hooks and by the block, comes in turns."""
    told: list[str] = []
    blocks = model.transformer.h
    with ExitStack() as hooks:
        for index, block in enumerate(blocks):
            handle = block.module.register_forward_pre_hook(_telling(told, f"model {index}"))
            hooks.callback(handle.remove)
        with model.trace(PROMPT):
            for index, block in enumerate(blocks):
                if bool(block.hidden.isfinite().all()):  # a look at numbers: the block is live
                    told.append(f"block {index}")
    wanted = [f"{who} {index}" for index in range(len(blocks)) for who in ("model", "block")]
    check(told == wanted, f"the order was {', '.join(told)}")
    return ""


def _telling(told: list[str], what: str) -> Any:
    return lambda *_: told.append(what)


def _reads_see_writes(model: LanguageModel) -> str:
    """Two writes, a read between and a read behind them, a cache; and the same by a plain hook."""
    place = model.transformer.h[1]
    with model.trace(PROMPT) as tracer:
        cache = tracer.cache(modules=[place])
        place.hidden[:, -1] += 1
        between = place.hidden.clone()
        place.hidden = place.hidden * 2
        behind = place.hidden.clone()
        logits = model.lm_head.output
    hook = place.module.register_forward_hook(_grow_and_double)
    try:
        by_hand = logits_by_hand(model)
    finally:
        hook.remove()
    check(torch.equal(between * 2, behind), "a read did not see the write before it")
    check(torch.equal(cache[place.path].hidden, behind), "the cache has not the final value")
    check(torch.equal(logits, by_hand), "the model did not go on with what was written")
    return ""


def _grow_and_double(_module: Any, _args: Any, output: Any) -> Any:
    value = first_of(output)
    value[:, -1] += 1
    return (value * 2, *output[1:]) if isinstance(output, tuple) else value * 2


def _names_are_bound(model: LanguageModel) -> str:
    counts: list[int] = []

    def grow() -> int:
        nonlocal counts
        counts = [*counts, 1]
        return len(counts)

    with model.trace(PROMPT):
        hidden = model.transformer.h[0].hidden
        calls = grow()
        first, *_, last = hidden[0]
    check(calls == len(counts) == 1, f"a closure was called {len(counts)} times")
    check(torch.equal(hidden[0, 0], first) and torch.equal(hidden[0, -1], last), "names differ")
    return ""


def _errors_are_the_users(model: LanguageModel) -> str:
    """Code of a user, in a file, fails in its block: whose lines does the error show?"""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "users_code.py"
        path.write_text(_USERS_CODE, "utf-8")
        names: dict[str, Any] = {}
        exec(compile(_USERS_CODE, str(path), "exec"), names)
        try:
            names["fail"](model)
        except AttributeError as error:
            entries = traceback.extract_tb(error.__traceback__)
            strange = {each.filename for each in entries} - {str(path), __file__}
            lines = [each.line for each in entries if each.filename == str(path)]
        else:
            strange, lines = set[str](), list[str | None]()
    check(bool(lines), "the error did not come")
    check(not strange, f"lines of {', '.join(sorted(strange))} are in the traceback")
    check(lines[-1] == "hidden.no_such_thing", f"the last line was {lines[-1]!r}")
    return ""


def _sees_torchs_state(model: LanguageModel) -> str:
    kind = torch.device(model.device or "cpu").type
    for wanted in itertools.product((True, False), repeat=2):
        grad, cast = wanted
        with (
            torch.set_grad_enabled(grad),
            torch.autocast(kind, torch.bfloat16, enabled=cast),
            model.trace(PROMPT),
        ):
            is_live = bool(model.transformer.h[0].hidden.isfinite().all())
            seen = (torch.is_grad_enabled(), torch.is_autocast_enabled(kind))
        check(is_live and seen == wanted, f"gradients, autocast: {seen}, not {wanted}")
    return ""


BESIDE: Final = (
    Experiment("G1", "model and block take turns, one at a time", _takes_turns),
    Experiment(
        "G2", "a read sees the writes before it, a cache and the model the last", _reads_see_writes
    ),
    Experiment("G5", "what a block binds is bound after it, closures too", _names_are_bound),
    Experiment("G6", "an error in a block shows the user's lines alone", _errors_are_the_users),
    Experiment("G8", "a block sees gradient mode and autocast of its place", _sees_torchs_state),
)
