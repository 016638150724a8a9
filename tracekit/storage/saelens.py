"""Activations as SAELens keeps them: a Hugging Face data set with a row for each context."""

# The columns are those that its CacheActivationsRunner writes (SAELens 6).

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tracekit.architectures.hook_names import BLOCK_HOOKS
from tracekit.capture import warn_user
from tracekit.errors import InputError, UnsupportedError

if TYPE_CHECKING:
    from tracekit.storage.activations import Activations


def to_saelens(acts: Activations, path: str | Path, site: str | None, drop_short: bool) -> Any:
    """Write the contexts of a site to `path`; the data set."""
    try:
        import datasets
        from datasets.arrow_writer import ArrowWriter
    except ImportError as error:
        raise UnsupportedError(
            "to_saelens() writes a Hugging Face data set: pip install 'tracekit[datasets]'."
        ) from error
    site = _only_site(acts) if site is None else site
    values = acts[site]
    spans = _contexts(acts, drop_short)
    size, width = spans[0][1] - spans[0][0], values.shape[1:].numel()
    kind = "float32" if values.dtype == torch.bfloat16 else str(values.dtype)
    features = datasets.Features(
        {
            hook_name(site): datasets.Array2D((size, width), kind.removeprefix("torch.")),
            "token_ids": datasets.Sequence(datasets.Value("int32"), size),
        }
    )
    with tempfile.TemporaryDirectory() as folder:
        file = f"{folder}/contexts.arrow"
        with ArrowWriter(features=features, path=file) as writer:
            for tokens, part in _rows(acts, site, spans):
                row = part.float() if part.dtype == torch.bfloat16 else part
                told = {hook_name(site): row.flatten(1).numpy(), "token_ids": tokens.numpy()}
                writer.write(told)
            writer.finalize()
        datasets.Dataset.from_file(file).save_to_disk(str(path))
    return datasets.load_from_disk(str(path))


def hook_name(site: str) -> str:
    """TransformerLens' name of a site; its own where that has none."""
    found = re.fullmatch(r"layers\.(\d+)\.(\w+)", site)
    if found is None or found[2] not in BLOCK_HOOKS:
        return site
    return f"blocks.{found[1]}.{BLOCK_HOOKS[found[2]][0]}"


def _only_site(acts: Activations) -> str:
    if len(acts.sites) != 1:
        raise InputError(f"one site at a time: site={acts.sites[0]!r}, or {acts.sites[-1]!r} …")
    return acts.sites[0]


def _contexts(acts: Activations, drop_short: bool) -> list[tuple[int, int]]:
    """The first row of each context, and the row behind its last."""
    pos = acts.pos[:]
    begins = (pos == 0).nonzero()[:, 0].tolist()
    spans = list(zip(begins, [*begins[1:], len(pos)], strict=True))
    if not spans or not all(
        bool((pos[begin:end] == torch.arange(end - begin)).all()) for begin, end in spans
    ):
        raise InputError("SAELens takes whole contexts: harvest with positions='all'.")
    size = max(end - begin for begin, end in spans)
    whole = [(begin, end) for begin, end in spans if end - begin == size]
    short = len(spans) - len(whole)
    if short and not drop_short:
        raise InputError(
            f"SAELens takes contexts of one length, and {short} of {len(spans)} are shorter than "
            f"{size}: harvest with pack=True, and leave out the last of each shard with "
            f"drop_short=True."
        )
    if short:
        warn_user(f"{short} of {len(spans)} contexts are shorter than {size}, and left out.")
    return whole


def _rows(
    acts: Activations, site: str, spans: list[tuple[int, int]]
) -> Iterator[tuple[Tensor, Tensor]]:
    values, tokens = acts[site], acts.tokens
    for begin, end in spans:
        yield tokens[begin:end], values[begin:end]
