"""What a harvest is of, as plain data: two with the same specification are the same."""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from tracekit.core.fingerprint import fingerprint
from tracekit.errors import UnsupportedError
from tracekit.models.language import LanguageModel

_VOLATILE: Final = ("_name_or_path", "transformers_version", "_commit_hash")


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
    rules = backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items())
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
        return hashlib.sha256(path.read_bytes()).hexdigest()[:32]
