"""Where activations are taken: sites with a value for each token, and where a forward may end."""

# pyright: reportPrivateUsage=false

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from torch import Tensor

from tracekit.errors import UnsupportedError
from tracekit.models.language import LanguageModel
from tracekit.tracing.wanted import Names, Spot, wanted

_BY_TOKEN = ("batch pos", "batch*pos")


@final
@dataclass(frozen=True)
class Sites:
    """The keys of the sites, in the order of the model; `stop` is the layer behind the last."""

    keys: tuple[str, ...]
    stop: int | None

    def rows_of(self, key: str, value: Tensor, shape: Sequence[int]) -> Tensor:
        """The value as `[batch * pos, …]`; UnsupportedError if it is not one for each token."""
        batch, pos = shape
        if tuple(value.shape[:2]) == (batch, pos):
            return value.flatten(0, 1)
        if len(value) == batch * pos:
            return value
        raise UnsupportedError(
            f"{key} is {list(value.shape)} for tokens {list(shape)}: it has no value for each "
            f"token, and so no row of a table. Record it with tracer.cache(), and cache.save()."
        )


def sites_of(model: LanguageModel, names: Names) -> Sites:
    """The sites meant; errors for names that the model does not have."""
    model.dispatch()
    spots = wanted(model._tree, names, "sites=")
    for spot in spots:
        shape = spot.named.bound.shape
        if shape and not shape.startswith(_BY_TOKEN):
            raise UnsupportedError(
                f"{spot.key} is [{', '.join(shape.split())}]: it has no value for each token, and "
                f"so no row of a table. Record it with tracer.cache(), and cache.save()."
            )
    layers = [_layer_of(model, spot) for spot in spots]
    known = [layer for layer in layers if layer is not None]
    is_known = len(known) == len(layers)
    return Sites(tuple(spot.key for spot in spots), max(known) + 1 if is_known else None)


def _layer_of(model: LanguageModel, spot: Spot) -> int | None:
    """The layer that a site is in; None if it is in none, or in several that share modules."""
    key = spot.named.key
    if spot.named.bound.shape:
        return key.layer if key.stack == "layers" else None
    try:
        paths = [layer.path for layer in model.layers]
    except AttributeError:
        return None
    found = [n for n, path in enumerate(paths) if f"{spot.site.path}.".startswith(f"{path}.")]
    return found[0] if len(found) == 1 else None
