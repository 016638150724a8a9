"""A shard of activations: a table with a row for each token, and what it was made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, final

from torch import Tensor

from tracekit.core.files import TensorFile, write_tensors
from tracekit.errors import StorageError

FORMAT: Final = "tracekit activations 1"
COLUMNS: Final = ("tokens", "doc", "pos", "step")  # [rows], int32
_ACTS: Final = "acts/"


@final
@dataclass(frozen=True)
class Told:
    """What a shard says of itself.

    `spec` is what its activations are of (model, sites, tokens, …), `fingerprint` the digest of
    that and of its documents. `shards` is how many there were to be, `counts` what was seen,
    dropped and changed on the way.
    """

    fingerprint: str
    spec: Mapping[str, Any]
    shard: int
    shards: int
    first_doc: int
    counts: Mapping[str, int]


@final
class Shard:
    """A shard on the disk, read lazily."""

    def __init__(self, path: Path) -> None:
        """StorageError if it can't be read as one."""
        self.file = TensorFile(path, FORMAT)
        told = {name: self.file.described[name] for name in Told.__dataclass_fields__}
        self.told = Told(**told)
        if path.name != name_of(self.told.shard):
            raise StorageError(
                f"{str(path)!r} is shard {self.told.shard} of its harvest, under the name of "
                f"another: rename it {name_of(self.told.shard)}, or delete it."
            )
        self.path = path

    @property
    def sites(self) -> list[str]:
        """Of which there are activations, in the order of the model."""
        return list(self.told.spec["sites"])

    def __len__(self) -> int:
        return len(self.file.look("tokens"))


def name_of(shard: int) -> str:
    """The name of the file."""
    return f"shard-{shard:05d}.safetensors"


def column_of(site: str) -> str:
    """What the activations of a site are called in a shard."""
    return _ACTS + site


def write_shard(
    path: Path, acts: Mapping[str, Tensor], columns: Mapping[str, Tensor], told: Told
) -> None:
    """Write a shard: `acts` `[rows, …]` by site, and the columns `[rows]`."""
    tensors = {**columns, **{column_of(site): tensor for site, tensor in acts.items()}}
    write_tensors(path, tensors, {"format": FORMAT, **asdict(told)})
