"""What a harvest is of, as plain data: two with the same specification are the same."""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import safe_open
from torch import Tensor

from tracekit.core.fingerprint import fingerprint
from tracekit.errors import UnsupportedError
from tracekit.models.language import LanguageModel

_VOLATILE: Final = ("_name_or_path", "transformers_version", "_commit_hash")
_OF_A_CALL: Final = {"padding": None, "truncation": None}  # kept from a tokenizer's last call


def model_told(model: LanguageModel, note: str) -> dict[str, Any]:
    """The model: its class, configuration, weights, lasting edits, and what its user says of it."""
    config: Any = model.module.config
    settings = {key: each for key, each in config.to_dict().items() if key not in _VOLATILE}
    return {
        "class": type(model.module).__name__,
        "config": digest(settings),
        "weights": fingerprint(model.module),
        "revision": getattr(config, "_commit_hash", None),
        "edits": _edits_told(model, note),
        "note": note,
    }


def tokenizer_told(model: LanguageModel) -> str | None:
    """The tokenizer, as a digest of all its rules."""
    tokenizer: Any = model.tokenizer
    if tokenizer is None:
        return None
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return digest([type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())])
    rules = {**json.loads(backend.to_str()), **_OF_A_CALL}
    return digest([type(tokenizer).__name__, rules])


def digest(value: Any) -> str:
    """A short digest of plain data."""
    told = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(told.encode()).hexdigest()[:32]


def fingerprint_of(spec: Mapping[str, Any], first_doc: int, documents: str) -> str:
    """Tells a shard from all others: by what the harvest is of, and by its documents."""
    return digest([spec, first_doc, documents])


def _edits_told(model: LanguageModel, note: str) -> str | None:
    if any(each.is_on for each in model._functions) and not note:
        raise UnsupportedError(
            "functions (model.hooks, add_hook) change what is harvested, and can't be told from "
            "others when it is resumed: make them model.edit() blocks, or say with note= what they "
            "do."
        )
    if not len(model.edits):
        return None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "edits.safetensors"
        model.edits.save(path)
        return _digest_of_edits(path)


def _digest_of_edits(path: Path) -> str:
    """What edits do; not the lines at which they stand, which move, or are those of a file."""
    with safe_open(path, framework="pt") as file:
        told: Any = json.loads(next(iter((file.metadata() or {}).values())))
        names: list[str] = sorted(file.keys())
        tensors = [_bytes_of(file.get_tensor(name)) for name in names]
    for edit in told["edits"]:
        del edit["file"], edit["line"]
    return digest([told, [hashlib.sha256(each).hexdigest() for each in tensors]])


def _bytes_of(tensor: Tensor) -> bytes:
    described = f"{tensor.dtype} {list(tensor.shape)} ".encode()
    return described + tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
