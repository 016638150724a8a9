"""The logit lens: what each layer's residual stream would say, were it the last."""

# nostalgebraist 2020, "interpreting GPT: the logit lens".

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, TypeAlias, final

import torch
from torch import Tensor

from tracekit.analysis.labelled import Axis, Labelled
from tracekit.analysis.metrics import Tokens, token_ids
from tracekit.analysis.prompts import numbered, one_prompt, position_axis, words_of
from tracekit.analysis.unembedding import final_name, reading_of
from tracekit.capture import showing_own_lines
from tracekit.errors import InputError
from tracekit.models.language import LanguageModel

SHOWN: Final = 8  # positions in the text of a lens, the last ones
WIDTH: Final = 14  # characters of one cell

# The token that is followed: one, or one for each position; None: what the model says in the end.
Chosen: TypeAlias = "Tokens | None"


@final
@dataclass(frozen=True, repr=False)
class Lens:
    """What every layer would say at every position of a prompt.

    `top.values` are probabilities, [layer, position, rank]; `words` and `ids` the tokens they are
    of. Of `chosen`, one token for each position: `probability`, and `rank`, the number of tokens
    that are likelier (0: it is the likeliest). `entropy` of what a layer says, and `divergence`,
    KL(what the model says | what the layer says), in nats. The first layer is "embed", what the
    layers begin with; the last one says what the model says.
    """

    activation: str
    tokens: tuple[str, ...]  # of the prompt
    top: Labelled
    ids: Tensor  # [layer, position, rank]
    words: list[list[list[str]]]
    chosen: tuple[str, ...]
    probability: Labelled
    rank: Labelled
    entropy: Labelled
    divergence: Labelled

    @property
    def layers(self) -> tuple[str, ...]:
        """The label of each layer."""
        return self.top.labels("layer")

    def to_json(self) -> dict[str, Any]:
        """All of it in lists and strings: `says[layer][position]` are its likeliest tokens."""
        says = [
            [
                [{"token": word, "probability": each} for word, each in zip(*cell, strict=True)]
                for cell in zip(words, values, strict=True)
            ]
            for words, values in zip(self.words, self.top.values.tolist(), strict=True)
        ]
        numbers = {
            name: getattr(self, name).values.tolist()
            for name in ("probability", "rank", "entropy", "divergence")
        }
        return {
            "activation": self.activation,
            "layers": list(self.layers),
            "tokens": list(self.tokens),
            "says": says,
            "chosen": list(self.chosen),
            **numbers,
        }

    def __repr__(self) -> str:
        first = max(0, len(self.tokens) - SHOWN)
        side = max(map(len, self.layers))
        head = "".join(f"{_cut(token, WIDTH - 1):>{WIDTH}}" for token in self.tokens[first:])
        lines = [self._told(first), f"  {'':{side}}{head}"]
        for label, words, values in zip(
            self.layers, self.words, self.top.values[..., 0].tolist(), strict=True
        ):
            cells = zip(words[first:], values[first:], strict=True)
            row = "".join(f"{_cut(word[0], WIDTH - 6):>{WIDTH - 5}} {p:4.0%}" for word, p in cells)
            lines.append(f"  {label:{side}}{row}")
        return "\n".join(lines)

    def _told(self, first: int) -> str:
        ranks = [int(each) for each in self.rank.values[:, -1]]
        left = f", the last {SHOWN} shown" if first else ""
        return (
            f"Lens({self.activation}: {len(self.layers)} layers, {len(self.tokens)} positions{left}"
            f"; rank of {self.chosen[-1]!r} at the last: {' '.join(map(str, ranks))})"
        )


