"""The standard names of one model: which module, or which value of which module, each means."""

# Paths here are below the root, without its name; the root's own is "".

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, Final, NamedTuple, final

from torch import Tensor, nn

from tracekit.architectures.keys import Keys
from tracekit.architectures.layouts import Layout, Sizes, View, Whole
from tracekit.architectures.rules import declared
from tracekit.architectures.schema import (
    Block,
    Declared,
    Family,
    Lacks,
    Point,
    Sharing,
    Stack,
    given,
    output,
)
from tracekit.architectures.weights import Stacked, Weight, is_weight, stacked, weight_of
from tracekit.core.quirks import own_children
from tracekit.core.site import Slot
from tracekit.core.words import (
    BLOCK_ACTIVATIONS,
    BLOCK_MODULES,
    PART_MODULES,
    ROOT_ACTIVATIONS,
    ROOT_MODULES,
)

_ROOT_POINTS: Final[Mapping[str, Declared]] = {
    "embed_out": output("embed"),
    "pos_embed_out": output("pos_embed"),
    "resid_final": given("final_norm"),
    "final_norm_out": output("final_norm"),
    "logits": output("unembed"),
    "image_features": output("projector"),
}
_USUAL_SIZES: Final = {
    "heads": ("num_attention_heads", "num_heads", "n_head", "n_heads"),
    "kv_heads": ("num_key_value_heads", "num_kv_heads", "num_attention_heads", "num_heads"),
}


class Place(NamedTuple):
    """A layer: its path, and the how-manieth call of it in a pass it is."""

    path: str
    call: int = 0


@dataclass(frozen=True)
class Bound:
    """An activation of one model: whose value it is, and how it lies in it."""

    name: str
    path: str
    slot: Slot
    view: View
    sharing: Sharing
    key: int | None  # which tensor of a structure; None: the first
    shape: str  # its axes, by name
    is_plain: bool  # the tensor itself, which nobody else is given
    layout: Layout = field(default_factory=Whole)


@final
@dataclass(frozen=True)
class Layer:
    """One layer of a model, or the model itself: its modules by word, and its activations."""

    modules: Mapping[str, str]
    declared: Mapping[str, Declared]
    sizes: Sizes
    block: Block | None = None

    def bound(self, name: str, shape: str) -> Bound | None:
        """The activation of that name; None if none of its modules is there."""
        found = self.declared.get(name)
        if found is None or isinstance(found, Lacks):
            return None
        points = found if isinstance(found, tuple) else (found,)
        point = next((each for each in points if each.module in self.modules), None)
        return None if point is None else self._bound(name, point, shape)

    def _bound(self, name: str, point: Point, shape: str) -> Bound:
        path = ".".join(filter(None, (self.modules[point.module], point.inside)))
        view = partial(_view, point, self.sizes)
        is_plain = point.layout == Whole() and point.sharing is Sharing.OWN
        at = (path, point.slot, view, point.sharing, point.key)
        return Bound(name, *at, shape, is_plain, point.layout)


def _view(point: Point, sizes: Sizes, tensor: Tensor) -> Tensor:
    return point.layout.view(tensor, sizes)


