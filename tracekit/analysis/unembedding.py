"""What a model makes of a residual stream behind its last layer: norm, unembedding, scale, cap."""

# The model itself runs on the stream, from behind its last layer on, so that nothing of the way to
# its logits is written here again. Where it can't begin there (encoder-decoders, images), the
# modules that are named are called one after the other. Either is tried on the run's own last
# stream: what does not give its logits is refused.

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Final, TypeAlias

import torch
from torch import Tensor

from tracekit.analysis.prompts import Prompts
from tracekit.errors import InputError, MissingNameError, TracekitError, UnsupportedError
from tracekit.models.language import LanguageModel

# From a residual stream, [batch, pos, model], its logits, [batch, pos, vocabulary].
Reading: TypeAlias = Callable[[Tensor], Tensor]

_ON_THE_WAY: Final = ("final_norm", "unembed_head", "unembed")
TOLERANCE: Final = 1e-3  # of the largest logit: rounding of half precision on other shapes


@torch.no_grad()
def reading_of(
    model: LanguageModel, prompts: Prompts, final: Tensor, logits: Tensor
) -> tuple[Reading, Tensor]:
    """What reads a residual stream as the model does its last, and what it makes of `final`.

    `final` and `logits` are of one run. UnsupportedError if nothing reads them alike.
    """
    for reading in _readings(model, prompts):
        try:
            found = reading(final)
        except (TracekitError, ValueError, TypeError):
            continue
        if found.shape != logits.shape:
            continue
        if _is_close(found, logits):
            return reading, found
        scale = (found * logits).sum() / (found * found).sum()
        if _is_close(found * scale, logits):  # T5 scales on the way
            return partial(_scaled, reading, scale), found * scale
    raise UnsupportedError(
        f"{type(model.module).__name__}: nothing that reads a residual stream gives the logits of "
        f"the run for its last one, so what it would make of an earlier one is not known."
    )


def final_name(model: LanguageModel) -> Any:
    """The name of the residual stream behind the last layer."""
    try:
        return "resid_final" if model.final_norm is not None else ""
    except MissingNameError:
        return ("resid_post", len(model.layers) - 1)


def _readings(model: LanguageModel, prompts: Prompts) -> Iterator[Reading]:
    behind = len(model.layers)
    if "decoder_input_ids" not in prompts.inputs:
        yield lambda stream: model.forward(stream, start_at_layer=behind)
        bare = LanguageModel(model.module, tokenizer=model.tokenizer)  # no edits of gone layers
        yield lambda stream: bare.forward(stream, start_at_layer=behind)
    modules = [getattr(model, word) for word in _ON_THE_WAY if hasattr(model, word)]
    if not modules:
        raise InputError(f"{type(model.module).__name__} has nothing that gives logits of tokens.")

    def through(stream: Tensor) -> Tensor:
        for module in modules:
            stream = module(stream)
        return stream

    yield through


def _scaled(reading: Reading, scale: Tensor, stream: Tensor) -> Tensor:
    return reading(stream) * scale


def _is_close(found: Tensor, logits: Tensor) -> bool:
    size = logits.abs().max().clamp(min=1.0)
    return bool((found - logits).abs().max() <= TOLERANCE * size)
