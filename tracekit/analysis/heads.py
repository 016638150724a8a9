"""What attention heads do with repeated random tokens: induction, previous token, duplicate."""

# Olsson et al. 2022, "In-context Learning and Induction Heads"; Elhage et al. 2021. Random tokens
# mean nothing, so what a head looks at can only be where things stand.

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, final

import torch
from torch import Tensor

from tracekit.analysis.labelled import Axis, Cell, Labelled
from tracekit.analysis.metrics import traced
from tracekit.analysis.prompts import check_is_the_same, numbered
from tracekit.capture import showing_own_lines
from tracekit.core.nest import on_one_device
from tracekit.errors import InputError, UnsupportedError
from tracekit.models.language import LanguageModel

KINDS: Final = ("induction", "previous_token", "duplicate_token")


@final
@dataclass(frozen=True, repr=False)
class HeadScores:
    """The share of its attention that each head gives to a place, `[layer, head]`, 0 to 1.

    At the second copy of a token: `induction`, to the token behind the first copy;
    `duplicate_token`, to the first copy. At any token: `previous_token`, to the one before.
    `copied` is the share of the second copy that the model foretells.
    """

    induction: Labelled
    previous_token: Labelled
    duplicate_token: Labelled
    copied: float

    def heads(self, kind: str, at_least: float = 0.4) -> list[tuple[int, int]]:
        """The (layer, head) of those with that score or more, the highest first."""
        if kind not in KINDS:
            raise InputError(f"{kind!r} is no kind of head: {', '.join(KINDS)}.")
        found: list[Cell] = getattr(self, kind).top(getattr(self, kind).values.numel())
        return [
            (int(cell.labels[0]), int(cell.labels[1])) for cell in found if cell.value >= at_least
        ]

    def to_json(self) -> dict[str, Any]:
        """All of it in lists and strings."""
        return {kind: getattr(self, kind).to_json() for kind in KINDS} | {"copied": self.copied}

    def __repr__(self) -> str:
        told = "".join(f"\n  {kind}: {self._told(kind)}" for kind in KINDS)
        return f"HeadScores({self.copied:.0%} of a second copy foretold){told}"

    def _told(self, kind: str) -> str:
        cells = getattr(self, kind).top(4)
        return ", ".join(f"L{cell.labels[0]}H{cell.labels[1]} {cell.value:.2f}" for cell in cells)


@showing_own_lines
@torch.no_grad()
def head_scores(model: LanguageModel, length: int = 20, rows: int = 8, seed: int = 0) -> HeadScores:
    """How much each head is an induction, previous-token or duplicate-token head.

    Read off the attention patterns of a run on `rows` blocks of `length` random tokens, each twice.
    Olsson et al. 2022.
    """
    check_is_the_same(model)
    tokens = repeated_tokens(model, length, rows, seed)
    logits, cache = model.run_with_cache(tokens, names_filter="pattern")
    layers = cache.layers_of("pattern")
    patterns = [cache["pattern", layer] for layer in layers]
    if any(each.shape[-2:] != (tokens.shape[1],) * 2 for each in patterns):
        raise UnsupportedError("its patterns are not [batch, heads, pos, key] of all positions.")
    if len({each.shape[1] for each in patterns}) > 1:
        raise UnsupportedError("its layers have different numbers of heads.")
    second = slice(tokens.shape[1] - length, None)
    axes = (Axis("layer", tuple(map(str, layers))), numbered("head", patterns[0].shape[1]))

    def score(back: int, at: slice) -> Tensor:
        """The mean attention to the token that many before, from tokens `at`."""
        shifted = [each.diagonal(-back, -2, -1) for each in patterns]
        begin = (at.start or 0) - back
        return torch.stack(
            on_one_device(each[..., max(0, begin) :].float().mean((0, 2)) for each in shifted)
        )

    found = logits[:, second].argmax(-1)[:, :-1] == tokens[:, second][:, 1:]
    return HeadScores(
        Labelled(score(length - 1, second), axes, "induction score"),
        Labelled(score(1, slice(0, None)), axes, "previous-token score"),
        Labelled(score(length, second), axes, "duplicate-token score"),
        float(found.float().mean()),
    )


@showing_own_lines
def repeated_tokens(model: LanguageModel, length: int = 20, rows: int = 8, seed: int = 0) -> Tensor:
    """Rows of different random tokens, and these again: `[rows, 2 * length]`.

    Behind the beginning-of-sequence token, where the tokenizer puts one. No special tokens.
    """
    config: Any = traced(model).module.config.get_text_config()
    known = [each for each in range(config.vocab_size) if each not in _special(model, config)]
    if not 2 <= length <= len(known):
        raise InputError(f"length= is from 2 to {len(known)}, the tokens there are, not {length}.")
    if rows < 1:
        raise InputError(f"rows= is at least 1, not {rows}.")
    draw = torch.Generator().manual_seed(seed)
    blocks = torch.stack([torch.randperm(len(known), generator=draw)[:length] for _ in range(rows)])
    blocks = torch.tensor(known)[blocks]
    parts = [blocks, blocks]
    if model.tokenizer is not None and model.tokenizer_prepends_bos:
        parts.insert(0, torch.full((rows, 1), int(model.tokenizer.bos_token_id)))
    return torch.cat(parts, 1).to(model.device)


@showing_own_lines
@torch.no_grad()
def copying_scores(model: LanguageModel) -> Labelled:
    """How much each head raises the token that it looks at: `[layer, head]`, -1 to 1.

    Of the eigenvalues of its full OV circuit, W_E @ W_V @ W_O @ W_U, their sum over the sum of
    their sizes: 1 if all are positive. Norms are in it only if they have been folded:
    `copying_scores(model.processed())`. Elhage et al. 2021.
    """
    circuits: Any
    circuits, layers = traced(model).weights("OV")
    W_U, W_E = (each.to(circuits.A.device).float() for each in (model.W_U, model.W_E))
    through = W_U @ W_E  # [model, model]
    inner = circuits.B.float() @ through @ circuits.A.float()  # has the eigenvalues of the circuit
    values: Tensor = torch.linalg.eigvals(inner)
    found = values.real.sum(-1) / values.abs().sum(-1)
    axes = (Axis("layer", tuple(map(str, layers))), numbered("head", found.shape[-1]))
    return Labelled(found, axes, "copying score")


def _special(model: LanguageModel, config: Any) -> set[int]:
    if model.tokenizer is not None:
        beyond = range(len(model.tokenizer), config.vocab_size)
        return {*map(int, model.tokenizer.all_special_ids), *beyond}
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    ids = [getattr(config, name, None) for name in names]
    return {each for each in ids if isinstance(each, int)}
