"""Begin a run with the residual stream in front of a layer: nothing before it is computed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final, final

import torch
from torch import Tensor, nn

from tracekit.core.nest import describe
from tracekit.core.tree import Tree
from tracekit.errors import CacheError, InputError, UnsupportedError
from tracekit.models.behind import Behind, run_behind
from tracekit.models.passes import is_encoder_decoder
from tracekit.models.routes import Route, route_of, routes_of, why_closed
from tracekit.models.signatures import accepts
from tracekit.tracing.call import TracedCall
from tracekit.tracing.cut import StopAt, count_layers
from tracekit.tracing.hooked import Hooked
from tracekit.tracing.wanted import Spot

_IN_FRONT: Final = ("embed_out", "pos_embed_out")
_OTHERS: Final = ("input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds")

# Completes the inputs of a run, as it does those of any other.
Fit = Callable[[dict[str, Any]], dict[str, Any]]


@final
@dataclass(frozen=True)
class Begun:
    """A run that begins in front of a layer: the model that runs, its inputs, the way it goes."""

    tree: Tree
    inputs: dict[str, Any]
    route: Route

    @property
    def call(self) -> TracedCall:
        """The run."""
        return TracedCall(lambda follower: run_behind(self.tree, follower, (), self.inputs))

    def left(self, spots: Iterable[Spot]) -> list[Spot]:
        """The activations that are computed; CacheError for another that was asked for."""
        found: list[Spot] = []
        for spot in spots:
            if not self._is_in_front(spot):
                found.append(spot)
            elif spot.is_named:
                self._refuse(spot.spelled)
        return found

    def check(self, functions: Iterable[Hooked], stop: StopAt | None) -> None:
        """Raise if a function is to be called where nothing is computed, or nothing is left."""
        for one in functions:
            if all(map(self._is_in_front, one.spots)):
                self._refuse(one.spots[0].spelled)
        if stop is not None and stop.number <= self.route.number:
            raise InputError(
                f"start_at_layer={self.route.number} and stop_at_layer={stop.number}: no layer is "
                f"between them; stop_at_layer= is a later one."
            )

    def _is_in_front(self, spot: Spot) -> bool:
        key = spot.named.key
        if key.stack == "layers" and key.layer is not None:
            return key.layer < self.route.number
        return self.tree.is_gone(spot.site.path) or key.name in _IN_FRONT

    def _refuse(self, spelled: str) -> None:
        raise CacheError(
            f"{spelled} is in front of start_at_layer={self.route.number}: it is not computed."
        )


@final
class Detours:
    """The models that go round the first layers of one, each made once, for one run at a time."""

    def __init__(self) -> None:
        self._made: dict[int, tuple[Route, Tree]] = {}
        self._residual: Tensor | None = None

    def tree(self, tree: Tree, route: Route, residual: Tensor) -> Tree:
        """That of a route, with a residual stream for the next run."""
        self._residual = residual
        made = self._made.get(route.number)
        if made is None or made[0] is not route or made[1].original is not tree:
            made = self._made[route.number] = route, route.of(tree, self._given)
        return made[1]

    def _given(self) -> Tensor:
        assert self._residual is not None
        return self._residual


def begin(
    tree: Tree,
    args: tuple[Any, ...],
    layer: int,
    kwargs: dict[str, Any],
    fit: Fit,
    detours: Detours | None = None,
) -> Begun:
    """The run of the model on `args`, a residual stream, from a layer on.

    By one of `detours`, if whoever has them makes one run at a time. InputError for what is no
    residual stream; UnsupportedError for a model that is not right so.
    """
    residual = _residual(args, layer)
    number = _number(tree, layer)
    root = tree.root
    name = "decoder_inputs_embeds" if is_encoder_decoder(root) else "inputs_embeds"
    _check(root, name, kwargs)
    inputs = fit({name: torch.zeros_like(residual), **kwargs})
    if accepts(root, "use_cache"):
        inputs.setdefault("use_cache", False)
    tree.refresh_if_changed()
    found = inputs.get("prefix")
    behind = found if isinstance(found, Behind) else None
    route = why_closed(tree, number) or _route(tree, number, kwargs, behind)
    if isinstance(route, str):
        raise UnsupportedError(
            f"start_at_layer={layer}: {type(root).__name__} can't go on from the residual stream "
            f"in front of layer {number}: {route}. Run it on tokens, with stop_at_layer= or "
            f"names_filter= for less."
        )
    return Begun((detours or Detours()).tree(tree, route, residual), inputs, route)


def _route(tree: Tree, number: int, kwargs: dict[str, Any], behind: Behind | None) -> Route | str:
    """The way, proved the first time that it is asked for; or why there is none."""
    known, why = tree.routes.get(number), tree.routes.get(("behind", number))
    assert known is None or isinstance(known, (Route, str))
    if behind is None:
        if known is None:
            tree.routes[number] = known = route_of(tree, number, kwargs)
        return known
    if behind.grown is not None:
        raise InputError(
            "start_at_layer= goes behind what model.prefill(prompt) returns, which no run changes; "
            "a KeyValueCache would grow in some of its layers alone."
        )
    if isinstance(known, str):
        return known
    if known is None or why is None:
        known, why = routes_of(behind.prefix.model, tree, number, kwargs, known)
        tree.routes[number], tree.routes["behind", number] = known, why
    assert isinstance(why, str)
    return why or known


# -- what is given --------------------------------------------------------------------------------


def _residual(args: tuple[Any, ...], layer: int) -> Tensor:
    given = args[0] if len(args) == 1 else None
    if isinstance(given, Tensor) and given.is_floating_point() and given.dim() == 3:
        return given
    what = describe(args[0]) if len(args) == 1 else f"{len(args)} inputs"
    raise InputError(
        f"start_at_layer={layer} goes on from a residual stream [batch, pos, model], as in "
        f'model.run_with_cache(cache["resid_pre", {layer}], start_at_layer={layer}); not from '
        f"{what}."
    )


def _number(tree: Tree, layer: int) -> int:
    count = count_layers(tree, "start_at_layer=")
    if not -count <= layer <= count:
        raise InputError(
            f"start_at_layer={layer}: there are {count} layers; {count} is behind the last."
        )
    return layer % count if layer < 0 else layer


def _check(root: nn.Module, name: str, kwargs: dict[str, Any]) -> None:
    for other in (*_OTHERS, "past_key_values", "cache_params"):
        if kwargs.get(other) is not None:
            raise InputError(
                f"{other}= and start_at_layer= do not go together: the residual stream takes the "
                f"place of all tokens."
            )
    if is_encoder_decoder(root) and kwargs.get("prefix") is not None:
        raise UnsupportedError(
            "start_at_layer= behind a prefix is for models without an encoder: leave prefix= out, "
            "and give encoder_outputs=."
        )
    if is_encoder_decoder(root) and kwargs.get("encoder_outputs") is None:
        raise InputError(
            "start_at_layer= is about the decoder of this model: give encoder_outputs= beside the "
            "residual stream, and the attention_mask= of the source if it has padding."
        )
    if not accepts(root, name):
        raise UnsupportedError(
            f"start_at_layer= needs a forward that takes {name}=, and that of "
            f"{type(root).__name__} does not."
        )
