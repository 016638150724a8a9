"""What is known of a model that lies on several ranks: which of its values are whole."""

from __future__ import annotations

from typing import Any, Final, NamedTuple, TypeAlias, final

import torch
from torch import nn

from tracekit.core.shares import Ranks, Share
from tracekit.core.site import Site

Key: TypeAlias = "tuple[Any, ...]"  # the way to a tensor in a value


class Unlike(NamedTuple):
    """The ranks have different numbers, and how they make a whole is not known."""

    why: str


class Whole(NamedTuple):
    """All ranks have the same numbers."""


WHOLE: Final = Whole()
Known: TypeAlias = "Whole | Share | Unlike"


@final
class Sharding:
    """Where the values of one model lie."""

    def __init__(self, root: nn.Module, name: str, ranks: Ranks, device: torch.device) -> None:
        self.ranks = ranks
        self.device = device  # of this rank's part
        self.root = root
        self.joints: list[str] = []  # modules in which the model itself waits for the other ranks
        self.meeting: Any = None  # where the ranks meet (interleave/meeting.py)
        self._known: dict[Site, dict[Key, Known]] = {}
        named = root.named_modules()
        self._paths = {id(module): f"{name}.{path}" if path else name for path, module in named}

    def learn(self, site: Site, known: dict[Key, Known]) -> None:
        """The value at `site` lies so."""
        self._known[site] = known

    def known(self, site: Site, key: Key) -> Known | None:
        """How a tensor in the value at `site` lies; None if nobody knows."""
        return self._known.get(site, {}).get(key)

    def is_whole(self, site: Site) -> bool:
        """Whether all of the value at `site` is known to be the same on all ranks."""
        known = self._known.get(site)
        return known is not None and all(each is WHOLE for each in known.values())

    def is_divided(self, site: Site) -> bool:
        """Whether something in the value at `site` is not the same on all ranks."""
        return any(each is not WHOLE for each in self._known.get(site, {}).values())

    def path_of(self, module: nn.Module) -> str:
        """The path of a module of the model, the first if it has several."""
        return self._paths[id(module)]

    @property
    def has_chance(self) -> bool:
        """Whether values may differ by what each rank draws (dropout)."""
        return self.root.training
