"""The keys of activations: `layers.3.resid_post`, in every spelling, and where each is."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NamedTuple, final

from tracekit.architectures.hook_names import BLOCK_HOOKS, KINDS, ROOT_HOOKS, SHORT, STACKS
from tracekit.architectures.layouts import HeadsFirst
from tracekit.core.words import BLOCK_ACTIVATIONS, ROOT_ACTIVATIONS

if TYPE_CHECKING:
    from tracekit.architectures.binding import Bound, Names

_INDEXED: Final = re.compile(r"(\w+)\.(-?\d+)\.(.+)")
_BY_HOOK: Final = {hook: word for word, hooks in BLOCK_HOOKS.items() for hook in hooks}
_BY_ROOT_HOOK: Final = {hook: word for word, hooks in ROOT_HOOKS.items() for hook in hooks}
# They take as many times the memory of all others as there are heads: recorded if they are named.
COSTLY: Final = frozenset({"head_result"})


class Key(NamedTuple):
    """An activation by name: of which layer (None: all) of which stack (None: any), or the root."""

    name: str
    layer: int | None = None
    stack: str | None = None

    @property
    def is_of_root(self) -> bool:
        """Whether it is of the whole model."""
        return self.name in ROOT_ACTIVATIONS

    def __str__(self) -> str:
        return self.name if self.layer is None else f"{self.stack}.{self.layer}.{self.name}"

    @property
    def hook(self) -> str | None:
        """As TransformerLens has it; None if it has not."""
        if self.is_of_root:
            return ROOT_HOOKS.get(self.name, (None,))[0]
        found = BLOCK_HOOKS.get(self.name)
        if found is None or self.layer is None:
            return None
        places = [hooks for hooks, stack in STACKS.items() if stack == self.stack]
        return f"{places[0]}.{self.layer}.{found[0]}" if places else None


@final
@dataclass(frozen=True)
class Named:
    """An activation of one model: its key, and where it is."""

    key: Key
    bound: Bound
    call: int | None = None  # the how-manieth in a pass, where layers share their modules,
    calls: int = 1  # of so many

    @property
    def axis(self) -> int | None:
        """The axis of the positions in the tensor of the module; None if it has none."""
        axes = self.bound.shape.split()
        if "pos" not in axes:
            return None
        axis = axes.index("pos")
        return 2 if isinstance(self.bound.layout, HeadsFirst) and axis == 1 else axis


@final
class Spelling:
    """Reads keys in every spelling, for stacks of so many layers."""

    def __init__(self, lengths: Mapping[str, int]) -> None:
        self.lengths = lengths

    def read(self, asked: object) -> Key | None:
        """The key that is meant; None if it is none, IndexError if there is no such layer."""
        if isinstance(asked, tuple):
            return self._of_tuple(list(asked))  # pyright: ignore[reportUnknownArgumentType] - what a user gave
        return self._of_text(asked) if isinstance(asked, str) else None

    def _of_text(self, text: str) -> Key | None:
        if text in ROOT_ACTIVATIONS:
            return Key(text)
        if text in _BY_ROOT_HOOK:
            return Key(_BY_ROOT_HOOK[text])
        if text in BLOCK_ACTIVATIONS:
            return Key(text, None, None)
        indexed = _INDEXED.fullmatch(text)
        if indexed is None:
            return None
        stack, layer, name = indexed.groups()
        if stack in STACKS and name in _BY_HOOK:
            stack, name = STACKS[stack], _BY_HOOK[name]
        if stack not in self.lengths or name not in BLOCK_ACTIVATIONS:
            return None
        return Key(name, self._layer(stack, int(layer)), stack)

    def _of_tuple(self, parts: list[object]) -> Key | None:
        stacks = [each for each in parts if isinstance(each, str) and each in self.lengths]
        numbers = [each for each in parts if isinstance(each, int)]
        words = [each for each in parts if isinstance(each, str) and each not in self.lengths]
        name = _word_of(words)
        if name is None or len(numbers) > 1 or len(stacks) > 1:
            return None
        if name in ROOT_ACTIVATIONS:
            return None if numbers and name not in SHORT.values() else Key(name)
        stack = stacks[0] if stacks else None
        if not numbers:
            return Key(name, None, stack)
        stack = stack or self.main
        return None if stack is None else Key(name, self._layer(stack, numbers[0]), stack)

    @property
    def main(self) -> str | None:
        """The stack that is meant if none is named."""
        if "layers" in self.lengths or len(self.lengths) == 1:
            return "layers" if "layers" in self.lengths else next(iter(self.lengths))
        return None

    def _layer(self, stack: str, layer: int) -> int:
        count = self.lengths[stack]
        if not -count <= layer < count:
            raise IndexError(f"there are {count} {stack}, from 0; there is no {layer}")
        return layer % count


def _word_of(words: list[str]) -> str | None:
    """The standard name that is meant: one word, or TransformerLens' with its kind of module."""
    if not words or len(words) > 2:
        return None
    name, kind = words[0], KINDS.get(words[1]) if len(words) == 2 else ""
    if kind is None:
        return None
    name = f"{kind}_{name}" if kind else SHORT.get(name, name)
    return name if name in BLOCK_ACTIVATIONS or name in ROOT_ACTIVATIONS else None


@final
class Keys:
    """Every activation that a model has, by key, and the spelling of keys."""

    def __init__(self, names: Names) -> None:
        self.names = names
        self.spelling = Spelling({stack: len(places) for stack, places in names.stacks.items()})
        self.there: Mapping[str, Named] | None = None  # of them, those with modules; if found out
        self.plans: dict[bool, Any] = {}  # how all of these are recorded (tracing/named_cache.py)
        self.every: dict[str, Named] = {}
        for bound in names.points(""):
            self.every[bound.name] = Named(Key(bound.name), bound)
        for stack, places in names.stacks.items():
            found = [
                (Key(bound.name, layer, stack), bound)
                for layer, (path, _) in enumerate(places)
                for bound in names.points(path)
            ]
            counts = Counter((bound.name, bound.path) for _, bound in found)
            before: Counter[tuple[str, str]] = Counter()
            for key, bound in found:
                at = (bound.name, bound.path)
                call = before[at] if counts[at] > 1 else None  # layers share the module
                before[at] += 1
                self.every[str(key)] = Named(key, bound, call, counts[at])

    def matching(self, key: Key) -> list[Named]:
        """The activations that a key means, in all layers if it names none."""
        if key.layer is not None or key.is_of_root:
            found = self.every.get(str(key))
            return [] if found is None else [found]
        return [
            each
            for each in self.every.values()
            if each.key.name == key.name and key.stack in (None, each.key.stack)
        ]

    def why_not(self, key: Key) -> str:
        """Why there is none."""
        stack = key.stack or self.spelling.main
        owner = "" if key.is_of_root else self.names.stacks[stack or ""][key.layer or 0].path
        return self.names.why_not(owner, key.name) or "no layer has it"
