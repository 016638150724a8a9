"""How far a harvest is: documents, tokens per second, and the time left."""

from __future__ import annotations

from time import monotonic
from typing import final

from tqdm.auto import tqdm


@final
class Progress:
    """A bar over documents; the tokens per second are those of the shards made in this run."""

    def __init__(self, documents: int, is_shown: bool) -> None:
        self._bar = tqdm(total=documents, unit="doc", desc="harvest", disable=not is_shown)
        self._tokens = 0
        self._began = monotonic()

    def skip(self, documents: int) -> None:
        """So many were done before."""
        if not self._bar.disable:
            self._bar.initial += documents  # they don't count for the time left
        self._bar.update(documents)

    def see(self, tokens: int) -> None:
        """The model went over so many tokens more."""
        self._tokens += tokens
        rate = self._tokens / max(monotonic() - self._began, 1e-9)
        self._bar.set_postfix_str(f"{rate:,.0f} tokens/s")

    def finish(self, documents: int) -> None:
        """A shard with so many documents is there."""
        self._bar.update(documents)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
