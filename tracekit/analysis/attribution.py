"""Direct logit attribution: how much each part of the residual stream adds to a token's logit."""

from __future__ import annotations

from torch import Tensor

from tracekit.analysis.components import Components, Positions
from tracekit.analysis.norming import apply_norm_to_stack
from tracekit.errors import InputError
from tracekit.models.language import LanguageModel
from tracekit.tracing.named_cache import NamedCache


def logit_attrs(
    model: LanguageModel,
    cache: NamedCache,
    stack: Components,
    tokens: str | int | Tensor,
    incorrect_tokens: str | int | Tensor | None = None,
    pos_slice: Positions = None,
) -> Tensor:
    """What each part of a stack adds to the logit of `tokens`: `[components, batch, pos]`.

    Through the final norm with the scale that it had in the run, onto the unembedding. `tokens` is
    one token for all, or ids `[batch]`, or `[batch, pos]`; against `incorrect_tokens`, the
    difference of the two logits. All parts of the stream add up to what the unembedding gives, but
    for the biases of the final norm and the unembedding (which model.processed() leaves in b_U).
    Elhage et al. 2021; TransformerLens' ActivationCache.logit_attrs. `pos_slice` is the one that
    the stack was made with.
    """
    direction = _directions(model, tokens, stack)
    if incorrect_tokens is not None:
        other = _directions(model, incorrect_tokens, stack)
        if other.shape != direction.shape:
            raise InputError(
                f"tokens and incorrect_tokens are of one shape, not {list(direction.shape[:-1])} "
                f"and {list(other.shape[:-1])}."
            )
        direction = direction - other
    normed = apply_norm_to_stack(model, cache, stack.values, pos_slice=pos_slice)
    return (normed * direction.to(normed.device)).sum(-1)


def _directions(model: LanguageModel, tokens: str | int | Tensor, stack: Components) -> Tensor:
    found = model.tokens_to_residual_directions(tokens).detach()
    rest = stack.values.shape[1:-1]
    ids = found.shape[:-1]
    if len(ids) == 1 and len(rest) == 2 and ids[0] == rest[0]:  # one for each row
        found = found[:, None]
    elif ids and tuple(ids) != tuple(rest):
        raise InputError(
            f"tokens are one, one for each row, or of the shape {list(rest)}, not {list(ids)}."
        )
    return found
