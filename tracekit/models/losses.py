"""How well each next token is foretold: cross entropy over the tokens that are there."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from tracekit.errors import InputError, UnsupportedError
from tracekit.models.passes import is_encoder_decoder
from tracekit.models.prefill import READS_AHEAD

NO_TARGET: Final = -100  # transformers' mark of what counts for nothing
# Tokens that stand for images, videos and sounds, which no logits foretell (4.57 to 5.23).
_PLACEHOLDERS: Final = (
    "image_token_id",
    "image_token_index",
    "video_token_id",
    "video_token_index",
    "audio_token_id",
    "audio_token_index",
)


def next_tokens(ids: Tensor, mask: Tensor | None, others: frozenset[int] = frozenset()) -> Tensor:
    """`[batch, pos - 1]`: the token behind each, NO_TARGET where that or the token is padding.

    Nor is a token of `others` a target.
    """
    targets = ids[:, 1:].clone()
    if mask is not None:
        is_real = mask.bool().to(ids.device)
        targets[~(is_real[:, 1:] & is_real[:, :-1])] = NO_TARGET
    for other in others:
        targets[targets == other] = NO_TARGET
    return targets


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """The cross entropy of each target, in nats, shaped as `targets`; 0 where there is none.

    In float32 at least, as transformers computes it. `logits`: `[batch, pos, vocabulary]`.
    """
    found = logits.flatten(0, 1)
    found = found.float() if found.element_size() < 4 else found
    flat = targets.flatten().to(logits.device)
    return cross_entropy(found, flat, ignore_index=NO_TARGET, reduction="none").view(targets.shape)


def mean_loss(losses: Tensor, targets: Tensor) -> Tensor:
    """Their mean over the targets of all rows."""
    return losses.sum() / (targets != NO_TARGET).sum().to(losses.device)


def loss_of(logits: Tensor, tokens: Tensor, mask: Tensor | None, per_token: bool) -> Tensor:
    """The loss of logits on their own next tokens: the mean, or `[batch, pos - 1]`."""
    tokens = tokens if tokens.dim() == 2 else tokens[None]
    logits = logits if logits.dim() == 3 else logits[None]
    if logits.shape[:2] != tokens.shape or (mask is not None and mask.shape != tokens.shape):
        shown = "" if mask is None else f" and attention_mask {tuple(mask.shape)}"
        raise InputError(
            f"logits are [batch, pos, vocabulary], and tokens and attention_mask [batch, pos]; "
            f"given are logits {tuple(logits.shape)}, tokens {tuple(tokens.shape)}{shown}."
        )
    targets = next_tokens(tokens, mask)
    losses = token_losses(logits[:, :-1], targets)
    return losses if per_token else mean_loss(losses, targets)


def targets_of(module: Any, inputs: dict[str, Any], length: int) -> Tensor:
    """What the logits of a decoder, `length` for each row, are to foretell.

    Refused where there is no such thing.
    """
    if is_encoder_decoder(module):
        raise InputError(
            "the loss of an encoder-decoder is that of what its decoder is to say: give labels= "
            "(a text, or ids with -100 where nothing counts)."
        )
    check_looks_back(module)
    ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
    if not isinstance(ids, Tensor):
        raise InputError(
            "the loss is of tokens, and no input_ids were given: give labels=, or tokens= beside "
            "start_at_layer=."
        )
    if ids.shape[1] != length:
        raise InputError(
            f"the loss needs logits for each of the {ids.shape[1]} tokens, and there are {length}: "
            f"leave logits_to_keep= out."
        )
    if mask is not None and mask.dim() != 2:
        raise InputError(
            f"attention_mask {tuple(mask.shape)} doesn't say which tokens are padding, as one of "
            f"shape [batch, pos] does: give labels=."
        )
    own = None if mask is None else mask[:, -ids.shape[1] :]  # behind a prefix it has that, too
    targets = next_tokens(ids, own, _placeholders(module))
    if not bool((targets != NO_TARGET).any()):
        raise InputError(
            "there is no loss where no row has two tokens: the first one is not foretold."
        )
    return targets


def check_looks_back(module: Any) -> None:
    """UnsupportedError if logits know the token behind: its loss would say nothing."""
    config: Any = getattr(module, "config", None)
    if config is None or not callable(getattr(module, "can_generate", None)):
        raise UnsupportedError(
            f"whether the logits of {type(module).__name__} are of the token behind isn't known: "
            f"take them, and write model.loss_fn(logits, tokens)."
        )
    if not module.can_generate() or _sees_all(config):
        raise UnsupportedError(
            f"{type(module).__name__} ({config.model_type}) reads the tokens behind, too, so how "
            f"well it foretells them says nothing: give labels=, with -100 where nothing counts."
        )


def own_losses(module: Any, logits: Tensor, labels: Tensor, loss: Tensor) -> Tensor:
    """The losses whose mean is `loss`, which the model made of `labels`: `[batch, pos]` for an
    encoder-decoder or a masked model, else `[batch, pos - 1]`, as the first is not foretold."""
    is_in_place = is_encoder_decoder(module) or not module.can_generate()
    targets = labels if is_in_place else labels[:, 1:]
    losses = token_losses(logits if is_in_place else logits[:, :-1], targets)
    mean = mean_loss(losses, targets)
    if not torch.allclose(mean.detach().float(), loss.detach().float(), rtol=1e-2, atol=1e-3):
        raise UnsupportedError(
            f"the loss of {type(module).__name__} ({float(loss):.4g}) is not the mean of those of "
            f"its tokens ({float(mean):.4g}): loss_per_token= can't take it apart."
        )
    return losses


def _sees_all(config: Any) -> bool:
    """Whether attention goes both ways."""
    from transformers import MODEL_FOR_MASKED_LM_MAPPING

    is_of_encoders = type(config) in MODEL_FOR_MASKED_LM_MAPPING
    is_encoder = is_of_encoders and not getattr(config, "is_decoder", False)
    return config.model_type in READS_AHEAD or is_encoder


def _placeholders(module: Any) -> frozenset[int]:
    found = (getattr(module.config, name, None) for name in _PLACEHOLDERS)
    return frozenset(each for each in found if isinstance(each, int))
