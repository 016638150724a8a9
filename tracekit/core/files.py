"""A file of tensors: there whole or not at all, read lazily, and its damage is named."""

# A file of safetensors. In its metadata, under "tracekit", stands one text: the checksum of the
# JSON behind it, a space, and that JSON, which has the checksums of all tensors by blocks of rows.
# So a few rows are read, and proved, without the others.

from __future__ import annotations

import json
import os
import shutil
import socket
import zlib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, cast, final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tracekit.errors import StorageError

_KEY: Final = "tracekit"
_BLOCK: Final = 1 << 16  # bytes that one checksum is of, or one row if that has more


# -- write ----------------------------------------------------------------------------------------


def write_tensors(path: Path, tensors: Mapping[str, Tensor], described: Mapping[str, Any]) -> None:
    """Write tensors, and JSON that describes them; the same bytes whenever it is the same.

    `path` is what it was, or all of the new file, also if the machine goes down meanwhile.
    """
    own = _apart({name: tensor.detach().cpu() for name, tensor in tensors.items()})
    checks = {name: _checks(tensor) for name, tensor in own.items()}
    told = json.dumps({**described, "tensors": checks}, sort_keys=True)
    part = _part_of(path)
    try:
        part.mkdir(exist_ok=True)
        file = part / path.name
        file.touch()
        mode = file.stat().st_mode  # as the user's umask has it; safetensors has its own idea
        save_file(own, file, {_KEY: f"{zlib.crc32(told.encode()):08x} {told}"})
        file.chmod(mode)
        flush(file)
        file.replace(path)
        flush(path.parent)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def remove_parts(path: Path) -> None:
    """Remove what processes that were killed while they wrote `path` have left."""
    for part in path.parent.glob(f".{path.name}.*.part"):
        shutil.rmtree(part, ignore_errors=True)
        if not part.is_dir():
            part.unlink(missing_ok=True)


def remove_empty_parts(folder: Path) -> None:
    """Remove what processes have left that were killed when their file had its name already."""
    end = ".safetensors"
    for part in folder.glob(f".*{end}.*.part"):
        if (folder / (part.name[1:].partition(f"{end}.")[0] + end)).exists():  # else begun just now
            with suppress(OSError):  # a file is in it: somebody writes it, or did not end
                part.rmdir()


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """These tensors without gaps, each in memory of its own, as safetensors wants them."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        whole = tensor.contiguous()
        memory = whole.untyped_storage().data_ptr()
        found[name] = whole.clone() if memory in seen else whole
        seen.add(memory)
    return found


def _part_of(path: Path) -> Path:
    """A directory: safetensors writes beside its file, under a name that it draws."""
    return path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}.part")


def flush(path: Path) -> None:
    """Let what was written come to the disk: the content of a file, or the names in a directory."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def _checks(tensor: Tensor) -> dict[str, Any]:
    rows = _rows_of_block(tensor)
    sums = [f"{_sum(part):08x}" for part in _blocks(tensor, rows)]
    return {
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "shape": list(tensor.shape),
        "rows": rows,
        "crc32": "".join(sums),
    }


