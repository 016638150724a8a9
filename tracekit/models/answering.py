"""A language model that answers: forward() gives logits, losses or predictions of one pass."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tracekit.capture import showing_own_lines
from tracekit.errors import InputError
from tracekit.models.answers import Answer, labels_of
from tracekit.models.losses import loss_of
from tracekit.models.tokenized import Tokenized
from tracekit.tracing.edits import run_edited


class Answering(Tokenized):
    """A model with a tokenizer, whose passes are asked for what they say."""

    __slots__ = ()

    @showing_own_lines
    def forward(
        self,
        *args: Any,
        return_type: str | None = "logits",
        loss_per_token: bool = False,
        labels: Any = None,
        start_at_layer: int | None = None,
        tokens: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """What one pass over `input` says: takes what `trace` takes, and makes the lasting edits.

        `return_type` is "logits", `[batch, pos, vocabulary]`; "loss"; "both", as `(logits, loss)`;
        "predictions"; or None, for who only wants it to run.

        The loss, in nats, is the mean over all tokens that have a token in front of them: padding
        counts for nothing, the first token of a row is not foretold, and placeholders of images
        and sounds are no targets. `loss_per_token=True`: `[batch, pos - 1]`, 0 at padding. With
        `labels=`, for encoder-decoders and masked models, it is the model's own loss; of the
        former they may be texts. Refused where a model sees the token that it is to foretell.
        "predictions" are the likeliest next token of each row as text, or, of a masked model, a
        list for each row, one for each mask.

        With `start_at_layer=k` the input is the residual stream in front of that layer, and nothing
        before it is computed; the loss is then that of `tokens=`, `[batch, pos]`.
        """
        answer = Answer(return_type, loss_per_token, labels)
        module = self._tree.root
        answer.check(module, self.tokenizer)
        if labels is not None:
            kwargs = {**kwargs, "labels": labels_of(labels, module, self.tokenizer)}
        if start_at_layer is not None:
            inputs, outputs = self._begun_outputs(start_at_layer, args, kwargs)
            inputs = inputs if tokens is None else {**inputs, "input_ids": tokens}
        elif tokens is not None:
            raise InputError("tokens= goes with start_at_layer=: else the input has them.")
        else:
            inputs, outputs = self._outputs(args, kwargs)
        return answer.of(outputs, inputs, self._tree.root, self.tokenizer)

    @showing_own_lines
    def loss_fn(
        self,
        logits: Tensor,
        tokens: Tensor,
        attention_mask: Tensor | None = None,
        per_token: bool = False,
    ) -> Tensor:
        """The loss of logits, as from a trace, on their own next tokens: what `forward` computes.

        The mean, or with `per_token` `[batch, pos - 1]`, 0 where attention_mask has padding.
        """
        return loss_of(logits, tokens, attention_mask, per_token)

    def _begun_outputs(
        self, layer: int, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[dict[str, Any], Any]:
        """The same, of a pass on a residual stream."""
        begun = self._begun(layer, args, kwargs)
        assert begun is not None
        call = begun.call
        edited = self._interventions()
        return begun.inputs, (
            run_edited(begun.tree, call, None, edited) if edited else call.make(None)
        )

    def _outputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[dict[str, Any], Any]:
        """The inputs of one pass with the lasting edits, as `trace` makes it, and its outputs."""
        raise NotImplementedError
