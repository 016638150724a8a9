"""One forward of some contexts: the rows of each site at the positions that are kept."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, final

import torch
from torch import Tensor

from tracekit.errors import InputError, PaddingError
from tracekit.harvesting.contexts import Context
from tracekit.harvesting.sites import Sites
from tracekit.models.language import LanguageModel

# Of each context: all, or a number, a slice or numbers that may count from its end.
Positions: TypeAlias = "str | int | slice | Sequence[int] | None"


@final
@dataclass(frozen=True)
class Kept:
    """Which positions of a context are kept: those chosen, less the tokenizer's special tokens."""

    positions: int | slice | tuple[int, ...] | None
    special: frozenset[int]

    @property
    def told(self) -> Any:
        """As plain data, for a specification."""
        chosen = self.positions
        if isinstance(chosen, slice):
            chosen = f"{chosen.start}:{chosen.stop}:{chosen.step}"
        return [chosen, sorted(self.special)]

    def of(self, context: Context) -> list[int]:
        """The positions of this context that are kept, in order."""
        count, chosen = len(context), self.positions
        if chosen is None:
            found: Sequence[int] = range(count)
        elif isinstance(chosen, slice):
            found = range(count)[chosen]
        else:
            numbers = (chosen,) if isinstance(chosen, int) else chosen
            found = sorted({number % count for number in numbers if -count <= number < count})
        return [place for place in found if context.tokens[place] not in self.special]


def kept_of(model: LanguageModel, positions: Positions, skip_special: bool) -> Kept:
    """What `positions=` and `skip_special=` say; InputError for what is no position."""
    special = frozenset(getattr(model.tokenizer, "all_special_ids", ())) if skip_special else ()
    if positions in (None, "all", "last"):
        return Kept(-1 if positions == "last" else None, frozenset(special))
    if isinstance(positions, str):
        raise InputError(
            f"positions= is 'all', 'last', a number, a slice or numbers, not {positions!r}."
        )
    if isinstance(positions, (int, slice)):
        return Kept(positions, frozenset(special))
    return Kept(tuple(int(each) for each in positions or ()), frozenset(special))


@final
class Capture:
    """Runs a model on contexts, up to the last layer that is needed, and takes rows."""

    def __init__(self, model: LanguageModel, sites: Sites, dtype: torch.dtype | None) -> None:
        self._model = model
        self._sites = sites
        self._dtype = dtype
        tokenizer: Any = model.tokenizer
        self._pad = getattr(tokenizer, "pad_token_id", None) or 0

    def rows(
        self, contexts: Sequence[Context], kept: Sequence[Sequence[int]]
    ) -> tuple[dict[str, Tensor], Counter[str]]:
        """By site the rows `[rows, …]` at the positions kept of each context, one behind the other.

        On the CPU; and how many values did not fit into the dtype. A model that reads its padding
        gets contexts of one length at a time.
        """
        try:
            return self._rows(contexts, kept)
        except PaddingError:
            return self._by_length(contexts, kept)

    def _by_length(
        self, contexts: Sequence[Context], kept: Sequence[Sequence[int]]
    ) -> tuple[dict[str, Tensor], Counter[str]]:
        parts: list[dict[str, Tensor]] = [{} for _ in contexts]
        counts: Counter[str] = Counter()
        for length in sorted({len(context) for context in contexts}):
            places = [n for n, context in enumerate(contexts) if len(context) == length]
            rows, more = self._rows([contexts[n] for n in places], [kept[n] for n in places])
            counts.update(more)
            sizes = [len(kept[n]) for n in places]
            for key, values in rows.items():
                for n, part in zip(places, values.split(sizes), strict=True):
                    parts[n][key] = part
        return {key: torch.cat([part[key] for part in parts]) for key in self._sites.keys}, counts

    def _rows(
        self, contexts: Sequence[Context], kept: Sequence[Sequence[int]]
    ) -> tuple[dict[str, Tensor], Counter[str]]:
        ids, inputs = self._inputs(contexts)
        stop = self._sites.stop
        with torch.no_grad():
            _, cache = self._model.run_with_cache(
                inputs, names_filter=list(self._sites.keys), stop_at_layer=stop
            )
        width = ids.shape[1]
        index = torch.tensor(
            [row * width + place for row, places in enumerate(kept) for place in places],
            dtype=torch.int64,
        )
        is_all = len(index) == ids.numel()
        counts: Counter[str] = Counter()
        found: dict[str, Tensor] = {}
        for key in self._sites.keys:
            value = cache[key]
            rows = self._sites.rows_of(key, value, ids.shape)
            rows = rows if is_all else rows[index.to(rows.device)]
            found[key] = self._cast(rows, counts).cpu()
        return found, counts

    def _inputs(self, contexts: Sequence[Context]) -> tuple[Tensor, dict[str, Tensor]]:
        """The tokens `[batch, pos]`, padded behind, and what the model is given."""
        width = max(map(len, contexts))
        ids = torch.full((len(contexts), width), self._pad)
        for row, context in zip(ids, contexts, strict=True):
            row[: len(context)] = torch.tensor(context.tokens)
        lengths = torch.tensor([len(context) for context in contexts])
        if bool((lengths == width).all()):
            return ids, {"input_ids": ids}
        return ids, {
            "input_ids": ids,
            "attention_mask": (torch.arange(width) < lengths[:, None]).long(),
        }

    def _cast(self, rows: Tensor, counts: Counter[str]) -> Tensor:
        if self._dtype is None or rows.dtype == self._dtype or not rows.is_floating_point():
            return rows
        cast = rows.to(self._dtype)
        counts["overflowed values"] += int((cast.isinf() & ~rows.isinf()).sum())
        return cast
