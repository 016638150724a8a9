"""Functions that a user puts at activations, called in the forward pass: `fn(tensor, hook)`."""

# They stand at what the model goes on with before the blocks of a trace see it, in the order in
# which they were given, and are put on the modules for each run alone. A function is called on the
# thread of the model, in every forward of a generation. What it returns takes the activation's
# place; None leaves it, as the function changed it in place, or not at all.

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, Protocol, TypeAlias, cast, final

from torch import Tensor

from tracekit.architectures import Bound, Sharing
from tracekit.core.nest import misfit, replace_tensor
from tracekit.core.site import Site, Visit
from tracekit.core.tree import Tree
from tracekit.core.versions import changes
from tracekit.errors import GradientError, InputError, MisfitError, NeverRanError, UnsupportedError
from tracekit.interleave.hooks import Hooks
from tracekit.interleave.interleaver import Look
from tracekit.tracing.named import tensor_of
from tracekit.tracing.touches import Author, of_code
from tracekit.tracing.wanted import Names, Spot, wanted

Direction: TypeAlias = Literal["fwd", "bwd"]
Function: TypeAlias = "Callable[[Any, HookPoint], Any]"
Pairs: TypeAlias = "Iterable[tuple[Names, Function]]"


@final
@dataclass
class HookPoint:
    """Where a function is called: its second argument."""

    name: str  # as it was asked for; the standard name where that was not one name
    key: str  # the standard name, as a cache has it
    number: int | None  # of the layer
    ctx: dict[str, Any] = field(default_factory=dict[str, Any])  # the function's own, for all runs

    def layer(self) -> int | None:
        """The number of the layer; None for what is of the whole model."""
        return self.number


@final
class Hooked:
    """A function at some activations, until it is removed."""

    def __init__(
        self,
        tree: Tree,
        names: Names,
        function: Function,
        direction: Direction,
        what: str,
        *,
        is_permanent: bool = False,
    ) -> None:
        if not callable(function):
            raise InputError(
                f"{what} takes pairs of names and a function of `(tensor, hook)`, as in "
                f"[(('resid_post', 3), fn)]; not {function!r:.40}."
            )
        if direction not in ("fwd", "bwd"):
            raise InputError(f"dir= is 'fwd' or 'bwd', not {direction!r}.")
        self.spots = wanted(tree, names, what)
        self.function = function
        self.direction = direction
        self.points = [_point(spot) for spot in self.spots]
        self.has_run = False
        self.is_permanent = is_permanent
        self.is_scoped = False  # a `with` takes it away
        self._removed = False

    @property
    def is_on(self) -> bool:
        """Whether it was not removed."""
        return not self._removed

    def remove(self) -> None:
        """Take it away, for all runs to come; gradients of runs before do not meet it either."""
        self._removed = True

    def __enter__(self) -> Hooked:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        state = "" if self.is_on else ", removed"
        names = ", ".join(spot.key for spot in self.spots[:3])
        more = f" and {len(self.spots) - 3} more" if len(self.spots) > 3 else ""
        return f"Hook({self.direction}: {names}{more}{state})"


def author_of(each: Hooked) -> Author:
    """What an edit that a function makes is called, and where the function stands."""
    names = ", ".join(spot.spelled for spot in each.spots[:2])
    more = f" and {len(each.spots) - 2} more" if len(each.spots) > 2 else ""
    return of_code("hook", f"the hook at {names}{more}", each.function, len(each.spots))


def _point(spot: Spot) -> HookPoint:
    return HookPoint(spot.spelled, spot.key, spot.named.key.layer)


def hooked(tree: Tree, pairs: Pairs, direction: Direction) -> list[Hooked]:
    """What `fwd_hooks=` or `bwd_hooks=` says; errors for names that the model does not have."""
    what = f"{direction}_hooks="
    made: list[Hooked] = []
    for pair in pairs:
        told = cast("object", pair)
        given = cast("Sequence[Any]", told) if isinstance(told, (tuple, list)) else ()
        if len(given) != 2:
            raise InputError(
                f"{what} takes pairs of names and a function of `(tensor, hook)`, as in "
                f"[(('resid_post', 3), fn)]; not {pair!r:.40}."
            )
        made.append(Hooked(tree, given[0], given[1], direction, what))
    return made


class Run(Protocol):
    """What the functions need to know of the run that they are called in (Fixtures)."""

    has_grad: bool

    @property
    def step(self) -> int: ...
    def copy_what_shares(self, value: object) -> None: ...
    def look(self, visit: Visit, value: object) -> Sequence[Look]: ...
    def kept(self, site: Site, author: Author, change: Callable[[Any], Any], value: Any) -> Any: ...
    @property
    def is_recomputed(self) -> Callable[[str], bool]: ...


