"""The standard names of one model: which module, or which value of which module, each means."""

# Paths here are below the root, without its name; the root's own is "".

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Final, NamedTuple, final

from torch import nn

from tracekit.architectures.fit import misfits
from tracekit.architectures.keys import Keys
from tracekit.architectures.layouts import Layout, Rows, Sizes, View, Viewed, Whole
from tracekit.architectures.rules import declared
from tracekit.architectures.schema import (
    ANNEXES,
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
    "final_norm_scale": output("final_norm", inside="norm_scale"),
    "final_norm_normalized": output("final_norm", inside="norm_normalized"),
    "final_norm_out": output("final_norm"),
    "logits": output("unembed"),
    "encoder_out": output("encoder"),
    "image_features": output("projector", Rows()),
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
    layout: Layout = field(default_factory=Whole)
    call: int = 0  # the how-manieth call of the module, where layers share it
    heads: int = 0  # of its layer's attention, if that is known

    @property
    def is_plain(self) -> bool:
        """Whether it is the tensor itself, which nobody else is given."""
        return self.layout == Whole() and self.sharing is Sharing.OWN


@final
@dataclass(frozen=True)
class Layer:
    """One layer of a model, or the model itself: its modules by word, and its activations."""

    modules: Mapping[str, str]
    declared: Mapping[str, Declared]
    sizes: Sizes
    is_called: Callable[[str], bool]
    block: Block | None = None
    # Of the modules that earlier layers have called before: how often.
    calls: Mapping[str, int] = field(default_factory=dict[str, int])

    def bound(self, name: str, shape: str) -> Bound | None:
        """The activation of that name; None if none of its modules is there."""
        for point in _choices(self.declared.get(name)):
            if isinstance(point, Point) and point.module in self.modules:
                path = ".".join(filter(None, (self.modules[point.module], point.inside)))
                if point.inside.split(".")[0] in ANNEXES or self.is_called(path):
                    return self._bound(name, path, point, point.shape or self._axes(shape))
        return None

    def _axes(self, shape: str) -> str:
        for usual, other in (self.block.axes if self.block is not None else {}).items():
            shape = shape.replace(usual, other)
        return shape

    def is_loose(self, word: str) -> bool:
        """Whether a part of a module is this layer's own: an MLP without a module around it."""
        path = self.modules.get(word)
        if path is None or word not in PART_MODULES or word in BLOCK_ACTIVATIONS:
            return False
        around = (self.modules[each] for each in BLOCK_MODULES if each in self.modules)
        return not any(path == each or path.startswith(f"{each}.") for each in around)

    def why_not(self, name: str) -> str | None:
        """The reason that is declared for there not being an activation."""
        last = _choices(self.declared.get(name))[-1:]
        return last[0].reason if last and isinstance(last[0], Lacks) else None

    def _bound(self, name: str, path: str, point: Point, shape: str) -> Bound:
        view = Viewed(point.layout, self.sizes)
        at = (path, point.slot, view, point.sharing, point.key)
        call = self.calls.get(path, 0)
        return Bound(name, *at, shape, point.layout, call, self.sizes.get("heads", 0))


def _choices(declared: Declared | None) -> tuple[Point | Lacks, ...]:
    if declared is None:
        return ()
    return declared if isinstance(declared, tuple) else (declared,)


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
            is_known = name in known or layer.is_loose(name)
            return layer.modules.get(name) if is_known else None
        around = self._layer_around(owner)
        path = around.modules.get(name) if around is not None and name in PART_MODULES else None
        return path if path is not None and path.startswith(f"{owner}.") else None

    def point(self, owner: str, name: str) -> Bound | None:
        """The activation that `name` means at the layer (or model) at `owner`."""
        layer = self.layers.get(owner)
        word = (ROOT_ACTIVATIONS if owner == "" else BLOCK_ACTIVATIONS).get(name)
        return None if layer is None or word is None else layer.bound(name, word.shape)

    def why_not(self, owner: str, name: str) -> str | None:
        """Why there is no such activation, or module; None if `name` is no standard name there."""
        layer = self.layers.get(owner)
        activations = ROOT_ACTIVATIONS if owner == "" else BLOCK_ACTIVATIONS
        modules = ROOT_MODULES if owner == "" else BLOCK_MODULES
        if layer is None or (name not in activations and name not in modules):
            return None
        reason = layer.why_not(name) or self.family.lacks.get(name)
        return reason or f"there is no module here that {'has' if name in activations else 'is'} it"

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
        named += [word for word in PART_MODULES if layer.is_loose(word)]
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
        declared = {**_ROOT_POINTS, **self.family.activations}
        calls = self._calls_of_encoder(modules)
        return Layer(modules, declared, {}, self._is_called, calls=calls)

    def _calls_of_encoder(self, modules: Mapping[str, str]) -> dict[str, int]:
        """The modules beside an encoder that it has called before: embeddings that are shared."""
        encoder = modules.get("encoder")
        inside = set(self.modules[encoder].modules()) if encoder is not None else set[nn.Module]()
        return {
            path: 1
            for path in modules.values()
            if self.modules[path] in inside and not f"{path}.".startswith(f"{encoder}.")
        }

    def _found(self, paths: str | tuple[str, ...]) -> str | None:
        """The first of `paths` that is there, in a base model without its prefix."""
        for path in _several(paths):
            for each in (path, path.removeprefix(f"{self._prefix}.")):
                if each in self.modules:
                    return each
        return None

    def _add(self, word: str, stack: Stack, config: Any) -> None:
        paths = self._paths(word, stack)
        ordered = _repeated(paths, getattr(config, stack.repeats)) if stack.repeats else paths
        calls = [ordered[:index].count(path) for index, path in enumerate(ordered)]
        if paths:
            self.stacks[word] = tuple(map(Place, ordered, calls))
        before: Counter[nn.Module] = Counter()
        for path in paths:
            layer = self._layer(path, stack, config)
            if layer is not None:
                self.layers[path] = replace(layer, calls=self._calls(path, before))

    def _calls(self, layer: str, before: Counter[nn.Module]) -> dict[str, int]:
        """How often each module of a layer was called by layers before it, if it was."""
        inside = dict(self.modules[layer].named_modules(remove_duplicate=False))
        found = {f"{layer}.{path}": before[each] for path, each in inside.items() if before[each]}
        before.update(set(inside.values()))
        return found

    def _is_called(self, path: str) -> bool:
        """Whether there is a module with a forward at `path`; a list of modules has none."""
        module = self.modules.get(path)
        return module is not None and type(module).forward is not nn.Module.forward

    def _paths(self, word: str, stack: Stack) -> list[str]:
        """The paths of the layers of a stack, in order."""
        for path in _several(stack.path):
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
                return self._bind(path, modules, block, stack, config)
        return None

    def _bind(
        self, path: str, modules: dict[str, str], block: Block, stack: Stack, config: Any
    ) -> Layer:
        modules.setdefault("attn_core", modules.get("attn", ""))
        modules.setdefault("cross_core", modules.get("cross_attn", ""))
        known = {word: at for word, at in modules.items() if at}
        sizes = _sizes(stack, self.modules.get(modules["attn_core"]), config)
        mixer = self.modules.get(modules.get("ssm", ""))
        for name, attributes in block.sizes.items() if "ssm" in modules else ():
            sizes[name] = math.prod(getattr(mixer, each) for each in attributes)
        points = declared(block)
        points |= misfits(known, points, sizes, self.modules)
        return Layer({"": path, **known}, points, sizes, self._is_called, block)

    def _modules_of(self, path: str, block: Block) -> dict[str, str]:
        found: dict[str, str] = {}
        for word, inside in block.modules.items():
            there = [each for each in _several(inside) if f"{path}.{each}" in self.modules]
            if there:
                found[word] = f"{path}.{there[0]}"
        return found

    def _layer_around(self, owner: str) -> Layer | None:
        while owner:
            owner = owner.rpartition(".")[0]
            if owner in self.layers and owner:
                return self.layers[owner]
        return None


def _several(paths: str | tuple[str, ...]) -> tuple[str, ...]:
    return (paths,) if isinstance(paths, str) else paths


def _repeated(paths: list[str], count: int) -> list[str]:
    """The lists that `paths` are of, each as often in a row as makes `count` of them."""
    lists: dict[str, list[str]] = {}
    for path in paths:
        lists.setdefault(path.rpartition(".")[0], []).append(path)
    each = list(lists.values())
    return [path for index in range(count) for path in each[index * len(each) // count]]


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