@showing_own_lines
@torch.no_grad()
def logit_lens(
    model: LanguageModel,
    input: Any,
    token: Chosen = None,
    *,
    activation: str = "resid_post",
    top: int = 5,
) -> Lens:
    """What each layer of `model` would say of one prompt: `logit_lens(model, "The Tower is in")`.

    The residual stream of a layer (`activation`: resid_post, resid_mid, resid_pre), read as the
    model reads its last one: final norm, unembedding, and any scale or cap behind it. `token` is
    followed through the layers: one for all positions, or one for each; None is what the model says
    at the last. UnsupportedError for a model whose logits can't be had so. nostalgebraist 2020.
    """
    if top < 1:
        raise InputError(f"top= is at least 1, not {top}.")
    prompts = one_prompt(model, input, "logit_lens")
    last = final_name(model)
    names = [("resid_pre", 0), activation, last]
    logits, cache = model.run_with_cache(**prompts.inputs, names_filter=names)
    reading, final = reading_of(model, prompts, cache[last], logits)
    numbers = cache.layers_of(activation)
    streams = [cache[activation, number] for number in numbers]
    labels = [*map(str, numbers)]
    if activation == "resid_post":  # of the last layer it is what the model goes on with
        streams, labels = [cache["resid_pre", 0], *streams[:-1]], ["embed", *labels]
    else:
        labels.append("final")
    says = _Says(final, _ids(model, token, final), min(top, final.shape[-1]))
    for stream in streams:
        says.add(reading(stream))
    says.add(final)
    layers, positions = Axis("layer", tuple(labels)), position_axis(model, prompts)
    return says.lens(model, activation, layers, positions)


def _ids(model: LanguageModel, token: Chosen, final: Tensor) -> Tensor:
    """The token that is followed at each position: `[pos]`."""
    count = final.shape[1]
    if token is None:
        return final[0, -1].argmax().expand(count)
    found = token_ids(model, token)
    if len(found) not in (1, count):
        raise InputError(f"token= is one, or one for each of {count} positions, not {len(found)}.")
    return torch.tensor(found, device=final.device).expand(count)


class _Says:
    """What the layers say, one after the other; of each the whole distribution for a moment."""

    def __init__(self, final: Tensor, chosen: Tensor, count: int) -> None:
        self._final = final[0].float().log_softmax(-1)
        self._chosen = chosen
        self._count = count
        self._found: dict[str, list[Tensor]] = {}

    def add(self, logits: Tensor) -> None:
        """The next layer's logits, `[1, pos, vocabulary]`."""
        says = logits[0].float().log_softmax(-1)
        own = says.gather(-1, self._chosen[:, None])
        best = says.topk(self._count, -1)
        self._keep("top", best.values.exp())
        self._keep("ids", best.indices)
        self._keep("probability", own[:, 0].exp())
        self._keep("rank", (says > own).sum(-1))
        self._keep("entropy", -(says.exp() * says).nan_to_num().sum(-1))
        self._keep("divergence", (self._final.exp() * (self._final - says)).nan_to_num().sum(-1))

    def _keep(self, name: str, value: Tensor) -> None:
        self._found.setdefault(name, []).append(value)

    def lens(self, model: LanguageModel, activation: str, layers: Axis, positions: Axis) -> Lens:
        """All of it, labelled."""
        every = {name: torch.stack(values) for name, values in self._found.items()}
        axes = (layers, positions)
        words = [[list(words_of(model, cell)) for cell in row] for row in every["ids"]]
        chosen = words_of(model, self._chosen)
        of_one = f" of {chosen[0]!r}" if len(set(chosen)) == 1 else ""
        ranks = numbered("rank", self._count)
        return Lens(
            activation,
            positions.labels,
            Labelled(every["top"], (*axes, ranks), "probability"),
            every["ids"],
            words,
            chosen,
            Labelled(every["probability"], axes, f"probability{of_one}"),
            Labelled(every["rank"], axes, f"rank{of_one}"),
            Labelled(every["entropy"], axes, "entropy in nats"),
            Labelled(every["divergence"], axes, "KL divergence in nats"),
        )


def _cut(text: str, width: int) -> str:
    shown = repr(text)[1:-1] if text != text.strip() or not text.isprintable() else text
    return shown if len(shown) <= width else f"{shown[: width - 1]}…"
