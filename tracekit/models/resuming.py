"""Go on from a run that was kept: its residual stream, and its keys and values, for parts of it."""

# A run with a change at layer l and position p is that run up to there. So only layers from l on
# are computed, from its residual stream, and only positions from p on, behind its keys and values.

# pyright: reportPrivateUsage=false

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

from torch import Tensor

from tracekit.core.tree import Tree
from tracekit.errors import TracekitError
from tracekit.models.language import LanguageModel
from tracekit.models.prefix import Prefix
from tracekit.models.signatures import accepts
from tracekit.tracing.hooked import Pairs
from tracekit.tracing.wanted import Names, Spot, wanted


@final
@dataclass(frozen=True)
class Kept:
    """What was kept of a run of one prompt.

    `stream` is the residual stream `[1, pos, model]` in front of each layer, and behind the last;
    `prefix` the keys and values of all layers, None if the model can't go on behind them: then
    `why_whole` says why.
    """

    stream: tuple[Tensor, ...]
    prefix: Prefix | None
    why_whole: str

    @property
    def layers(self) -> int:
        """How many layers there are."""
        return len(self.stream) - 1

    @property
    def length(self) -> int:
        """How many positions there are."""
        return int(self.stream[0].shape[1])


def keep(model: LanguageModel, ids: Tensor) -> Kept:
    """Run a prompt `[1, pos]`, and keep what others can go on from."""
    count = len(model.layers)
    _, cache = model.run_with_cache(ids, names_filter=["resid_pre", ("resid_post", count - 1)])
    stream = [cache["resid_pre", number] for number in range(count)]
    prefix, why = _prefix(model, ids)
    return Kept((*stream, cache["resid_post", count - 1]), prefix, why)


def _prefix(model: LanguageModel, ids: Tensor) -> tuple[Prefix | None, str]:
    """The keys and values of all positions in every layer, which can be cut anywhere."""
    from transformers import DynamicCache

    try:
        # One that was made for no model keeps all positions; that of a model with sliding windows
        # forgets them. The mask is that of the window all the same.
        found = model.prefill(ids, past_key_values=DynamicCache())
    except TracekitError as error:
        return None, str(error.args[0])
    except Exception as error:  # noqa: BLE001 - models fail in any way on a cache not of their own
        return None, f"its layers don't take a plain cache of keys and values ({error})"
    if not found.is_plain or len(found.kinds) != len(model.layers):
        return None, "its keys and values are not those of one plain attention in each layer"
    return found, ""


def resume(
    model: LanguageModel,
    kept: Kept,
    residual: Tensor,
    layer: int,
    position: int = 0,
    fwd_hooks: Pairs = (),
) -> Tensor:
    """The logits `[rows, vocabulary]` at the last position of a run that goes on from `kept`.

    `residual` `[rows, pos, model]` is in front of `layer` (behind the last, if it is their count),
    from `position` on up to the end. Functions at activations see these positions alone.
    UnsupportedError if the model can't begin there.
    """
    options: dict[str, Any] = {}
    if accepts(model.module, "logits_to_keep"):
        options["logits_to_keep"] = 1
    if position:
        assert kept.prefix is not None
        options["prefix"] = kept.prefix.crop(position)
    found = model.run_with_hooks(residual, start_at_layer=layer, fwd_hooks=fwd_hooks, **options)
    return found[:, -1]


def spots_of(model: LanguageModel, names: Names, what: str) -> list[Spot]:
    """The activations meant, each once, in the order of the model."""
    return wanted(model._tree, names, what)


def number_of_layer(model: LanguageModel, spot: Spot) -> int | None:
    """In which layer of the main stack an activation is; None if in none."""
    tree: Tree = model._tree
    key = spot.named.key
    if key.layer is not None:
        return key.layer if key.stack == "layers" else None
    if tree.names is None:
        return None
    for number, (path, *_) in enumerate(tree.names.stacks.get("layers", ())):
        full = tree.aliases.get(f"{tree.name}.{path}", f"{tree.name}.{path}")
        if f"{spot.site.path}.".startswith(f"{full}."):
            return number
    return None


def is_edited(model: LanguageModel) -> bool:
    """Whether lasting edits, or functions at activations, are made in every run of the model."""
    return model._is_edited


def repeated(inputs: dict[str, Any], rows: int) -> dict[str, Any]:
    """The inputs of one prompt, for several rows."""
    return {
        name: value.repeat_interleave(rows, 0) if isinstance(value, Tensor) else value
        for name, value in inputs.items()
    }
