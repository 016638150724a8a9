"""Go on from a run that was kept: its residual stream, and its keys and values, for parts of it."""

# A run with a change at layer l and position p is that run up to there. So only layers from l on
# are computed, from its residual stream, and only positions from p on, behind its keys and values.

# pyright: reportPrivateUsage=false

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias, final

from torch import Tensor

from tracekit.core.tree import Tree
from tracekit.errors import TracekitError
from tracekit.models.face import both, run_with_hooks
from tracekit.models.kv_layers import Filled
from tracekit.models.language import LanguageModel
from tracekit.models.prefix import Prefix
from tracekit.models.probing import deviation, tolerance
from tracekit.models.signatures import accepts
from tracekit.models.starting import Begun, Detours, begin
from tracekit.tracing.call import Follower, TracedCall
from tracekit.tracing.declared import run_to_end
from tracekit.tracing.hooked import Function, Hooked
from tracekit.tracing.wanted import Names, Spot, wanted

Pair: TypeAlias = tuple[Names, Function]


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
    can_narrow: bool = False  # to the last position, in the last layer
    detours: Detours = field(default_factory=Detours, repr=False)

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
    logits, cache = model.run_with_cache(ids, names_filter=["resid_pre", ("resid_post", count - 1)])
    stream = [cache["resid_pre", number] for number in range(count)]
    prefix, why = _prefix(model, ids)
    found = Kept((*stream, cache["resid_post", count - 1]), prefix, why)
    return replace(found, can_narrow=_can_narrow(model, found, logits[:, -1]))


def _prefix(model: LanguageModel, ids: Tensor) -> tuple[Prefix | None, str]:
    """The keys and values of all positions in every layer, which can be cut anywhere."""
    from transformers import DynamicCache

    try:
        # One that was made for no model keeps all positions; that of a model with sliding windows
        # forgets them. The mask is that of the window all the same.
        found = model.prefill(ids, past_key_values=DynamicCache())
    except TracekitError as error:
        return None, str(error.args[0]).partition(" Trace the whole text")[0].removesuffix(".")
    except Exception as error:  # noqa: BLE001 - models fail in any way on a cache not of their own
        return (
            None,
            f"its layers don't take a plain cache of keys and values ({type(error).__name__})",
        )
    if not found.is_plain or len(found.kinds) != len(model.layers):
        return None, "its keys and values are not those of one plain attention in each layer"
    return found, ""


def resume(
    model: LanguageModel,
    kept: Kept,
    residual: Tensor,
    layer: int,
    position: int = 0,
    fwd_hooks: Sequence[Pair] = (),
    is_narrowed: bool = False,
) -> Tensor:
    """The logits `[rows, vocabulary]` at the last position of a run that goes on from `kept`.

    `residual` `[rows, pos, model]` is in front of `layer` (behind the last, if it is their count),
    from `position` on up to the end. Functions at activations see these positions alone.
    If `is_narrowed`, and that can be, the last layer is computed for the last position alone, in a
    call of its own. UnsupportedError if the model can't begin there.
    """
    if is_narrowed and kept.can_narrow and layer < kept.layers and residual.shape[1] > 1:
        found = _narrowed(model, kept, residual, layer, position, fwd_hooks)
        if found is not None:
            return found
    prefix = None
    if position:
        assert kept.prefix is not None
        prefix = kept.prefix.cut(position)
    functions = both(model._tree, fwd_hooks, ())
    return _last_logits(model, kept, residual, layer, prefix, functions)


def _last_logits(
    model: LanguageModel,
    kept: Kept,
    residual: Tensor,
    layer: int,
    prefix: Prefix | None,
    functions: Sequence[Hooked],
) -> Tensor:
    begun = _begun(model, kept, residual, layer, prefix)
    begun.check(functions, None)
    found: Any = run_with_hooks(model._start(begun), begun.call, functions)
    return found[:, -1]


def _begun(
    model: LanguageModel, kept: Kept, residual: Tensor, layer: int, prefix: Prefix | None
) -> Begun:
    options: dict[str, Any] = {} if prefix is None else {"prefix": prefix}
    if accepts(model.module, "logits_to_keep"):
        options["logits_to_keep"] = 1
    return begin(model._tree, (residual,), layer, options, model._begin_with, kept.detours)


# -- the last layer, for the last position --------------------------------------------------------

# Of the last layer others than the last position are read as keys and values alone. So a run ends
# when that layer has its keys and values, and the last position goes through it by itself.


def _narrowed(
    model: LanguageModel,
    kept: Kept,
    residual: Tensor,
    layer: int,
    position: int,
    fwd_hooks: Sequence[Pair],
) -> Tensor | None:
    """The same, with the last layer computed for the last position; None if that can't be."""
    last = kept.layers - 1
    functions = both(model._tree, fwd_hooks, ())
    if any(_is_from(model, spot, last) for each in functions for spot in each.spots):
        return None
    assert kept.prefix is not None
    prefix, filled = kept.prefix.cut(position).ending(last)
    streams: list[Tensor] = [residual[:, -1:]]
    if layer < last:
        look = [(("resid_pre", last), lambda value, _: streams.append(value[:, -1:].clone()))]
        functions += both(model._tree, look, ())
    begun = _begun(model, kept, residual, layer, prefix)

    def made(follower: Follower | None) -> None:
        with suppress(Filled):
            begun.call.make(follower)

    begun.check(functions, None)
    run_to_end(model._start(begun)(TracedCall(made), functions))
    if len(filled) != 1:
        return None
    keys, values = (each[:, :, :-1] for each in filled[0])
    before = kept.prefix.cut(kept.length - 1).replaced(last, keys, values)
    return _last_logits(model, kept, streams[-1], last, before, ())


def _is_from(model: LanguageModel, spot: Spot, layer: int) -> bool:
    """Whether an activation is not in front of that layer for certain."""
    number = number_of_layer(model, spot)
    return number is None or number >= layer


def _can_narrow(model: LanguageModel, kept: Kept, logits: Tensor) -> bool:
    """Whether the last layer can be computed for the last position alone, as tried."""
    if kept.prefix is None or kept.length < 2:
        return False
    layer, position = max(kept.layers - 2, 0), kept.length // 2 * (kept.length > 2)
    try:
        found = _narrowed(model, kept, kept.stream[layer][:, position:], layer, position, ())
    except Exception:  # noqa: BLE001 - a model may fail in any way: then it is computed whole
        return False
    return found is not None and deviation(found, logits) <= tolerance(logits)


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
