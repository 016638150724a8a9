"""Keys and values as data: an entry for each layer, the mask with them, frozen or growing."""

# The data model is TransformerLens's HookedTransformerKeyValueCache.

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, final

import torch
from torch import Tensor

from tracekit.errors import InputError


@final
class KeyValueEntry:
    """The keys and values of one layer, each `(rows, positions, heads, width)`."""

    def __init__(self, past_keys: Tensor, past_values: Tensor, frozen: bool = False) -> None:
        self.past_keys = past_keys
        self.past_values = past_values
        self.frozen = frozen

    def append(self, new_keys: Tensor, new_values: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values with the new ones behind them; kept so, unless the entry is frozen."""
        keys = torch.cat([self.past_keys, new_keys], 1)
        values = torch.cat([self.past_values, new_values], 1)
        if not self.frozen:
            self.past_keys, self.past_values = keys, values
        return keys, values

    @classmethod
    def of_layer(cls, keys: Tensor, values: Tensor) -> KeyValueEntry:
        """An entry of what a layer of transformers holds, `(rows, heads, positions, width)`."""
        return cls(keys.transpose(1, 2), values.transpose(1, 2))

    def __len__(self) -> int:
        return int(self.past_keys.shape[1])

    def __repr__(self) -> str:
        keys, values = tuple(self.past_keys.shape), tuple(self.past_values.shape)
        return f"KeyValueEntry(keys {keys}, values {values}{', frozen' if self.frozen else ''})"


@final
class KeyValueCache:
    """The keys and values of all layers, and the attention mask of what they are of.

    `model.trace(rest, prefix=kv_cache)` goes on from it: a frozen one stays as it is, any other
    has grown by the rest when the run is over. `tokens` are the ids, where they are known:
    `generate` needs them.
    """

    def __init__(
        self,
        entries: Sequence[KeyValueEntry],
        previous_attention_mask: Tensor,
        frozen: bool = False,
        *,
        tokens: Tensor | None = None,
        model: Any = None,
    ) -> None:
        self.entries = list(entries)
        self.previous_attention_mask = previous_attention_mask
        self.tokens = tokens
        self.model = model  # that these are of; runs of others are refused
        self.frozen = frozen
        if frozen:
            self.freeze()

    @classmethod
    def init(cls, model: Any, batch_size: int = 1) -> KeyValueCache:
        """An empty one, for `batch_size` rows of `model`."""
        one = model.prefill([[0]] * batch_size).kv_cache  # its shapes are the model's own
        empty = [
            KeyValueEntry(entry.past_keys[:, :0].clone(), entry.past_values[:, :0].clone())
            for entry in one.entries
        ]
        mask = one.previous_attention_mask[:, :0]
        assert one.tokens is not None
        return cls(empty, mask, tokens=one.tokens[:, :0], model=model)

    def freeze(self) -> None:
        """From now on nothing that is appended is kept."""
        self._set_frozen(True)

    def unfreeze(self) -> None:
        """From now on what is appended is kept."""
        self._set_frozen(False)

    def append_attention_mask(self, attention_mask: Tensor) -> Tensor:
        """The mask with this one behind it; kept so, unless the cache is frozen."""
        own = self.previous_attention_mask
        joined = torch.cat([own, attention_mask.to(own.device)], -1)
        if not self.frozen:
            self.previous_attention_mask = joined
        return joined

    @property
    def batch_size(self) -> int:
        """How many rows there are."""
        return int(self.previous_attention_mask.shape[0])

    def check(self) -> None:
        """InputError if its parts are not of the same rows and positions."""
        rows, length = self.previous_attention_mask.shape
        shapes = {tuple(entry.past_keys.shape[:2]) for entry in self.entries}
        shapes |= {tuple(entry.past_values.shape[:2]) for entry in self.entries}
        if shapes != {(rows, length)}:
            raise InputError(
                f"the entries of this KeyValueCache are of (rows, positions) {sorted(shapes)}, and "
                f"its attention mask of {(rows, length)}: append to all of them alike, and to the "
                f"mask with append_attention_mask()."
            )

    def _set_frozen(self, frozen: bool) -> None:
        self.frozen = frozen
        for entry in self.entries:
            entry.frozen = frozen

    def __getitem__(self, index: int) -> KeyValueEntry:
        return self.entries[index]

    def __iter__(self) -> Iterator[KeyValueEntry]:
        return iter(self.entries)

    def __len__(self) -> int:
        """How many layers there are."""
        return len(self.entries)

    def __repr__(self) -> str:
        rows, positions = self.previous_attention_mask.shape
        state = ", frozen" if self.frozen else ""
        return f"KeyValueCache({len(self)} layers, {rows} rows, {positions} positions{state})"
