"""What `forward` hands back of a pass: logits, the loss, both, or the likeliest tokens as text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, NamedTuple, final

import torch
from torch import Tensor

from tracekit.errors import InputError, UnsupportedError
from tracekit.models.losses import NO_TARGET, mean_loss, own_losses, targets_of, token_losses
from tracekit.models.passes import is_encoder_decoder
from tracekit.models.signatures import accepts

_KINDS: Final = ("logits", "loss", "both", "predictions", None)


class LogitsAndLoss(NamedTuple):
    """The logits of a pass, and their loss."""

    logits: Tensor
    loss: Tensor


@final
@dataclass(frozen=True)
class Answer:
    """What is wanted of a pass."""

    kind: str | None
    per_token: bool
    labels: Any = None

    def check(self, module: Any, tokenizer: Any) -> None:
        """Raise before the pass for what would fail behind it."""
        if self.kind not in _KINDS:
            raise InputError(
                f"return_type= is 'logits', 'loss', 'both', 'predictions' or None, not "
                f"{self.kind!r}."
            )
        if not self._has_loss and (self.per_token or self.labels is not None):
            name = "loss_per_token=True" if self.per_token else "labels="
            raise InputError(f"{name} is about the loss: give return_type='loss' or 'both'.")
        if self.labels is not None and not accepts(module, "labels"):
            raise InputError(f"{type(module).__name__} takes no labels=.")
        if self.kind == "predictions" and tokenizer is None:
            raise InputError(
                "return_type='predictions' is text, and needs a tokenizer: LanguageModel(module, "
                "tokenizer=…)."
            )

    def of(self, outputs: Any, inputs: dict[str, Any], module: Any, tokenizer: Any) -> Any:
        """The answer, from what the model returned for `inputs`."""
        if self.kind is None:
            return None
        logits = getattr(outputs, "logits", None)
        if not isinstance(logits, Tensor):
            raise InputError(
                f"{type(module).__name__} returned {type(outputs).__name__}, which has no logits: "
                f"model(input) returns all of it."
            )
        if self.kind == "logits":
            return logits
        if self.kind == "predictions":
            return _predictions(logits, inputs, module, tokenizer)
        loss = self._loss(outputs, logits, inputs, module)
        return loss if self.kind == "loss" else LogitsAndLoss(logits, loss)

    @property
    def _has_loss(self) -> bool:
        return self.kind in ("loss", "both")

    def _loss(self, outputs: Any, logits: Tensor, inputs: dict[str, Any], module: Any) -> Tensor:
        labels = inputs.get("labels")
        if isinstance(labels, Tensor):
            own = outputs.loss
            return own_losses(module, logits, labels, own) if self.per_token else own
        _check_vocabulary(logits, module)
        targets = targets_of(module, inputs, logits.shape[1])
        losses = token_losses(logits[:, :-1], targets)
        return losses if self.per_token else mean_loss(losses, targets)


def labels_of(given: Any, module: Any, tokenizer: Any) -> Any:
    """`labels=` as ids: of text the tokens, for an encoder-decoder, NO_TARGET at padding."""
    texts = [given] if isinstance(given, str) else given
    is_text = isinstance(texts, (list, tuple)) and all(isinstance(each, str) for each in texts)
    if not is_text:
        if given is None or isinstance(given, Tensor):
            return given
        raise InputError(
            f"labels= are ids in a tensor [batch, pos], or texts, not {type(given).__name__}."
        )
    if tokenizer is None or not is_encoder_decoder(module):
        raise InputError(
            "labels= as text are what an encoder-decoder with a tokenizer is to say; here they are "
            "ids, with -100 where nothing counts."
        )
    found = tokenizer(
        text_target=list(texts), padding=True, padding_side="right", return_tensors="pt"
    )
    return found["input_ids"].masked_fill(found["attention_mask"] == 0, NO_TARGET)


def _check_vocabulary(logits: Tensor, module: Any) -> None:
    if logits.dim() != 3:
        raise UnsupportedError(
            f"the logits of {type(module).__name__} have shape {tuple(logits.shape)}, not [batch, "
            f"pos, vocabulary]: they are not of tokens."
        )


def _predictions(
    logits: Tensor, inputs: dict[str, Any], module: Any, tokenizer: Any
) -> list[str] | list[list[str]]:
    _check_vocabulary(logits, module)
    ids = inputs.get("input_ids")
    if module.can_generate():
        name = "decoder_attention_mask" if is_encoder_decoder(module) else "attention_mask"
        last = _last(logits, inputs.get(name))
        return [_text(token, tokenizer) for token in last.argmax(-1)]
    if not isinstance(ids, Tensor) or tokenizer.mask_token_id is None:
        raise InputError(
            "predictions of this model are for mask tokens: give text or ids, and a tokenizer that "
            "has a mask_token."
        )
    rows = zip(logits, ids == tokenizer.mask_token_id, strict=True)
    return [[_text(token, tokenizer) for token in row[there].argmax(-1)] for row, there in rows]


def _last(logits: Tensor, mask: Any) -> Tensor:
    """`[batch, vocabulary]`: those of each row's last token."""
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return logits[:, -1]
    own = mask[:, -logits.shape[1] :].bool()
    columns = torch.arange(own.shape[1], device=own.device)
    return logits[torch.arange(len(logits)), (columns * own).argmax(-1)]


def _text(token: Tensor, tokenizer: Any) -> str:
    return tokenizer.decode([int(token)], clean_up_tokenization_spaces=False)
