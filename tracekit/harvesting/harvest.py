"""A harvest: activations of a data set, shard by shard, whoever makes which."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Final, final

import torch
from torch import Tensor

from tracekit.core.files import remove_empty_parts, remove_parts
from tracekit.errors import InputError, StorageError
from tracekit.harvesting.capture import Capture, Positions, kept_of
from tracekit.harvesting.contexts import Context, Reading
from tracekit.harvesting.documents import Document, Documents, digest_of
from tracekit.harvesting.progress import Progress
from tracekit.harvesting.sites import sites_of
from tracekit.harvesting.spec import fingerprint_of, model_told, tokenizer_told
from tracekit.harvesting.writing import Writer
from tracekit.models.language import LanguageModel
from tracekit.models.padding import context_length
from tracekit.storage.activations import differences
from tracekit.storage.shards import Shard, Told, name_of, write_shard
from tracekit.tracing.wanted import Names

_CONTEXT: Final = 1024  # tokens, where a model has room for more or knows no bound
_SAMPLE: Final = 64  # documents that tell how long they are
_SHARD: Final = 64 << 20  # bytes of a shard, about


@final
@dataclass(frozen=True)
class Plan:
    """What there is to do: how many shards there are, and which are done."""

    out: Path
    documents: int
    documents_of_shard: int
    shards: int
    done: tuple[int, ...]

    @property
    def left(self) -> tuple[int, ...]:
        """The shards that are still to be made."""
        return tuple(sorted({*range(self.shards)}.difference(self.done)))

    def __repr__(self) -> str:
        return (
            f"Plan({str(self.out)!r}: {self.documents:,} documents in {self.shards} shards of "
            f"{self.documents_of_shard}; {len(self.done)} done, {len(self.left)} left)"
        )


@final
class Harvest:
    """The activations of a data set at some sites, to be written into a directory.

    The unit is a shard, of documents that lie side by side: `plan()` says which there are,
    `run_shard(i)` makes one, and one is done when its file is there with the same fingerprint (of
    the model and its weights, edits, sites, dtype, tokens, and documents). So several processes may
    share the shards of one directory, and a harvest that was killed goes on where it was.

    What a site gives for each token becomes a row: `[rows, width]` of a residual stream,
    `[rows, heads, width of a head]` of `z`. Beside it stand the token, the number of its document
    and its position. The model runs without gradients, up to the last layer that is needed.

    `dataset`: texts, rows of token numbers, tokens `[documents, tokens]`, a file or several with a
    document in each line (.txt, .jsonl), a Hugging Face data set (its `column`: "text",
    "input_ids" or "tokens" where none is named), or whatever can be gone through, with a `limit` of
    documents. `sites`: names ("resid_post", "layers.3.mlp_out"), patterns, or a list of them, as
    `names_filter` of `run_with_cache` takes; they must have a value for each token.

    The model reads `context_size` tokens at once (None: what it has room for, 1024 at most), in
    batches of `batch_size`. A longer document goes on in a further context, which does not see the
    one before. `pack=True` fills contexts with documents one behind the other, parted by the
    end-of-sequence token; else each has contexts of its own, padded, and padding is never kept.
    `prepend_bos`: None, as the tokenizer does.

    Kept are all `positions` of a context; "last", a number, a slice or numbers choose, and only
    those leave the device. `skip_special=True` drops the tokenizer's special tokens. What is
    dropped is counted (`activations.counts`). `dtype` None loses nothing; another rounds, and
    values that don't fit are counted.

    A shard has `shard_documents` documents (None: so many that its file has about 64 MB).
    StorageError for one that is damaged or of another harvest; with `repair=True` it is made again.
    `note` is kept with the activations: a harvest with another note is another.
    """

    def __init__(
        self,
        model: LanguageModel,
        dataset: Any,
        sites: Names,
        out: str | Path,
        *,
        context_size: int | None = None,
        pack: bool = False,
        prepend_bos: bool | None = None,
        positions: Positions = "all",
        skip_special: bool = False,
        dtype: torch.dtype | None = None,
        batch_size: int = 16,
        shard_documents: int | None = None,
        column: str | None = None,
        limit: int | None = None,
        note: str = "",
        repair: bool = False,
    ) -> None:
        self.model = model
        self.out = Path(out)
        self.documents = Documents(dataset, column, limit)
        self.sites = sites_of(model, sites)
        bound = context_length(model.module)
        size = min(bound or _CONTEXT, _CONTEXT) if context_size is None else context_size
        if size < 1 or batch_size < 1 or (bound is not None and size > bound):
            most = "" if bound is None else f" (the model has positions for {bound})"
            raise InputError(f"context_size={size}, batch_size={batch_size}: at least 1{most}.")
        self._reading = Reading(size, pack, prepend_bos)
        self._kept = kept_of(model, positions, skip_special)
        self._dtype = dtype
        self._batch_size = batch_size
        self._asked_size = shard_documents
        self._note = note
        self._repairs = repair
        self._capture = Capture(model, self.sites, dtype)

    # -- what is to be done ---------------------------------------------------------------------

    @cached_property
    def spec(self) -> dict[str, Any]:
        """What the harvest is of, as plain data."""
        reading = self._reading
        return {
            "model": model_told(self.model, self._note),
            "tokenizer": tokenizer_told(self.model),
            "sites": list(self.sites.keys),
            "dtype": None if self._dtype is None else str(self._dtype).removeprefix("torch."),
            "context_size": reading.context_size,
            "pack": reading.pack,
            "prepend_bos": reading.prepend_bos,
            "positions": self._kept.told,
            "documents_of_shard": self.documents_of_shard,
        }

    @cached_property
    def documents_of_shard(self) -> int:
        """How many documents make one shard, so that its file has about 64 MB."""
        if self._asked_size is not None:
            if self._asked_size < 1:
                raise InputError(f"shard_documents={self._asked_size}: at least one document.")
            return self._asked_size
        sample = self.documents.between(0, min(_SAMPLE, len(self.documents)))
        contexts, _ = self._reading.contexts(self.model, sample, 0)
        rows = sum(len(self._kept.of(context)) for context in contexts)
        bytes_of_row = sum(tensor.nbytes for tensor in self._one_row.values())
        return max(1, int(_SHARD * len(sample) // max(rows * bytes_of_row, 1)))

    @cached_property
    def _one_row(self) -> dict[str, Tensor]:
        """By site the row of some token, `[1, …]`, for its shape and dtype."""
        rows, _ = self._capture.rows([Context([0], [0])], [[0]])
        return rows

    @property
    def shards(self) -> int:
        """How many shards there are."""
        return -(-len(self.documents) // self.documents_of_shard)

    def plan(self) -> Plan:
        """How many shards there are, and which are done; StorageError for those that are others."""
        done = tuple(number for number in range(self.shards) if self.is_done(number))
        size = self.documents_of_shard
        return Plan(self.out, len(self.documents), size, self.shards, done)

    def is_done(self, number: int) -> bool:
        """Whether this shard is there. StorageError if its file is damaged, or is of another
        harvest; with `repair=True` it is to be made again."""
        path = self.path_of(number)
        if not path.exists():
            return False
        try:
            self._check_is_ours(Shard(path), number)
        except StorageError:
            if not self._repairs:
                raise
            return False
        return True

    def path_of(self, number: int) -> Path:
        """The file of this shard."""
        return self.out / name_of(number)

    def _check_is_ours(self, shard: Shard, number: int) -> None:
        if shard.told.fingerprint == self._told(number).fingerprint:
            return
        differing = ", ".join(differences(shard.told.spec, self.spec)) or "its documents"
        raise StorageError(
            f"{str(shard.path)!r} is of another harvest: {differing} differ. Write to another "
            f"directory, or give repair=True to make such shards again."
        )

    def _told(self, number: int, counts: Counter[str] | None = None) -> Told:
        first = number * self.documents_of_shard
        digest = digest_of(self.documents_in(number))
        mark = fingerprint_of(self.spec, first, digest)
        told = {name: count for name, count in sorted((counts or {}).items()) if count}
        return Told(mark, self.spec, number, self.shards, first, told)

    def documents_in(self, number: int) -> list[Document]:
        """The documents of this shard."""
        size = self.documents_of_shard
        return self.documents.between(number * size, (number + 1) * size)

    def size_of(self, number: int) -> int:
        """How many documents this shard has."""
        first = number * self.documents_of_shard
        return min(self.documents_of_shard, len(self.documents) - first)

    # -- making them ----------------------------------------------------------------------------

    def run(self, shards: Iterable[int] | None = None, progress: bool = True) -> None:
        """Make these shards (None: all), but for those that are done.

        Whatever ends it, each shard is there whole or not at all; run it again for the rest.
        While a shard is written the next one is made, so two are in memory.
        """
        numbers = range(self.shards) if shards is None else sorted(shards)
        count = sum(map(self.size_of, numbers))
        with Progress(count, progress) as shown, Writer() as writer:
            for number in numbers:
                size = self.size_of(number)
                if self.is_done(number):
                    shown.skip(size)
                else:
                    writer.put(self._made(number, shown), partial(shown.finish, size))
        remove_empty_parts(self.out)

    def run_shard(self, number: int, progress: Progress | None = None) -> Path:
        """Make one shard, whether it is there or not; its path."""
        self._made(number, progress)()
        if progress is not None:
            progress.finish(self.size_of(number))
        return self.path_of(number)

    def _made(self, number: int, progress: Progress | None) -> Callable[[], None]:
        """Run the model for a shard; what writes it."""
        if not 0 <= number < self.shards:
            raise InputError(f"there is no shard {number}: there are {self.shards}, from 0.")
        documents = self.documents_in(number)
        first = number * self.documents_of_shard
        contexts, counts = self._reading.contexts(self.model, documents, first)
        kept = [self._kept.of(context) for context in contexts]
        acts = self._acts(contexts, kept, counts, progress)
        counts["rows"] = sum(map(len, kept))
        counts["dropped tokens"] = sum(map(len, contexts)) - counts["rows"]
        told = self._told(number, counts)
        return partial(self._write, number, acts, _columns(contexts, kept), told)

    def _write(
        self, number: int, acts: dict[str, Tensor], columns: dict[str, Tensor], told: Told
    ) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        write_shard(self.path_of(number), acts, columns, told)
        remove_parts(self.path_of(number))

    def _acts(
        self,
        contexts: Sequence[Context],
        kept: Sequence[Sequence[int]],
        counts: Counter[str],
        progress: Progress | None,
    ) -> dict[str, Tensor]:
        """By site the rows of all contexts, in their order."""
        begins = [0, *torch.tensor([len(each) for each in kept]).cumsum(0).tolist()]
        found = {
            key: row.new_empty(begins[-1], *row.shape[1:]) for key, row in self._one_row.items()
        }
        order = sorted(range(len(contexts)), key=lambda n: -len(contexts[n]))  # little padding
        for start in range(0, len(order), self._batch_size):
            batch = order[start : start + self._batch_size]
            rows, more = self._capture.rows([contexts[n] for n in batch], [kept[n] for n in batch])
            counts.update(more)
            sizes = [len(kept[n]) for n in batch]
            for key, values in rows.items():
                for n, part in zip(batch, values.split(sizes), strict=True):
                    found[key][begins[n] : begins[n + 1]] = part
            if progress is not None:
                progress.see(sum(len(contexts[n]) for n in batch))
        return found


def _columns(contexts: Sequence[Context], kept: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    pairs = list(zip(contexts, kept, strict=True))
    columns = {
        "tokens": [context.tokens[place] for context, places in pairs for place in places],
        "doc": [context.docs[place] for context, places in pairs for place in places],
        "pos": [place for _, places in pairs for place in places],
    }
    found = {name: torch.tensor(each, dtype=torch.int32) for name, each in columns.items()}
    return {**found, "step": torch.zeros_like(found["pos"])}