@final
class Names:
    """The names that `family` declares, in the model `root`."""

    def __init__(self, family: Family, root: nn.Module) -> None:
        self.family = family
        self.modules = dict(root.named_modules(remove_duplicate=False))
        self._prefix = getattr(root, "base_model_prefix", "")
        self.stacks: dict[str, tuple[Place, ...]] = {}
        self.layers: dict[str, Layer] = {"": self._root()}
        self.lists: dict[str, str] = {}  # of the stacks that are one list of the model: its path
        config = getattr(root, "config", None)
        for word, stack in family.stacks.items():
            self._add(
                word, stack, getattr(config, stack.config, config) if stack.config else config
            )

    # -- asking ---------------------------------------------------------------------------------

    def module(self, owner: str, name: str) -> str | None:
        """The path of the module that `name` means in the module at `owner`."""
        layer = self.layers.get(owner)
        if layer is not None:
            if owner == "" and name in self.lists:
                return self.lists[name]
            known = ROOT_MODULES if owner == "" else BLOCK_MODULES
            return layer.modules.get(name) if name in known else None
        around = self._layer_around(owner)
        path = around.modules.get(name) if around is not None and name in PART_MODULES else None
        return path if path is not None and path.startswith(f"{owner}.") else None

    def point(self, owner: str, name: str) -> Bound | None:
        """The activation that `name` means at the layer (or model) at `owner`."""
        layer = self.layers.get(owner)
        word = (ROOT_ACTIVATIONS if owner == "" else BLOCK_ACTIVATIONS).get(name)
        return None if layer is None or word is None else layer.bound(name, word.shape)

    def why_not(self, owner: str, name: str) -> str | None:
        """Why there is no such activation; None if `name` is no standard name there."""
        layer = self.layers.get(owner)
        if layer is None or name not in (ROOT_ACTIVATIONS if owner == "" else BLOCK_ACTIVATIONS):
            return None
        found = layer.declared.get(name)
        reason = found.reason if isinstance(found, Lacks) else self.family.lacks.get(name)
        return reason or "there is no module here that has it"

    def weight(self, owner: str, name: str) -> Weight | Lacks | None:
        """The weight of that name in the layer (or model) at `owner`; None if it names none."""
        if owner not in self.layers or not is_weight(name, of_model=owner == ""):
            return None
        return weight_of(self, self.modules, owner, name)

    def weights(self, name: str, stack: str) -> Stacked | Lacks:
        """The weight of that name in the layers of a stack that have it, and which these are."""
        return stacked(self, self.modules, name, stack)

    def words(self, owner: str) -> list[str]:
        """Every standard name that there is in the module at `owner`."""
        layer = self.layers.get(owner)
        if layer is None:
            return [word for word in PART_MODULES if self.module(owner, word) is not None]
        modules = ROOT_MODULES if owner == "" else BLOCK_MODULES
        named = [word for word in modules if self.module(owner, word) or word in self.stacks]
        return [*named, *(point.name for point in self.points(owner))]

    def points(self, owner: str) -> Iterator[Bound]:
        """Every activation of the layer (or model) at `owner`."""
        for name in ROOT_ACTIVATIONS if owner == "" else BLOCK_ACTIVATIONS:
            found = self.point(owner, name)
            if found is not None:
                yield found

    @cached_property
    def keys(self) -> Keys:
        """The keys of all activations: `layers.3.resid_post`."""
        return Keys(self)

    # -- binding --------------------------------------------------------------------------------

    def _root(self) -> Layer:
        modules = {"": ""}
        for word, paths in self.family.modules.items():
            found = self._found(paths)
            if found is not None:
                modules[word] = found
        return Layer(modules, {**_ROOT_POINTS, **self.family.activations}, {})

    def _found(self, paths: str | tuple[str, ...]) -> str | None:
        """The first of `paths` that is there, in a base model without its prefix."""
        for path in (paths,) if isinstance(paths, str) else paths:
            for each in (path, path.removeprefix(f"{self._prefix}.")):
                if each in self.modules:
                    return each
        return None

    def _add(self, word: str, stack: Stack, config: Any) -> None:
        paths = self._paths(word, stack)
        count = getattr(config, stack.repeats) if stack.repeats else len(paths)
        ordered = [paths[index * len(paths) // count] for index in range(count)] if paths else []
        calls = [ordered[:index].count(path) for index, path in enumerate(ordered)]
        if paths:
            self.stacks[word] = tuple(map(Place, ordered, calls))
        for path in paths:
            layer = self._layer(path, stack, config)
            if layer is not None:
                self.layers[path] = layer

    def _paths(self, word: str, stack: Stack) -> list[str]:
        """The paths of the layers of a stack, in order."""
        for path in (stack.path,) if isinstance(stack.path, str) else stack.path:
            for each in (path, path.removeprefix(f"{self._prefix}.")):
                found = self._matching(each.split("."))
                if "*" not in each and len(found) == 1 and not stack.repeats:
                    self.lists[word] = each
                found = found if "*" in each else self._children(found)
                if found:
                    return found
        return []

    def _matching(self, parts: list[str]) -> list[str]:
        found = [""]
        for part in parts:
            inside = [child for path in found for child in self._children([path])]
            found = [each for each in inside if part in ("*", each.rpartition(".")[2])]
        return found

    def _children(self, paths: list[str]) -> list[str]:
        return [
            f"{path}.{name}" if path else name
            for path in paths
            for name in own_children(self.modules[path])
        ]

    def _layer(self, path: str, stack: Stack, config: Any) -> Layer | None:
        module = self.modules[path]
        for block in stack.blocks:
            modules = self._modules_of(path, block)
            is_whole = len(stack.blocks) == 1 or len(modules) == len(block.modules)
            if block.when(module, config) if block.when is not None else is_whole:
                modules.setdefault("attn_core", modules.get("attn", ""))
                modules.setdefault("cross_core", modules.get("cross_attn", ""))
                known = {word: at for word, at in modules.items() if at}
                sizes = _sizes(stack, self.modules.get(modules["attn_core"]), config)
                return Layer({"": path, **known}, declared(block), sizes, block)
        return None

    def _modules_of(self, path: str, block: Block) -> dict[str, str]:
        full = {word: f"{path}.{inside}" for word, inside in block.modules.items()}
        return {word: each for word, each in full.items() if each in self.modules}

    def _layer_around(self, owner: str) -> Layer | None:
        while owner:
            owner = owner.rpartition(".")[0]
            if owner in self.layers and owner:
                return self.layers[owner]
        return None


def _sizes(stack: Stack, core: nn.Module | None, config: Any) -> dict[str, int]:
    found: dict[str, int] = {}
    for name, usual in _USUAL_SIZES.items():
        for attribute in (stack.sizes[name],) if name in stack.sizes else usual:
            value = getattr(core, attribute, None) if name in stack.sizes else None
            value = getattr(config, attribute, None) if value is None else value
            if isinstance(value, int):
                found[name] = value
                break
    return found
