"""A data set as numbered documents, each a text or a row of tokens, read when asked for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Final, TypeAlias, cast, final

import torch
from torch import Tensor

from tracekit.errors import InputError

Document: TypeAlias = str | list[int]
_COLUMNS: Final = ("text", "input_ids", "tokens")  # looked for in this order


@final
class Documents:
    """The documents of a data set; `documents.between(10, 20)` reads ten of them."""

    def __init__(self, dataset: Any, column: str | None = None, limit: int | None = None) -> None:
        """InputError for what is no data set."""
        self._column = column
        self._rows: Any = _opened(dataset, limit)
        count = len(self._rows)
        self._count = count if limit is None else min(limit, count)

    def __len__(self) -> int:
        return self._count

    def between(self, start: int, stop: int) -> list[Document]:
        """The documents `start` to `stop`, without it."""
        rows = self._rows[start : min(stop, self._count)]
        if isinstance(rows, dict):  # a slice of a Hugging Face data set: its columns
            columns = cast("dict[str, Any]", rows)
            rows = columns[_column(columns, self._column)]
        return [self._document(row, start + place) for place, row in enumerate(rows)]

    def _document(self, row: Any, number: int) -> Document:
        if isinstance(row, dict):
            fields = cast("dict[str, Any]", row)
            row = fields[_column(fields, self._column)]
        if isinstance(row, str):
            return row
        tokens = row.tolist() if isinstance(row, Tensor) else row
        if isinstance(tokens, (list, tuple)) and all(isinstance(each, int) for each in tokens):
            return list(cast("Sequence[int]", tokens))
        raise InputError(
            f"document {number} is {type(row).__name__}, and not a text or a row of token numbers."
        )


def digest_of(documents: Iterable[Document]) -> str:
    """Tells these documents, in this order, from all others."""
    found = hashlib.sha256()
    for document in documents:
        content = document if isinstance(document, str) else json.dumps(document)
        encoded = content.encode("utf-8", "surrogatepass")
        found.update(f"{type(document).__name__} {len(encoded)} ".encode() + encoded)
    return found.hexdigest()


def _opened(dataset: Any, limit: int | None) -> Any:
    """What can be counted, and cut into slices."""
    if isinstance(dataset, (str, Path)):
        return _lines([Path(dataset)])
    if isinstance(dataset, Tensor):
        if dataset.dim() != 2 or dataset.is_floating_point():
            raise InputError(f"tokens are [documents, tokens]; these are {list(dataset.shape)}.")
        return dataset.cpu().to(torch.int64)
    if isinstance(dataset, (list, tuple)):
        rows = list(cast("Sequence[Any]", dataset))
        return _lines(rows) if rows and all(isinstance(row, Path) for row in rows) else rows
    if hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__"):
        return dataset
    if isinstance(dataset, Iterable) and limit is not None:
        return list(islice(cast("Iterable[Any]", dataset), limit))
    kind = type(dataset).__name__
    if isinstance(dataset, Iterable):
        raise InputError(
            f"a {kind} does not tell how many documents it has: give limit=, and so many are taken."
        )
    raise InputError(
        f"a data set is a list of texts or of tokens, a file of texts, or a Hugging Face data set, "
        f"not {kind}."
    )


def _lines(paths: Sequence[Path]) -> list[Any]:
    """The documents of text files, a line each; of a .jsonl file a row each."""
    found: list[Any] = []
    for path in paths:
        if not path.is_file():
            raise InputError(
                f"there is no file {str(path)!r}: a data set is a list of texts, a file with one "
                f"in each line (.txt, .jsonl), or a Hugging Face data set."
            )
        lines = [line for line in path.read_text("utf-8").split("\n") if line.strip()]
        found += [json.loads(line) for line in lines] if path.suffix == ".jsonl" else lines
    return found


def _column(fields: dict[str, Any], asked: str | None) -> str:
    for name in _COLUMNS if asked is None else (asked,):
        if name in fields:
            return name
    raise InputError(
        f"the data set has the columns {', '.join(fields)}: name the one with the texts, column=."
    )
