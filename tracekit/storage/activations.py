"""Activations on disk: shards as one long table, read by site and by rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast, final

import torch
from torch import Tensor

from tracekit.errors import InputError, StorageError, UnknownPathError, did_you_mean
from tracekit.storage.batches import Batches
from tracekit.storage.saelens import to_saelens
from tracekit.storage.shards import COLUMNS, Shard, column_of


@final
class Rows:
    """One column of the table, on the disk: `rows[10:20]`, `rows[[3, 17]]` are tensors `[n, …]`."""

    def __init__(self, shards: Sequence[Shard], name: str) -> None:
        self._shards = shards
        self._name = name
        self._ends = torch.tensor([len(shard) for shard in shards]).cumsum(0)

    def __len__(self) -> int:
        return int(self._ends[-1])

    @property
    def shape(self) -> torch.Size:
        """`[rows, …]`."""
        return torch.Size([len(self), *self._look.shape[1:]])

    @property
    def dtype(self) -> torch.dtype:
        """That of the values on the disk."""
        return self._look.dtype

    @property
    def _look(self) -> Tensor:
        return self._shards[0].file.look(self._name)

    def __getitem__(self, index: int | slice | Sequence[int] | Tensor) -> Tensor:
        """The row of a number; a tensor of the rows of a slice, of numbers or of a mask."""
        if isinstance(index, int):
            return self._at(torch.tensor([index]))[0]
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            return self._between(start, stop) if step == 1 else self[range(start, stop, step)]
        found = torch.as_tensor(index)
        if found.dtype == torch.bool:
            if found.shape != (len(self),):
                raise IndexError(f"a mask {list(found.shape)} for {len(self)} rows.")
            found = found.nonzero()[:, 0]
        return self._at(found.long())

    def _between(self, start: int, stop: int) -> Tensor:
        parts: list[Tensor] = []
        begin = 0
        for shard in self._shards:
            own = slice(max(start - begin, 0), max(stop - begin, 0))
            if start < begin + len(shard) and stop > begin:
                parts.append(shard.file.rows(self._name, own))
            begin += len(shard)
        return torch.cat(parts) if parts else self._look[:0].clone()

    def _at(self, index: Tensor) -> Tensor:
        """The rows of these numbers `[n]`, which may count from the end."""
        outside = (index < -len(self)) | (index >= len(self))
        if outside.any():
            raise IndexError(f"row {int(index[outside][0])} of {len(self)}.")
        index = index % len(self)
        where = torch.searchsorted(self._ends, index, right=True)
        found = torch.empty(len(index), *self.shape[1:], dtype=self.dtype)
        for number in where.unique().tolist():
            mine = where == number
            begin = int(self._ends[number]) - len(self._shards[number])
            found[mine] = self._shards[number].file.rows(self._name, index[mine] - begin)
        return found

    def __repr__(self) -> str:
        return f"Rows({self._name}: {list(self.shape)}, {self.dtype})"


@final
class Activations(Mapping[str, Rows]):
    """Activations of a model at some sites, on the disk: a row for each token that was kept.

    `acts["layers.3.resid_post"]` are the rows of a site; `.tokens`, `.doc`, `.pos` and `.step`,
    each `[rows]`, say whose they are: the token, the number of its document in the data set, its
    position in the context that the model saw, and the step of a generation (0 is the prompt).
    Nothing is read before it is asked for, and what is read is proved by its checksum.
    """

    def __init__(self, path: Path, shards: Sequence[Shard]) -> None:
        self.path = path
        self._shards = shards

    @property
    def sites(self) -> list[str]:
        """The names of all sites, in the order of the model."""
        return self._shards[0].sites

    @property
    def spec(self) -> Mapping[str, Any]:
        """What they are of: the model and its weights, the sites, how text became tokens."""
        return self._shards[0].told.spec

    @property
    def counts(self) -> Mapping[str, int]:
        """What was seen, dropped and changed on the way, of all shards together."""
        return dict(sum((Counter(shard.told.counts) for shard in self._shards), Counter[str]()))

    @property
    def rows(self) -> int:
        """How many rows there are."""
        return sum(map(len, self._shards))

    @property
    def tokens(self) -> Rows:
        """The token of each row."""
        return Rows(self._shards, "tokens")

    @property
    def doc(self) -> Rows:
        """The number of its document in the data set."""
        return Rows(self._shards, "doc")

    @property
    def pos(self) -> Rows:
        """Its position in the context that the model saw."""
        return Rows(self._shards, "pos")

    @property
    def step(self) -> Rows:
        """0 for a prompt, k for what came of the k-th new token."""
        return Rows(self._shards, "step")

    def __getitem__(self, site: str) -> Rows:
        """The rows of a site, by its name."""
        if site not in self.sites:
            raise UnknownPathError(
                f"there are no activations of {site!r} in {str(self.path)!r}"
                f"{did_you_mean(site, self.sites)} (there: {', '.join(self.sites[:8])})"
            )
        return Rows(self._shards, column_of(site))

    def __iter__(self) -> Iterator[str]:
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)

    def batches(
        self,
        size: int,
        *,
        site: str | Sequence[str] | None = None,
        shuffle: int | None = None,
        epochs: int | None = 1,
        drop_last: bool = False,
        buffer_rows: int = 1 << 18,
    ) -> Batches:
        """Batches `[size, …]` of the rows of a site, for whoever trains on them.

        Of several sites a mapping by name. `shuffle` is a seed, and the order is the same whenever
        the seed is; None is the order of the files. What fits into `buffer_rows` is shuffled as a
        whole; of more, runs of neighbouring rows from everywhere are mixed in a buffer of that
        size. Each of the `epochs` (None: without end) is shuffled anew.
        """
        names = [site] if isinstance(site, str) else list(self.sites if site is None else site)
        if size < 1 or not names:
            raise InputError(f"batches(size={size}) of {names}: at least one row, of one site.")
        columns = {name: self[name] for name in names}
        is_one = len(names) == 1 and not isinstance(site, (list, tuple))
        return Batches(columns, size, shuffle, epochs, drop_last, buffer_rows, is_one)

    def to_saelens(
        self, path: str | Path, *, site: str | None = None, drop_short: bool = False
    ) -> Any:
        """Write what SAELens reads as `cached_activations_path`; the data set of it.

        A row for each context: `{hook_name: [context, width], "token_ids": [context]}`, under
        TransformerLens' name of the site. All contexts must be of one length, with every position
        kept: harvest with `pack=True`. The shorter one at the end of each shard is an error, or
        left out with `drop_short=True`, and a warning says how many were. bfloat16, which Arrow
        does not have, becomes float32. Needs the extra `tracekit[datasets]`.
        """
        return to_saelens(self, path, site, drop_short)

    def check(self) -> None:
        """Read and prove everything; StorageError names the first file that is damaged."""
        for shard in self._shards:
            for name in shard.file:
                shard.file.all(name)

    def __repr__(self) -> str:
        sites = ", ".join(self.sites[:3]) + (" …" if len(self.sites) > 3 else "")
        size = sum(shard.path.stat().st_size for shard in self._shards) / 1e6
        counts = [f"{count:,} {name}" for name, count in self.counts.items() if name not in _SEEN]
        told = ", ".join(
            [
                f"{self.rows:,} rows of {len(self.sites)} sites ({sites})",
                f"{len(self._shards)} shards",
                f"{size:,.1f} MB",
                *counts,
            ]
        )
        return f"Activations({str(self.path)!r}: {told})"


_SEEN = frozenset({"documents", "contexts", "tokens", "rows"})


def load_activations(path: str | Path, *, partial: bool = False) -> Activations:
    """The activations that a harvest wrote into the directory `path`; nothing is read yet.

    StorageError for shards that are damaged, or of different harvests, and for a harvest that is
    not finished, unless `partial=True`.
    """
    folder = Path(path)
    shards = [Shard(file) for file in sorted(folder.glob("shard-*.safetensors"))]
    if not shards:
        raise StorageError(f"there are no activations in {str(path)!r}: no shard-*.safetensors.")
    _check_are_of_one(shards)
    missing = sorted(
        set(range(max(shard.told.shards for shard in shards)))
        - {shard.told.shard for shard in shards}
    )
    if missing and not partial:
        raise StorageError(
            f"the harvest in {str(path)!r} is not finished: of "
            f"{len(shards) + len(missing)} shards {len(missing)} are missing "
            f"({', '.join(map(str, missing[:5]))}{' …' if len(missing) > 5 else ''}). Run it again "
            f"to make the rest, or load what there is with partial=True."
        )
    return Activations(folder, shards)


def _check_are_of_one(shards: Sequence[Shard]) -> None:
    first = shards[0]
    for shard in shards[1:]:
        differing = differences(first.told.spec, shard.told.spec)
        if differing:
            raise StorageError(
                f"{str(shard.path)!r} is of another harvest than {first.path.name}: "
                f"{', '.join(differing)} differ. Keep each in a directory of its own."
            )
    for shard in shards:
        if set(shard.file) != {*COLUMNS, *map(column_of, shard.sites)}:
            raise StorageError(
                f"{str(shard.path)!r} has not the columns that it says: {', '.join(shard.file)}."
            )


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """The names of what differs, as "model.weights"."""
    found: list[str] = []
    for name in sorted({*one, *other}):
        a, b = one.get(name), other.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            inner = differences(cast("dict[str, Any]", a), cast("dict[str, Any]", b))
            found += [f"{name}.{each}" for each in inner]
        elif a != b:
            found.append(name)
    return found
