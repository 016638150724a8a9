"""`with tracekit.backward(loss):` reads and replaces gradients while the backward pass runs."""

# The block runs where it stands. The pass runs on a worker, from one gradient that the block asks
# for to the next: it pauses in a hook of the tensor, and goes on with what the block left there.
#
# Guarantees, on every way out (the end, an error in the block or in the pass, Ctrl-C):
#   - no worker is parked, no hook of ours is on a tensor, torch.Tensor is as it was;
#   - a gradient that the block only reads does not change the pass in any bit.
#
# Autograd hands the same tensor to several operations (to both sides of `a + b`), so a block that
# edited it in place would change gradients elsewhere. So the block gets a copy, and the pass goes
# on with a copy of that if it was changed.

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from types import TracebackType
from typing import Any, TypeVar, cast, final

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from tracekit.capture import caller_frame, show_own_lines, user_traceback
from tracekit.core.nest import describe, misfit
from tracekit.core.origins import Rows, origin_of
from tracekit.core.versions import UNKNOWN, version
from tracekit.errors import GradientError, MisfitError, SiteOrderError
from tracekit.interleave.aside import Aside
from tracekit.interleave.protocol import State
from tracekit.tracing.attribute import answering, with_items_opened_by, with_save
from tracekit.tracing.reach import (
    Edge,
    edge_of,
    is_reached,
    name_of,
    why_no_graph,
    why_not_reached,
)
from tracekit.tracing.save import name_cure

T = TypeVar("T")


def backward(
    loss: Tensor,
    gradient: Tensor | None = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    inputs: Any = None,
) -> Backward:
    """A `with` block beside the backward pass of `loss`; the arguments are `Tensor.backward`'s.

    In the block `x.grad` is the gradient that this pass brings to `x`: of any tensor that the
    loss was computed from, parameters included. Reading it lets the pass run that far, so ask in
    backward order, later layers first. Assign to it, or edit it in place, and the pass goes on
    with that. In the block of a trace, `with loss.backward():` means the same.

        with tracekit.backward(loss):
            g5 = h5.grad
            h3.grad[:, 0] = 0

    Raises GradientError where no gradient can come, SiteOrderError where it has passed.
    """
    return Backward(loss, gradient, retain_graph, create_graph, inputs)


def backward_item(value: Any, *args: Any, **kwargs: Any) -> Any:
    """What `with value.backward(...):` enters in a block."""
    return (
        backward(value, *args, **kwargs)
        if isinstance(value, Tensor)
        else value.backward(*args, **kwargs)
    )


def with_methods_of_blocks(function: Callable[..., T], *args: Any) -> T:
    """`function(*args)`, where `with x.backward(...):` and `x.save()` are as if compiled."""
    with with_items_opened_by(backward_item), with_save():
        try:
            return function(*args)
        except AttributeError as error:
            name_cure(error)
            raise


class _Halt:
    """Where the pass is paused: what arrived at a node's outputs, and what it goes on with."""

    def __init__(self, node: Any, arrived: dict[int, Tensor | None]) -> None:
        self.node = node
        self.arrived = arrived
        self._given: dict[int, tuple[Tensor, int]] = {}  # the block's copies, and their versions

    def gradient(self, output: int) -> Tensor:
        """The block's own copy of what arrived at an output."""
        if output not in self._given:
            arrived = self.arrived[output]
            assert arrived is not None
            copy = arrived.clone()
            self._given[output] = copy, version(copy)
        return self._given[output][0]

    def replace(self, output: int, gradient: Tensor) -> None:
        """Go on with `gradient` from an output."""
        given = self._given.get(output)
        if given is None or given[0] is not gradient:  # `x.grad *= 2` has worked in place
            self._given[output] = gradient.clone(), UNKNOWN

    def outcome(self, output: int) -> Tensor | None:
        """What the pass goes on with, if it is not what arrived."""
        given, then = self._given.get(output, (None, 0))
        is_changed = given is not None and (then == UNKNOWN or version(given) != then)
        return given.clone() if given is not None and is_changed else None


