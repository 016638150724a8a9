"""An Envoy stands for one module: its values in a trace, its children, the module itself."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Final

import torch
from torch import nn

from tracekit.capture import showing_own_lines
from tracekit.core.annex import ANNEX
from tracekit.core.offload import device_of, places_of
from tracekit.core.quirks import own_children
from tracekit.core.site import Site, Slot
from tracekit.core.tree import Tree
from tracekit.errors import (
    NeverRanError,
    OffloadedError,
    OutsideTraceError,
    UnknownModuleError,
    UnsupportedError,
    did_you_mean,
)
from tracekit.interleave.mediator import Mediator
from tracekit.interleave.taps import check_tappable, is_attention
from tracekit.interleave.worker import current_mediator
from tracekit.tracing.at import Spot
from tracekit.tracing.sharded import called
from tracekit.tracing.slots import Calls, mediator_of, path_in
from tracekit.tracing.source import Source, source_of
from tracekit.tracing.standard import Standard

_SLOTS = ("output", "input", "inputs", "hidden", "skip")
_VALUES = (*_SLOTS, "next", "calls", "source", "path", "module")
_HANDS_OUT: Final = frozenset({"state_dict", "get_parameter"})
# Methods of every module that return the module itself.
_CHANGES: Final = frozenset(
    {"to", "cpu", "cuda", "eval", "train", "half", "float", "double", "bfloat16", "requires_grad_"}
)


class Envoy(Standard):
    """Stands for the module at `path`; children by attribute, index or name.

    Inside a trace, `.output`, `.input`, `.inputs` and `.hidden` are the module's real values at
    the moment the model reaches it; assigning replaces them, editing in place changes them.
    """

    __slots__ = ("_call", "_path", "_tree")

    def __init__(self, tree: Tree, path: str, call: int = 0) -> None:
        object.__setattr__(self, "_tree", tree)
        object.__setattr__(self, "_path", path)
        object.__setattr__(self, "_call", call)

    # -- in a trace -----------------------------------------------------------------------------

    def next(self, steps: int = 1) -> Envoy:
        """This module, after going on to a later step of the generation.

        As in nnsight, it moves the whole block: what is asked for afterwards is about that step.
        """
        mediator = self._mediator("next()")
        mediator.go_to_step(mediator.step + steps)
        return self

    @property
    def calls(self) -> Calls[Envoy]:
        """`module.calls[1]` is the module's second call within a step, if it runs several times."""
        return Calls(lambda call: Envoy(self._tree, self._path, call))

    @property
    def source(self) -> Source:
        """The operations inside the module's forward: print it to see them beside their lines."""
        return source_of(self._tree, self._path, self._call)

    def _spot(self, slot: Slot) -> Spot:
        if self._call:
            raise UnsupportedError(
                f"{self._path}.calls[{self._call}]: positions are chosen of a module's every call; "
                f"leave calls[...] out."
            )
        return Spot(partial(self._at, slot, f"{slot.value}.at()"), Site(self._path, slot))

    def _at(self, slot: Slot, name: str) -> tuple[Mediator, Site]:
        """Whom to ask for a value of this module, and for what."""
        mediator = self._mediator(name)
        return mediator, self._site(mediator.model, slot)

    def _site(self, tree: Tree, slot: Slot) -> Site:
        own: Tree = self._tree
        if tree is not own:
            return self._site_in(tree, slot)
        key = (self._path, slot)
        if key not in tree.sites:
            tree.sites[key] = self._site_in(tree, slot)
        return tree.sites[key]

    def _site_in(self, tree: Tree, slot: Slot) -> Site:
        path = path_in(tree, self._tree, self._path)
        if not tree.is_called(path):
            raise NeverRanError(
                f"{self._path} is a {type(self.module).__name__}, which is never called and has "
                f"no {slot.value}; ask one of its modules, as in {self._path}[0].{slot.value}."
            )
        return Site(path, slot)

    def _mediator(self, name: str) -> Mediator:
        return mediator_of(self._tree, self._path, name)

    # -- the module -----------------------------------------------------------------------------

    @property
    def path(self) -> str:
        """The full path, root's name first: `model.transformer.h.0`."""
        return self._path

    def belongs_to(self, tree: Tree) -> bool:
        """Whether this stands for a module of `tree`, at the same path."""
        if tree.stands_for(self._tree):
            return self._path in tree.modules
        return tree.modules.get(self._path) is self.module

    @property
    def module(self) -> Any:
        """The PyTorch module itself; in the block of a scan, the one that runs there."""
        return self._here().module(self._path)

    def _here(self) -> Tree:
        """The model as it runs where this is asked: in the block of a scan, its twin."""
        mediator = current_mediator()
        if mediator is None or mediator.model.original is None:
            return self._tree
        return mediator.model if mediator.model.stands_for(self._tree) else self._tree

    @property
    def parent(self) -> Envoy | None:
        """The module that this one is a child of; None for the whole model."""
        if self._path == self._tree.name:
            return None
        return Envoy(self._tree, self._path.rpartition(".")[0])

    @property
    def device(self) -> torch.device | None:
        """Where the module computes: where its first weight is, or accelerate brings it.

        None if it has no weights.
        """
        module: nn.Module = self.module
        weights = itertools.chain(module.parameters(), module.buffers())
        return device_of(module) or next((weight.device for weight in weights), None)

    def get(self, path: str) -> Envoy:
        """The module at a path below this one: `model.get("transformer.h.0.mlp")`.

        UnknownModuleError, with near names, if there is none.
        """
        self._tree.refresh_if_changed()
        return Envoy(
            self._tree, self._tree.canonical(f"{self._path}.{path.strip('.')}".rstrip("."))
        )

    def modules(self, include: Callable[[Envoy], bool] | None = None) -> Iterator[Envoy]:
        """This module and all in it, or those that `include` says yes to, each once."""
        every = (envoy for _, envoy in self.named_modules())
        return every if include is None else filter(include, every)

    def named_modules(self) -> Iterator[tuple[str, Envoy]]:
        """The full path of this module and of all in it, each with its Envoy."""
        for relative, _ in self.module.named_modules():
            path = f"{self._path}.{relative}" if relative else self._path
            yield path, Envoy(self._tree, path)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module on values, in a trace or outside; no trace sees this call."""
        tree = self._here()
        if tree.load_first is not None:
            tree.load_first()
        with tree.guard():
            return called(tree, self._path, args, kwargs)

    @showing_own_lines
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or hasattr(type(self), name):  # half-made, in copy or pickle
            raise AttributeError(name)
        module = self.module
        if own_children(module).get(name) is not None:
            return self._child(name)
        aliases = self._tree.renamed(self._path)
        if name in aliases:
            return Envoy(self._tree, aliases[name])
        if name == ANNEX and is_attention(module):
            return self._annex()
        if name in _CHANGES:
            return partial(self._changed, name)
        try:
            value = getattr(module, name)
        except AttributeError:
            found = self._standard(name)
            if found is not None:
                return found
            children = [*own_children(module), *aliases]
            near = did_you_mean(name, [*children, *module._parameters, *_VALUES, *self._words()])
            is_near = not children or any(repr(child) in near for child in children)
            there = "" if is_near else f" (there: {', '.join(children[:8])})"
            raise UnknownModuleError(
                f"{name!r} is not in {type(module).__name__} ({self._path}){near}{there}"
            ) from None
        if isinstance(value, nn.Module):  # a property, or a wrapper that looks into what it wraps
            known = self._here().modules
            path = next((path for path in self._tree.order if known.get(path) is value), None)
            return value if path is None else Envoy(self._tree, path)
        is_on_meta = isinstance(value, torch.Tensor) and value.is_meta
        load_first = self._here().load_first
        if load_first is not None and (is_on_meta or callable(value)):
            load_first()  # a method may use the weights, or hand them out
            return getattr(self.module, name)
        if name in _HANDS_OUT and places_of(module):
            raise OffloadedError(
                f"{self._path}.{name}() would hand out weights that are offloaded, not in memory. "
                f"Take copies: {self._tree.name}.weights.of({self._path})."
            )
        if is_on_meta:
            raise OffloadedError(
                f"{self._path}.{name} is offloaded, not in memory: computing with it would give "
                f"garbage. Call the module instead, as in {self._path}(x), or take a copy: "
                f"{self._tree.name}.weights.of({self._path})[{name!r}]."
            )
        return value

    @showing_own_lines
    def _annex(self) -> Envoy:
        """The values inside this attention, as modules."""
        for tree in {self._tree, self._here()}:
            path = path_in(tree, self._tree, self._path)
            check_tappable(tree, path)
            tree.attach(path)
        return Envoy(self._tree, self._tree.attach(self._tree.canonical(self._path)))

    def _envoy(self, path: str, call: int) -> Envoy:
        return Envoy(self._tree, path, call)

    def _changed(self, name: str, *args: Any, **kwargs: Any) -> Envoy:
        """This Envoy, after `module.to(...)` or another method that returns its module."""
        if self._tree.load_first is not None:
            self._tree.load_first()
        getattr(self.module, name)(*args, **kwargs)
        return self

    @showing_own_lines
    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(getattr(type(self), name, None), property):
            object.__setattr__(self, name, value)
            return
        module = self.module
        if self._write_standard(name, value):
            return
        if isinstance(value, Envoy):
            value = value.module
        is_own = hasattr(type(self), name)
        if is_own or (not isinstance(value, nn.Module) and not hasattr(module, name)):
            raise UnknownModuleError(
                f"{name!r} can't be assigned: it is no value of {self._path}"
                f"{'' if is_own else did_you_mean(name, [*_VALUES, *own_children(module)])}"
            )
        setattr(module, name, value)
        self._here().refresh_if_changed()

    def __setstate__(self, state: tuple[None, dict[str, Any]]) -> None:
        for name, value in state[1].items():  # what copy and pickle took from the slots
            object.__setattr__(self, name, value)

    def __getitem__(self, key: int | slice | str) -> Any:
        """A child by name or, in a list of modules, by index or slice."""
        names = self._names()
        if isinstance(key, str):
            aliases = self._tree.renamed(self._path)
            if key in aliases and key not in names:
                return Envoy(self._tree, aliases[key])
            if key not in names:
                known = [*names, *aliases]
                raise UnknownModuleError(
                    f"{key!r} is not in {self._path}{did_you_mean(key, known)}"
                )
            return self._child(key)
        if isinstance(key, slice):
            return [self._child(name) for name in names[key]]
        if not -len(names) <= key < len(names):
            raise IndexError(f"{self._path} has {len(names)} modules; there is no [{key}].")
        return self._child(names[key])

    def __len__(self) -> int:
        return len(self._names())

    def __iter__(self) -> Iterator[Envoy]:
        return iter([self._child(name) for name in self._names()])

    def __bool__(self) -> bool:
        return True  # with __len__ alone, a leaf would be false

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Envoy):
            return False
        return other._tree.module(other._path) is self._tree.module(self._path)

    def __hash__(self) -> int:
        return id(self._tree.module(self._path))

    def __dir__(self) -> list[str]:
        aliases = self._tree.renamed(self._path)
        return sorted({*object.__dir__(self), *own_children(self.module), *aliases, *self._words()})

    def __repr__(self) -> str:
        return f"{self._path}: {self.module!r}"

    def _names(self) -> list[str]:
        return [name for name, child in own_children(self.module).items() if child is not None]

    def _child(self, name: str) -> Envoy:
        return Envoy(self._tree, f"{self._path}.{name}")


def child_of(envoy: Envoy, name: str) -> Envoy | None:
    """What stands for the child of that name; None if there is none."""
    child = own_children(envoy.module).get(name)
    if child is None and name == ANNEX and is_attention(envoy.module):
        return envoy._annex()  # pyright: ignore[reportPrivateUsage] - a friend
    return envoy._child(name) if child is not None else None  # pyright: ignore[reportPrivateUsage] - a friend


def place_of(envoy: Envoy, tree: Tree, slot: Slot) -> tuple[Site, int]:
    """The site, and the call, that an Envoy stands for in a run of `tree`."""
    own, site, call = envoy._tree, envoy._site, envoy._call  # pyright: ignore[reportPrivateUsage] - a friend
    if own.root is not tree.root:
        raise OutsideTraceError(f"{envoy.path} belongs to another model.")
    return site(tree, slot), call
