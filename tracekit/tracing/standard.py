"""What standard names mean for one module: a module in it, a list of layers, a value, a weight."""

from __future__ import annotations

import sys
from abc import abstractmethod
from typing import TYPE_CHECKING, Any, Final, NoReturn

from tracekit.architectures import Bound, is_weight
from tracekit.capture import takes_next
from tracekit.core.annex import inner_owner_of
from tracekit.core.tree import Tree
from tracekit.core.words import ACTIVATIONS
from tracekit.errors import MissingNameError, UnsupportedError
from tracekit.tracing.named import attach_inner, read_named, read_weight, write_named
from tracekit.tracing.slots import Slots

if TYPE_CHECKING:
    from tracekit.tracing.at import Spot
    from tracekit.tracing.envoy import Envoy


_UNDECLARED: Final = (
    "its architecture is not declared; model.check_names(input) looks for standard names by its "
    "structure, and proves them"
)


class Standard(Slots):
    """A module in a tree, asked by the names that its architecture declares for it."""

    __slots__ = ()

    _tree: Tree

    @property
    @abstractmethod
    def module(self) -> Any:
        """The PyTorch module itself."""

    @abstractmethod
    def _here(self) -> Tree:
        """The model as it runs where this is asked."""

    @abstractmethod
    def _envoy(self, path: str, call: int) -> Envoy:
        """What stands for another module of the tree, at its how-manieth call."""

    def _named_child(self, name: str) -> Envoy | None:
        """What stands for the module that a standard name means; None if there is none."""
        if hasattr(self.module, name) or name in self._tree.renamed(self._path):
            return None
        path = self._tree.named_module(self._path, name)
        return None if path is None else self._envoy(path, self._call)

    def _activation(self, name: str) -> tuple[Envoy, Bound] | None:
        """The module that has the value of that standard name, and how; None if there is none."""
        tree = self._tree
        names = tree.names if name in ACTIVATIONS and not hasattr(self.module, name) else None
        bound = names.point(tree.below(self._path), name) if names is not None else None
        if bound is None:
            return None
        if inner_owner_of(bound.path) is not None and not attach_inner(tree, bound):
            raise MissingNameError(
                f"{self._path} has no {name!r}: it can't be told from its module."
            )
        path = f"{tree.name}.{bound.path}".rstrip(".")
        return self._envoy(path, self._call + bound.call), bound

    def _words(self) -> list[str]:
        """The standard names that there are in this module."""
        names = self._tree.names
        return names.words(self._tree.below(self._path)) if names is not None else []

    def _standard(self, name: str) -> Any:
        """What a standard name means here, for an attribute; None if it is none.

        MissingNameError where it is one, and this module has nothing for it.
        """
        if is_weight(name, of_model=self._path == self._tree.name):
            return read_weight(self._here(), self._path, name)
        names = self._tree.names
        if names is None:
            if name in ACTIVATIONS:
                self._refuse(name, _UNDECLARED)
            return None
        child = self._named_child(name)
        if child is not None:
            return child
        found = self._activation(name)
        if found is not None:
            at, bound = found
            if takes_next(sys._getframe(3), "at"):  # pyright: ignore[reportPrivateUsage] - asked at every read
                return at._spot_of(bound)  # pyright: ignore[reportPrivateUsage] - same file
            return read_named(*at._at(bound.slot, name), at._call, bound)  # pyright: ignore[reportPrivateUsage] - same file
        if self._path == self._tree.name and name in names.stacks:
            root = self._tree.name
            return tuple(self._envoy(f"{root}.{path}", call) for path, call in names.stacks[name])
        why = names.why_not(self._tree.below(self._path), name)
        if why is not None:
            self._refuse(name, why)
        return None

    def _refuse(self, name: str, why: str) -> NoReturn:
        kind = type(self.module).__name__
        raise MissingNameError(f"{self._path} ({kind}) has no {name!r}: {why}.") from None

    def _write_standard(self, name: str, value: object) -> bool:
        """Let the model go on with `value` for what has that name; False if nothing has."""
        found = self._activation(name)
        if found is None:
            return False
        at, bound = found
        write_named(*at._at(bound.slot, name), at._call, bound, value)  # pyright: ignore[reportPrivateUsage] - same file
        return True

    def _spot_of(self, bound: Bound) -> Spot:
        if not bound.is_plain:
            raise UnsupportedError(
                f"positions can't be chosen of {bound.name}, which is a part of {self._path}."
                f"{bound.slot.value}, or shared with others: choose them there."
            )
        return self._spot(bound.slot)


def named_child_of(envoy: Standard, name: str) -> Envoy | None:
    """What stands for the module that a standard name means in it; None if there is none."""
    return envoy._named_child(name)  # pyright: ignore[reportPrivateUsage] - a friend


def activation_of(envoy: Standard, name: str) -> tuple[Envoy, Bound] | None:
    """The module that has the value of that standard name, and how; None if there is none."""
    return envoy._activation(name)  # pyright: ignore[reportPrivateUsage] - a friend
