"""A language model as bytes, for a process that has none: module, tokenizer and lasting edits."""

# It travels by value and not by its name: weights that were changed since it was loaded travel too,
# and no worker needs to reach the Hub.

# pyright: reportPrivateUsage=false

from __future__ import annotations

import io
import tempfile
from pathlib import Path
from typing import Any

import cloudpickle
import torch

from tracekit.errors import UnsupportedError
from tracekit.models.language import LanguageModel

_ALONE = "Run the script under torchrun instead, or as an array job with shards='1/8': each process then loads the model itself."  # fmt: skip  # noqa: E501


def packed(model: LanguageModel) -> bytes:
    """The model as bytes; UnsupportedError for what would not be the same elsewhere."""
    model.dispatch()
    _check_can_travel(model)
    renames = model._tree.renames
    kept = {
        "module": model.module,
        "tokenizer": model.tokenizer,
        "padding_side": model._padding_side,
        "name": model._tree.name,
        "rename": None if renames is None else renames._rename,
        "edits": _edits(model),
    }
    buffer = io.BytesIO()
    try:
        torch.save(kept, buffer, pickle_module=cloudpickle)
    except Exception as error:
        raise UnsupportedError(
            f"the {type(model.module).__name__} can't be sent to a worker: {type(error).__name__}: "
            f"{error}. What is on it (hooks, attributes) must be picklable. {_ALONE}"
        ) from error
    return buffer.getvalue()


def unpacked(parcel: Any, device: str) -> LanguageModel:
    """The model of `packed`, with its weights on `device`."""
    kept = torch.load(io.BytesIO(parcel), map_location=device, weights_only=False)
    edits = kept.pop("edits")
    model = LanguageModel(kept.pop("module"), **kept)
    if edits is not None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "edits.safetensors"
            path.write_bytes(edits)
            model.edits.load(path)
    return model


def _check_can_travel(model: LanguageModel) -> None:
    if any(each.is_on for each in model._functions):
        raise UnsupportedError(
            "functions (model.hooks, add_hook) don't travel to workers: make them model.edit() "
            "blocks, which do."
        )
    weights = [*model.module.parameters(), *model.module.buffers()]
    devices = sorted({str(weight.device) for weight in weights})
    if len(devices) > 1 or devices == ["meta"]:
        raise UnsupportedError(
            f"a model whose weights are on {', '.join(devices)} can't be sent to a worker. {_ALONE}"
        )
    if any(type(weight).__name__ == "DTensor" for weight in weights):
        raise UnsupportedError("a model that is divided among ranks can't be sent to a worker.")


def _edits(model: LanguageModel) -> bytes | None:
    if not len(model.edits):
        return None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "edits.safetensors"
        model.edits.save(path)
        return path.read_bytes()
