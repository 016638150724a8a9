"""Run a block beside a dry run: fake tensors, no weights, nothing computed."""

from __future__ import annotations

import sys
import traceback
from pathlib import Path
from typing import Any

from torch import nn

from tracekit.capture import user_traceback
from tracekit.core.dry import DryMode
from tracekit.core.offload import places_of
from tracekit.core.tree import Tree
from tracekit.core.twin import copied, twin
from tracekit.errors import DryRunError, UnsupportedError
from tracekit.models.generation import run

_NUMBERS = "making a tensor of others' numbers needs them, and a dry run has none"


def fake_twin(tree: Tree) -> Tree:
    """A twin of the model on fake tensors."""
    mode = DryMode()
    mode.places = places_of(tree.root)
    try:
        found = twin(tree, mode.fake_tensor, lambda _: True, has_weights=False)
    except UnsupportedError:
        raise
    except Exception as error:
        raise DryRunError(
            f"{type(tree.root).__name__} can't be run dry, as it can't be copied "
            f"({type(error).__name__}: {error}). Write trace() for scan(), on a small input."
        ) from error
    found.mode = mode
    return found


def run_dry(tree: Tree, _: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """One forward pass of a twin, on fakes of the arguments."""
    mode = tree.mode
    assert isinstance(mode, DryMode)
    given = copied((args, kwargs), mode.fake_tensor)  # a kv_cache that is handed in is filled
    try:
        return run(tree, *given)
    except (DryRunError, RuntimeError) as error:
        is_numberless = isinstance(error, DryRunError) or "data is not allocated" in str(error)
        if not is_numberless:
            raise
        what = error.args[0].partition(": ")[0] if isinstance(error, DryRunError) else _NUMBERS
        why = f"at {_place(error)} {what}"
    raise DryRunError(
        f"{type(tree.root).__name__} can't be run dry: {why}. Write trace() for scan(), on a small "
        f"input."
    )


def place_of(error: BaseException, module: nn.Module) -> str | None:
    """The line of the model's code at which `error` came; None if it came elsewhere."""
    files = {
        getattr(sys.modules.get(type(each).__module__), "__file__", None)
        for each in module.modules()
    }
    frame = traceback.extract_tb(user_traceback(error))[-1]
    is_own = frame.filename in files or "/transformers/" in frame.filename
    return _place(error) if is_own else None


def _place(error: BaseException) -> str:
    """The line of the model's code at which `error` came, in words."""
    frame = traceback.extract_tb(user_traceback(error))[-1]
    return f"{Path(frame.filename).name}:{frame.lineno} (`{frame.line}`)"