@final
class Firings:
    """The functions of one run: where they are called, and whether they were."""

    def __init__(self, every: Iterable[Hooked], run: Run) -> None:
        self._every = [each for each in every if each.is_on]
        self._fired: set[tuple[int, str]] = set()
        self._is_inside = False  # of a function, which may call the model itself
        self._run: Any = run

    def place(self, hooks: Hooks) -> None:
        """Put them on, for this run."""
        for number, each in enumerate(self._every):
            each.has_run = True
            for spot, point in zip(each.spots, each.points, strict=True):
                call = _Call(self, number, each, spot, point)
                hooks.edit(spot.site.path, spot.site.slot, call)

    def let_go(self) -> None:
        """The run is over."""
        self._run = None

    def check(self, is_gone: Callable[[str], bool]) -> None:
        """NeverRanError for a function that was never called where it was to be.

        What `is_gone` says yes to is no part of the run.
        """
        for number, each in enumerate(self._every):
            fired = [spot for spot in each.spots if (number, spot.key) in self._fired]
            due = [spot for spot in each.spots if not is_gone(spot.site.path)]
            named = [spot for spot in due if spot.is_named and spot not in fired]
            if due and (named or not fired):
                missed = (named or due)[0]
                raise NeverRanError(
                    f"the hook at {missed.spelled} was never called: {missed.site} did not come in "
                    f"this run."
                )

    def fire(self, number: int, each: Hooked, spot: Spot, point: HookPoint, value: Any) -> Any:
        """What the model goes on with after one call of a function."""
        if self._is_inside or not each.is_on:
            return value
        self._is_inside = True
        try:
            self._fired.add((number, spot.key))
            change = partial(_changed, self._run, each, spot, point)
            if each.direction == "bwd":
                return change(value)
            return self._run.kept(spot.site, author_of(each), change, value)
        finally:
            self._is_inside = False


@final
class _Call:
    """One function at one activation, in one run."""

    def __init__(
        self, owner: Firings, number: int, each: Hooked, spot: Spot, point: HookPoint
    ) -> None:
        self._owner = owner
        self._given = (number, each, spot, point)
        self._named = spot.named
        self._count = 0

    def __call__(self, value: Any) -> Any:
        count, self._count = self._count, self._count + 1
        if self._named.call is not None and count % self._named.calls != self._named.call:
            return value
        return self._owner.fire(*self._given, value)


def _changed(run: Run, each: Hooked, spot: Spot, point: HookPoint, value: Any) -> Any:
    bound = spot.named.bound
    run.copy_what_shares(value)
    looks = run.look(Visit(spot.site, run.step), value)
    old = tensor_of(bound, value)
    if bound.sharing is Sharing.APART:
        apart = old.clone()
        value, old = replace_tensor(value, old, apart), apart
    if each.direction == "bwd":
        _await(each, bound, point, old)
        return value
    before = changes(old)
    new = each.function(bound.view(old), point)
    is_edited = new is not None or changes(old) != before
    if is_edited and run.has_grad and run.is_recomputed(spot.site.path):
        raise UnsupportedError(
            f"{point.name} was edited inside a layer under gradient checkpointing: backward would "
            f"compute the layer again without the edit, and give other gradients. Switch "
            f"checkpointing off, or edit the layer's own output."
        )
    if new is not None:
        value = _written(bound, point, value, old, new)
    for look in looks:
        look.note(value)
    return value


def _written(bound: Bound, point: HookPoint, value: Any, old: Tensor, new: Any) -> Any:
    """`value` with `new` as the activation."""
    part = bound.view(old)
    wrong = misfit(new, part, point.name)
    if wrong is not None:
        raise MisfitError(f"{wrong} by its hook; a hook returns the new value, or None.")
    if bound.sharing is Sharing.SHARED:
        part.copy_(new)
        return value
    whole = new.clone()  # the model may write into it, and the function keep it
    if part is not old:
        whole = old.clone()
        bound.view(whole).copy_(new)
    return replace_tensor(value, old, whole)


# -- gradients ------------------------------------------------------------------------------------


def _await(each: Hooked, bound: Bound, point: HookPoint, tensor: Tensor) -> None:
    """Call the function with the gradient of the activation, whenever one comes."""
    if not tensor.requires_grad:
        raise GradientError(
            f"the hook at the gradient of {point.name} can't be called: the model computes without "
            f"gradients there (torch.no_grad(), or frozen parameters?)."
        )
    tensor.register_hook(partial(_of_gradient, each, bound, point))


def _of_gradient(each: Hooked, bound: Bound, point: HookPoint, gradient: Tensor) -> Tensor | None:
    if not each.is_on:
        return None
    whole = gradient.clone()
    part = bound.view(whole)
    new: Any = each.function(part, point)
    if type(new) is tuple and len(cast("tuple[Any, ...]", new)) == 1:  # as in TransformerLens
        new = cast("tuple[Any, ...]", new)[0]
    if new is not None:
        wrong = misfit(new, part, f"the gradient of {point.name}")
        if wrong is not None:
            raise MisfitError(f"{wrong} by its hook; a hook returns the new value, or None.")
        part.copy_(cast("Tensor", new))
    return whole