@final
class Backward:
    """A backward pass with a block beside it; `tracekit.backward` makes one, for one `with`."""

    def __init__(
        self,
        loss: Tensor,
        gradient: Tensor | None,
        retain_graph: bool | None,
        create_graph: bool,
        inputs: Any,
    ) -> None:
        self._loss: Tensor | None = loss
        self._options = (gradient, retain_graph, create_graph, inputs)
        self._pass = Aside()
        self._root: Any = None  # the node where the pass begins
        self._halt: _Halt | None = None
        self._last: tuple[str, int] | None = None  # what was asked for last, and its line
        self._on_exit = ExitStack()

    def __repr__(self) -> str:
        where = "" if self._last is None else f" at {self._last[0]}"
        return f"<Backward {self._pass.state.name.lower()}{where}>"

    # -- the with statement ---------------------------------------------------------------------

    def __enter__(self) -> Backward:
        try:
            self._root = edge_of(self._checked_loss()).node
        except GradientError as error:
            error.__traceback__ = None  # the user's `with` is the only line of interest
            raise
        self._on_exit.enter_context(answering(self))
        return self

    def _checked_loss(self) -> Tensor:
        loss = self._loss
        if loss is None:
            raise GradientError("this backward pass has run; make another for another `with`.")
        if not isinstance(cast("object", loss), Tensor):
            raise GradientError(f"backward() takes a tensor, not {describe(loss)}.")
        if not loss.requires_grad:
            raise GradientError(f"there is no way back from {name_of(loss)}: {why_no_graph(loss)}.")
        if self._options[0] is None and loss.numel() != 1:
            raise GradientError(
                f"backward() goes back from one number, and {name_of(loss)} has {loss.numel()}: "
                f"take its .sum(), or give gradient=, a weight for each."
            )
        return loss

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self._on_exit.close()
            if error is not None:
                error.__traceback__ = user_traceback(error)
                return
            self._finish()
        except BaseException as caught:
            show_own_lines(caught, caught.__context__)
            raise
        finally:
            self._pass.close()
            self._loss = self._root = self._halt = None
            del error, traceback

    def _finish(self) -> None:
        if self._pass.state is State.READY:  # nothing was asked for: no worker is needed
            self._run()
        elif self._pass.state is State.WAITING:
            self._pass.resume()

    def _run(self) -> None:
        loss, self._loss = self._loss, None
        assert loss is not None
        loss.backward(*self._options)

    def _run_in_turns(self) -> None:
        # On threads of autograd's own (there are some for each GPU) nobody could pause.
        with torch.autograd.set_multithreading_enabled(False):
            self._run()

    # -- in the block ---------------------------------------------------------------------------

    def read(self, tensor: Tensor) -> Tensor:
        """The gradient that the pass brings to `tensor`; lets the pass run that far."""
        halt, output, rows = self._go_to(tensor)
        gradient = halt.gradient(output)
        return gradient if rows is None else rows.part.of(gradient)

    def write(self, tensor: Tensor, gradient: object) -> None:
        """Let the pass go on with `gradient` from `tensor`."""
        halt, output, rows = self._go_to(tensor)
        arrived = halt.arrived[output]
        assert arrived is not None
        found = misfit(gradient, arrived if rows is None else rows.part.of(arrived), "the gradient")
        if found is not None:
            raise MisfitError(
                f"the gradient of {name_of(tensor)} cannot be replaced so: {found}; write a "
                f"tensor of the same shape, dtype and device (for none, torch.zeros_like)."
            )
        new = cast("Tensor", gradient)
        if rows is None:
            halt.replace(output, new)
        else:
            rows.part.of(halt.gradient(output)).copy_(new)

    def _go_to(self, tensor: Tensor) -> tuple[_Halt, int, Rows | None]:
        """Let the pass run until the gradient of `tensor` has arrived."""
        origin = origin_of(tensor)
        rows = origin.rows if origin is not None else None
        whole = tensor if rows is None else rows.base
        edge = self._edge(tensor, whole)
        halt = self._halt
        if halt is None or edge.node is not halt.node or edge.output not in halt.arrived:
            halt = self._run_to(edge, whole, tensor)
        if halt.arrived[edge.output] is None:
            raise GradientError(
                f"no gradient comes to {name_of(tensor)}: the operations that used it give none."
            )
        return halt, edge.output, rows

    def _edge(self, tensor: Tensor, whole: Tensor) -> Edge:
        """Where the gradient arrives; raises where it never will."""
        if not whole.requires_grad:
            raise GradientError(f"{name_of(tensor)} has no gradient: {_why(tensor, whole)}.")
        edge = edge_of(whole)
        is_over = self._pass.state is State.DONE
        here = self._root if self._halt is None else self._halt.node
        if not is_over and is_reached(edge.node, [here]):
            return edge
        if not is_reached(edge.node, [self._root]):
            raise GradientError(f"{name_of(tensor)} has no gradient: {why_not_reached(whole)}.")
        if is_over or is_reached(here, [edge.node]):
            raise self._too_late(tensor)
        return edge  # on a branch beside the one that the pass is on: it may come yet

    def _run_to(self, edge: Edge, whole: Tensor, asked: Tensor) -> _Halt:
        line = caller_frame().f_lineno
        if self._halt is not None and self._halt.node is edge.node:
            # Hooks of its tensors are being called; those of the node itself come next.
            handle = edge.node.register_prehook(partial(self._pause_at_node, edge.node))
            _call_first(handle)
        else:
            handle = whole.register_hook(partial(self._pause_at_tensor, edge))
        self._halt = None
        try:
            if self._pass.state is State.READY:
                self._pass.start(self._run_in_turns)
            else:
                self._pass.resume()
        finally:
            handle.remove()
        if self._halt is None:
            raise self._too_late(asked)
        self._last = (name_of(asked), line)
        return self._halt

    def _too_late(self, tensor: Tensor) -> Exception:
        if self._options[-1] is not None:
            return GradientError(
                f"the pass ended without the gradient of {name_of(tensor)}: it goes only where "
                f"inputs= needs it, so name the tensor there."
            )
        after = (
            "" if self._last is None else f" after that of {self._last[0]} (line {self._last[1]})"
        )
        return SiteOrderError(
            f"the gradient of {name_of(tensor)} was asked for{after}, when the backward pass had "
            f"gone past it; ask in backward order, later layers first, and keep each in a name."
        )

    # -- the pass's side ------------------------------------------------------------------------

    def _pause_at_tensor(self, edge: Edge, arrived: Tensor | None) -> Tensor | None:
        halt = self._halt = _Halt(edge.node, {edge.output: arrived})
        self._pass.pause()
        return halt.outcome(edge.output)

    def _pause_at_node(
        self, node: Any, arrived: tuple[Tensor | None, ...]
    ) -> tuple[Tensor | None, ...]:
        halt = self._halt = _Halt(node, dict(enumerate(arrived)))
        self._pass.pause()
        outcomes = [halt.outcome(output) for output in range(len(arrived))]
        return tuple(
            old if new is None else new for old, new in zip(arrived, outcomes, strict=True)
        )


def _call_first(handle: RemovableHandle) -> None:
    """Call this hook before those that record: they see what the pass goes on with."""
    hooks: Any = handle.hooks_dict_ref()
    for key in [key for key in hooks if key != handle.id]:
        hooks[key] = hooks.pop(key)  # autograd does not see move_to_end()


def _why(tensor: Tensor, whole: Tensor) -> str:
    if whole is tensor or not tensor.requires_grad:
        return why_no_graph(whole)
    return (
        "only these rows of the batch were made to require grad, and the model does not go on "
        "with them alone: assign them back, as in x.output = x.output.clone().requires_grad_(True)"
    )
