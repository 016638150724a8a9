"""What is known of a model's modules without running it: paths, children, who is ever called."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Final, Protocol, final

from torch import nn

from tracekit.core.absent import NoAbsentWeights
from tracekit.core.annex import ANNEX, owner_of
from tracekit.core.norms import NormKind
from tracekit.core.pieces import Annex, Piece
from tracekit.core.quirks import own_children
from tracekit.core.renames import Renames, spellings
from tracekit.core.site import Site, Slot
from tracekit.errors import UnknownModuleError, did_you_mean


class StandardNames(Protocol):
    """What a model's architecture calls its modules and values; paths are below the root."""

    @property
    def stacks(self) -> Mapping[str, tuple[tuple[str, int], ...]]: ...
    @property
    def keys(self) -> Any: ...

    def module(self, owner: str, name: str) -> str | None: ...
    def point(self, owner: str, name: str) -> Any: ...
    def why_not(self, owner: str, name: str) -> str | None: ...
    def weight(self, owner: str, name: str) -> Any: ...
    def weights(self, name: str, stack: str) -> Any: ...
    def words(self, owner: str) -> list[str]: ...


_NOTHING: Final = nullcontext()


class Planner(Protocol):
    """Who plans the run of a twin (models/planning.py)."""

    def given(self, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """What the model is given instead."""
        ...

    def copies(self, original: Any) -> None:
        """A value is recorded as a copy, and its original is kept until the run ends."""
        ...

    def record(self, cache: Any, keep: Any) -> Any:
        """A cache is made in the run, and is to keep values so; how it does."""
        ...


@final
class Tree:
    """The modules of `root` by full path (`model.transformer.h.0`), root's own name first.

    A module that is reachable by several paths has one canonical path, the first; the others
    are aliases of it.
    """

    def __init__(self, root: nn.Module, name: str, renames: Renames | None = None) -> None:
        self.root = root
        self.name = name
        self.renames = renames
        self._depth = name.count(".") + 1
        self.load_first: Callable[[], None] | None = None  # brings weights that were left out
        self.planner: Planner | None = None  # of a planned run, of a twin
        self.original: Tree | None = None  # whose twin this is, if it is one
        self.gone: tuple[str, ...] = ()  # what a run goes round (core/detour.py)
        self.naming: Callable[[nn.Module], StandardNames | None] | None = None
        self._names: tuple[StandardNames | None] | None = None  # None: nobody asked
        self.mode: AbstractContextManager[object] = nullcontext()  # entered while `root` runs
        self.modules: dict[str, nn.Module] = {}  # every path, aliases included, in tree order
        self._canonical: dict[str, str] = {}
        self._parents: dict[str, list[str]] = {}  # canonical path -> canonical parents
        self._relatives: dict[tuple[str, str], list[str]] = {}  # what was found out before
        self.called: dict[str, nn.Module] = {}  # by canonical path: what has a forward
        self.annexes: dict[str, Annex] = {}  # by canonical path of the attention each belongs to
        self.inner: dict[str, Piece] = {}  # values inside norms and output projections, by path
        self.norm_kinds: dict[str, NormKind] = {}  # by path, as their numbers told
        self._beside: set[str] = set()  # the paths of annexes, and of what is in them
        self._states: list[dict[str, Any]] = []  # each module's __dict__
        self._shape: list[tuple[dict[str, nn.Module | None], dict[str, nn.Module | None]]] = []
        self.aliases: dict[str, str] = {}  # second paths of shared modules, and renames
        self.was_told_eager = False  # the user, that what is compiled runs as Python
        self.shared: list[str] = []  # canonical paths of those that can be called
        self._renamed: dict[str, dict[str, str]] = {}
        self.order: dict[str, int] = {}  # canonical paths, in tree order
        # By kind of run, of the slots of the modules that were recorded before: whether the model
        # overwrites the value later, as Falcon adds the attention into the output of its MLP.
        self.overwrites: dict[object, dict[Slot, dict[str, bool]]] = {}
        self.proven: set[object] = set()  # reads that were served in their order (glance.py)
        # By kind of run, where the rows of a batch lie in every value.
        self.layouts: dict[object, object] = {}
        self.continues: bool | None = None  # rightly, from a filled kv_cache; None: nobody asked
        # Round the layers before one, and if not behind keys and values, why (models/starting.py).
        self.routes: dict[object, object] = {}
        self.sharding: Any = None  # where its values lie, on several ranks (tracing/sharded.py)
        self.sites: dict[tuple[str, Slot], Site] = {}  # by the path that was asked for
        self.refresh(is_first=True)

    def refresh(self, is_first: bool = False) -> None:
        """Read the modules again; what was found before is forgotten.

        Renames are checked when the modules are read first: later changes may leave them behind.
        """
        self.modules.clear()
        self._canonical.clear()
        self._parents.clear()
        self._relatives.clear()
        self.proven.clear()
        self.layouts.clear()
        self.continues = None
        self.routes.clear()
        self.sharding = self._names = None
        self.sites.clear()
        self._beside.clear()
        first: dict[int, str] = {}
        for relative, module in self.root.named_modules(remove_duplicate=False):
            path = f"{self.name}.{relative}" if relative else self.name
            canonical = first.setdefault(id(module), path)
            self.modules[path] = module
            self._canonical[path] = canonical
            parents = self._parents.setdefault(canonical, [])
            parent = self._canonical[path.rpartition(".")[0]] if relative else None
            if parent is not None and parent not in parents:
                parents.append(parent)
        if self.renames is not None:
            aliases = self.renames.aliases(self.modules, is_checked=is_first)
            self._renamed = {}
            for (owner, alias), path in aliases.items():
                self._renamed.setdefault(owner, {})[alias] = path
            for spelled, path in spellings(self.modules, aliases):
                self._canonical.setdefault(spelled, self._canonical[path])
        self.aliases = {path: first for path, first in self._canonical.items() if path != first}
        self.order = {path: index for index, path in enumerate(self.paths())}
        unique = {path: self.modules[path] for path in self.order}
        self.called = {path: module for path, module in unique.items() if _has_forward(module)}
        shared = {self.aliases[path] for path in self.modules if path in self.aliases}
        self.shared = [path for path in self.called if path in shared]
        self._states = [vars(self.modules[path]) for path in self.order]
        self._shape = [
            (own_children(module), dict(own_children(module)))
            for module in map(self.modules.__getitem__, self.order)
        ]
        self.annexes = {path: annex for path, annex in self.annexes.items() if path in self.called}
        for path in self.annexes:
            self.attach(path)
        inner, self.inner = self.inner, {}
        self.norm_kinds.clear()
        for path, piece in inner.items():
            if piece.owner in self.called:
                self.attach_inner(path, piece.heads)

    def attach_inner(self, path: str, heads: int = 0) -> None:
        """Let there be a module for a value inside another, at a path behind a canonical one."""
        if path in self.inner:
            return
        owner, _, name = path.rpartition(".")
        self.inner[path] = self.modules[path] = Piece(owner, name, heads)
        self._canonical[path] = path
        self._parents[path] = [owner]
        self._beside.add(path)
        self._relatives.clear()

    def attach(self, owner: str) -> str:
        """Let there be the annex of the attention at a canonical path; the path of the annex.

        What is in it is asked for by its path alone: it is not among `called` nor `paths`.
        """
        path = f"{owner}.{ANNEX}"
        if path in self._beside:
            return path
        annex = self.annexes.setdefault(owner, Annex(owner))
        owners = [owner, *(other for other, first in self.aliases.items() if first == owner)]
        for name, module in annex.named_modules():
            *others, own = (f"{each}.{ANNEX}.{name}".rstrip(".") for each in reversed(owners))
            self.modules[own] = module
            self._canonical[own] = own
            self._parents[own] = [path if name else owner]
            self._beside.add(own)
            for other in others:
                self._canonical[other] = self.aliases[other] = own
        self._relatives.clear()
        return path

    def detach(self, owner: str) -> None:
        """There is no attention at `owner` after all."""
        if self.annexes.pop(owner, None) is not None:
            self.refresh()

    def _attach_for(self, path: str) -> None:
        """The annex that `path` leads into, if it leads into one that is not there yet."""
        owner = owner_of(path)
        if owner is None or f"{owner}.{ANNEX}" in self._canonical:
            return
        if self._canonical.get(owner) in self.called:
            self.attach(self._canonical[owner])

    def replace_root(self, root: nn.Module) -> None:
        """Stand for another module of the same structure, as when weights are loaded late."""
        self.root = root
        self.refresh()

    def stands_for(self, other: Tree) -> bool:
        """Whether this is the tree of the same model, or of its twin."""
        is_twin = self.original is not None and other.root is self.original.root
        return other.root is self.root or is_twin

    def is_gone(self, path: str) -> bool:
        """Whether the module at `path` is among what a run goes round."""
        return any(path == each or path.startswith(f"{each}.") for each in self.gone)

    def refresh_if_changed(self) -> None:
        """Read the modules again if one was added, removed or replaced since."""
        for children, known in self._shape:
            if children != known:  # modules compare by identity
                self.refresh()
                return

    def is_compiled(self) -> bool:
        """Whether anything here runs compiled by torch; hooks placed since do not fire in it."""
        for state in self._states:  # spelled out, as every trace asks
            if "_compiled_call_impl" in state or "_compiled_call" in state or "dynamo_ctx" in state:
                return True
        return False

    def around_runs(self) -> AbstractContextManager[object]:
        """What is to be entered while `root`, and a block beside it, run."""
        return self.guard() if isinstance(self.mode, nullcontext) else self.mode

    def guard(self) -> AbstractContextManager[object]:
        """Keeps weights that are elsewhere from being computed with; as fast as every trace needs.

        In a dry run, where no weight has numbers, there is nothing to keep.
        """
        if isinstance(self.mode, nullcontext):
            for state in self._states:
                if "_hf_hook" in state:  # accelerate may have put weights elsewhere
                    return NoAbsentWeights(self.root, self.name) if self.is_empty() else _NOTHING
        return _NOTHING

    def is_empty(self) -> bool:
        """Whether there are weights that hold no numbers; as fast as every trace needs it."""
        for state in self._states:
            for weight in (state.get("_parameters") or {}).values():
                if weight is not None and weight.is_meta:
                    return True
        return False

    def paths(self) -> Iterator[str]:
        """Every canonical path, in tree order."""
        known = self._canonical.items()
        return (path for path, first in known if path == first and path not in self._beside)

    def canonical(self, path: str) -> str:
        """The first path of the module at `path`, which may be given without the root's name."""
        full = path if path in self._canonical else f"{self.name}.{path}"
        if full not in self._canonical:
            for way in (path, full):
                self._attach_for(way)
            full = path if path in self._canonical else full
        if full not in self._canonical:
            full = self._by_standard_names(path)
        if full not in self._canonical:
            raise UnknownModuleError(
                f"{path!r} is not a module of {self._kind()}{did_you_mean(path, self._canonical)}"
            )
        return self._canonical[full]

    def _by_standard_names(self, path: str) -> str:
        """The path that `path` is, with standard names in it; "" if it is none."""
        found = self.name
        for part in path.removeprefix(f"{self.name}.").split("."):
            inside = f"{found}.{part}"
            self._attach_for(inside)
            known = inside in self._canonical
            inside = inside if known else self.named_module(found, part) or ""
            if not inside:
                return ""
            found = inside
        return found

    @property
    def names(self) -> StandardNames | None:
        """The standard names of this model; None if its architecture is not known."""
        if self._names is None:
            self._names = (self.naming(self.root) if self.naming is not None else None,)
        return self._names[0]

    def learn(self, names: StandardNames) -> None:
        """Go by these standard names, until modules change."""
        self._names = (names,)

    def below(self, path: str) -> str:
        """`path` without the root's name, as standard names have it."""
        return path[len(self.name) + 1 :]

    def named_module(self, owner: str, name: str) -> str | None:
        """The path of the module that a standard name means in the module at `owner`."""
        found = self.names.module(self.below(owner), name) if self.names is not None else None
        return None if found is None else f"{self.name}.{found}"

    def renamed(self, path: str) -> dict[str, str]:
        """The aliases that the module at `path` has for modules in it, and their paths."""
        return self._renamed.get(path, {})

    def module(self, path: str) -> nn.Module:
        """The module at a full path, as it is now."""
        if path not in self.modules:
            self._attach_for(path)
        if path in self._beside:
            return self.modules[path]
        module: Any = self.root
        for name in path.split(".")[self._depth :]:
            module = own_children(module)[name]
        return module

    def is_called(self, path: str) -> bool:
        """Whether the module has a forward of its own; a ModuleList, for one, has none."""
        return path in self.called or type(self.modules.get(path)) is Piece

    def called_children(self, path: str) -> list[str]:
        """The nearest modules below `path` that can be called, through lists and dictionaries."""
        return self._known("called_children", path, self._called_children)

    def ancestors(self, path: str) -> list[str]:
        """Every callable module that contains `path`, over all its parents, nearest first."""
        return self._known("ancestors", path, self._ancestors)

    def callers(self, path: str) -> list[str]:
        """The nearest callable modules that contain `path`, one for each way up."""
        return self._known("callers", path, self._callers)

    def _known(self, kind: str, path: str, find: Callable[[str], list[str]]) -> list[str]:
        found = self._relatives.get((kind, path))
        if found is None:
            found = self._relatives[kind, path] = find(path)
        return found

    def _called_children(self, path: str) -> list[str]:
        found: list[str] = []
        for name, child in own_children(self.modules[path]).items():
            if child is None:
                continue
            canonical = self._canonical[f"{path}.{name}"]
            found += [canonical] if self.is_called(canonical) else self.called_children(canonical)
        if path in self.annexes:
            found += self.called_children(f"{path}.{ANNEX}")
        return found

    def _ancestors(self, path: str) -> list[str]:
        found: list[str] = []
        queue = list(self._parents[path])
        while queue:
            parent = queue.pop(0)
            if parent not in found:
                found.append(parent)
                queue += self._parents[parent]
        return [parent for parent in found if self.is_called(parent)]

    def _callers(self, path: str) -> list[str]:
        found: list[str] = []
        for parent in self._parents[path]:
            found += [parent] if self.is_called(parent) else self.callers(parent)
        return found

    def _kind(self) -> str:
        return type(self.root).__name__


def _has_forward(module: nn.Module) -> bool:
    is_own = getattr(type(module), "forward", None) is not getattr(nn.Module, "forward", None)
    return is_own or "dynamo_ctx" in vars(module)  # what torch.compile returns has it on itself
