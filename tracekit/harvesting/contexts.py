"""From documents to contexts: what the model reads at once."""

# Nothing is left out: a document that is longer than a context goes on in the next one, where the
# model sees it without what came before. Packed, documents stand one behind the other in contexts
# of full length, and the model sees across their borders, as in training.

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, final

from tracekit.errors import InputError
from tracekit.harvesting.documents import Document
from tracekit.models.language import LanguageModel

_AT_ONCE = 256  # documents that are made tokens together


@final
@dataclass(frozen=True)
class Context:
    """What the model reads at once: tokens, and of which document each is."""

    tokens: list[int]
    docs: list[int]

    def __len__(self) -> int:
        return len(self.tokens)


@final
@dataclass(frozen=True)
class Reading:
    """How documents become contexts."""

    context_size: int
    pack: bool
    prepend_bos: bool | None

    def contexts(
        self, model: LanguageModel, documents: Sequence[Document], first: int
    ) -> tuple[list[Context], Counter[str]]:
        """The contexts of documents, of which the first has the number `first`; and counts."""
        rows = list(self._tokens(model, documents))
        counts = Counter(documents=len(rows), tokens=sum(map(len, rows)))
        counts["empty documents"] = sum(not row for row in rows)
        if self.pack:
            rows = [row if _begins(model, row) else [*row, _end_of(model)] for row in rows]
            counts["separators"] = sum(map(len, rows)) - counts["tokens"]
            joined = [token for row in rows for token in row]
            docs = [first + number for number, row in enumerate(rows) for _ in row]
            found = list(self._pieces(joined, docs))
        else:
            each = (self._pieces(row, [first + n] * len(row)) for n, row in enumerate(rows))
            found = [piece for pieces in each for piece in pieces]
            counts["split documents"] = sum(len(row) > self.context_size for row in rows)
        counts["contexts"] = len(found)
        return found, counts

    def _tokens(
        self, model: LanguageModel, documents: Sequence[Document]
    ) -> Iterator[Sequence[int]]:
        for start in range(0, len(documents), _AT_ONCE):
            some = documents[start : start + _AT_ONCE]
            texts = [each for each in some if each and isinstance(each, str)]
            spelled = iter(self._spelled(model, texts) if texts else [])
            for each in some:
                yield next(spelled) if each and isinstance(each, str) else [*map(int, each)]

    def _spelled(self, model: LanguageModel, texts: list[str]) -> list[list[int]]:
        inputs = model.to_inputs(texts, prepend_bos=self.prepend_bos)
        ids, mask = inputs["input_ids"].cpu(), inputs.get("attention_mask")
        if mask is None:
            return ids.tolist()
        return [row[own].tolist() for row, own in zip(ids, mask.bool().cpu(), strict=True)]

    def _pieces(self, tokens: Sequence[int], docs: Sequence[int]) -> Iterator[Context]:
        for start in range(0, len(tokens), self.context_size):
            end = start + self.context_size
            yield Context(list(tokens[start:end]), list(docs[start:end]))


def _begins(model: LanguageModel, row: Sequence[int]) -> bool:
    """Whether a document begins with a token that parts it from the one before."""
    begin = getattr(model.tokenizer, "bos_token_id", None)
    return bool(row) and begin is not None and row[0] == begin


def _end_of(model: LanguageModel) -> int:
    tokenizer: Any = model.tokenizer
    for name in ("eos_token_id", "sep_token_id", "bos_token_id"):
        if getattr(tokenizer, name, None) is not None:
            return int(getattr(tokenizer, name))
    raise InputError(
        "pack=True puts a token between documents, and this tokenizer has neither an end-of-"
        "sequence nor a beginning-of-sequence token: pad them instead, pack=False."
    )