def _rows_of_block(tensor: Tensor) -> int:
    bytes_of_row = tensor.nbytes // len(tensor) if tensor.dim() and len(tensor) else 1
    return max(1, _BLOCK // max(1, bytes_of_row))


def _blocks(tensor: Tensor, rows: int) -> Iterator[Tensor]:
    if tensor.dim() == 0:
        yield tensor
    else:
        yield from (tensor[start : start + rows] for start in range(0, len(tensor), rows))


def _sum(part: Tensor) -> int:
    flat = part.contiguous().as_strided((part.numel(),), (1,))  # a single number may have any
    return zlib.crc32(cast("Any", flat.view(torch.uint8).numpy())) if len(flat) else 0


# -- read -----------------------------------------------------------------------------------------


@final
class TensorFile:
    """What `write_tensors` wrote: `described`, and tensors by name, each read when asked for."""

    def __init__(self, path: Path, format: str) -> None:
        """StorageError if it is no such file, of this format, or it is damaged."""
        self.path = path
        try:
            with safe_open(path, framework="pt") as file:
                self.described = _described(file.metadata() or {}, path, format)
                self._tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        except (OSError, SafetensorError) as error:
            raise StorageError(f"{str(path)!r} can't be read: {_why(error, path)}.") from error
        self._checks = cast("dict[str, Any]", self.described.pop("tensors"))
        for name, tensor in self._tensors.items():
            self._check_shape(name, tensor)
        self._sound: dict[str, set[int]] = {name: set() for name in self._tensors}

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._checks)

    def look(self, name: str) -> Tensor:
        """The tensor as it lies in the file, for its shape and dtype; its values are not proved."""
        return self._tensors[name]

    def all(self, name: str) -> Tensor:
        """The whole tensor, proved; in memory of its own."""
        tensor = self._tensors[name]
        count = len(self._checks[name]["crc32"]) // 8
        self._prove(name, range(count))
        return tensor.clone()

    def rows(self, name: str, index: slice | Tensor) -> Tensor:
        """Some rows, proved, in memory of their own: `[rows, …]`. A slice without a step."""
        tensor, size = self._tensors[name], self._checks[name]["rows"]
        if isinstance(index, slice):
            start, stop, _ = index.indices(len(tensor))
            self._prove(name, range(start // size, -(-max(start, stop) // size)))
            return tensor[start:stop].clone()
        self._prove(name, (index // size).unique().tolist())
        return tensor[index]

    def _prove(self, name: str, blocks: range | list[int]) -> None:
        """StorageError if one of these blocks is not what was written; each is tried once."""
        sound, checks, tensor = self._sound[name], self._checks[name], self._tensors[name]
        size, sums = checks["rows"], checks["crc32"]
        for block in blocks:
            if block in sound:
                continue
            part = tensor[block * size : (block + 1) * size] if tensor.dim() else tensor
            if f"{_sum(part):08x}" != sums[8 * block : 8 * block + 8]:
                rows = f" in rows {block * size} to {min((block + 1) * size, len(tensor)) - 1}"
                raise StorageError(
                    f"{str(self.path)!r} is damaged: {name}{rows if tensor.dim() else ''} is not "
                    f"what was written there. Delete the file, and make it again."
                )
            sound.add(block)

    def _check_shape(self, name: str, tensor: Tensor) -> None:
        told = self._checks.get(name, {})
        dtype = str(tensor.dtype).removeprefix("torch.")
        if told.get("dtype") != dtype or told.get("shape") != list(tensor.shape):
            raise StorageError(
                f"{str(self.path)!r} is damaged: {name} is {dtype}{list(tensor.shape)} there, "
                f"and {told.get('dtype')}{told.get('shape')} was written."
            )


def _described(metadata: Mapping[str, str], path: Path, format: str) -> dict[str, Any]:
    crc, _, told = metadata.get(_KEY, "").partition(" ")
    if not told:
        raise StorageError(f"{str(path)!r} is a file of safetensors that tracekit did not write.")
    if f"{zlib.crc32(told.encode()):08x}" != crc:
        raise StorageError(
            f"{str(path)!r} is damaged: what it says of its tensors is not what was written. "
            f"Delete the file, and make it again."
        )
    described = cast("dict[str, Any]", json.loads(told))
    if described.get("format") != format:
        raise StorageError(
            f"{str(path)!r} holds {described.get('format')!r}, and {format!r} was looked for."
        )
    return described


def _why(error: Exception, path: Path) -> str:
    if isinstance(error, OSError):
        return error.strerror or str(error)
    return (
        f"it is cut short, or no file of safetensors ({path.stat().st_size} bytes; {error}). "
        f"Delete it, and make it again"
    )
