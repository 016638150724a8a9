"""`model.verify(edit, input)`: an edit of any form, held against a run without it."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Final, cast, final

import torch
from torch import Tensor, nn

from tracekit.core.nest import map_leaves
from tracekit.core.tree import Tree
from tracekit.core.twin import twin
from tracekit.errors import InputError, TracekitError, UnsupportedError
from tracekit.models.face import calling
from tracekit.models.kv_cache import KeyValueCache
from tracekit.tracing.declared import DeclaredEdit
from tracekit.tracing.edit import Edit
from tracekit.tracing.execution import Intervention
from tracekit.tracing.hooked import Hooked
from tracekit.tracing.rehearsal import is_of_a_library
from tracekit.tracing.tracer import Tracer
from tracekit.tracing.verified.precision import with_precision
from tracekit.tracing.verified.report import EditReport
from tracekit.tracing.verified.run import Verifier, Wanted

_HALVES: Final = (torch.float16, torch.bfloat16)


@final
class Given:
    """What a user gave as an edit: what is put beside the run, and the function that is run in it.

    InputError for what is no edit.
    """

    def __init__(self, model: Any, given: object) -> None:
        self._model = model
        self.interventions: list[Intervention] = []
        self.function: Callable[..., Any] | None = None
        self._add(given)

    def _add(self, given: object) -> None:
        from tracekit.models.model import Model

        pair = cast("tuple[Any, ...]", given) if isinstance(given, tuple) else ()
        if isinstance(given, Model):
            self._add_model(given)
        elif isinstance(given, Edit):
            self.interventions.append(given.intervention())
        elif isinstance(given, Hooked):
            self.interventions.append(calling([given]))
        elif len(pair) == 2 and (callable(pair[1]) or isinstance(pair[1], (Tensor, int, float))):
            self._add_pair(*pair)
        elif isinstance(given, Sequence) and not isinstance(given, (str, tuple)):
            for each in cast("Sequence[object]", given):
                self._add(each)
        elif callable(given):
            self._add_function(given)
        else:
            raise _no_edit(given)

    def _add_model(self, given: Any) -> None:
        if given.module is not self._model.module:
            raise InputError("verify() takes an edited model of the same module, not of another.")
        own = given._interventions()
        self.interventions += own
        if not own:
            raise InputError("this model has no lasting edits: there is nothing to verify.")

    def _add_pair(self, modules: Any, change: Any) -> None:
        tree = self._model._tree
        takes = _required(change)
        if takes < 2 and not _is_a_name(modules):
            self.interventions += DeclaredEdit(tree, (modules, change)).interventions()
            return
        function: Any = change
        if takes < 2:
            function = partial(_without_hook if takes else _written, change)
        self.interventions.append(calling([Hooked(tree, modules, function, "fwd", "verify()")]))

    def _add_function(self, function: Callable[..., Any]) -> None:
        if self.function is not None:
            raise InputError(
                "verify() takes one function that is run as a block, and two were given: write one "
                "that does both."
            )
        self.function = function


def verify(
    model: Any, edit: object, args: tuple[Any, ...], kwargs: dict[str, Any], wanted: Wanted
) -> EditReport:
    """The report of one run of `model` with the edit, on what `trace` takes."""
    report = _verified(model, edit, args, kwargs, wanted)
    is_checked = wanted.check_precision
    dtype = next((w.dtype for w in model.module.parameters() if w.is_floating_point()), None)
    if is_checked is None:
        is_checked = dtype in _HALVES
    if not is_checked or not report.edits:
        return report
    other = _in_float32(model)
    own_args, own_kwargs = map_leaves(_as_float32, (args, kwargs))
    again = _verified(other, edit, own_args, own_kwargs, wanted)
    return with_precision(report, again, str(dtype).removeprefix("torch."))


def _verified(
    model: Any, edit: object, args: tuple[Any, ...], kwargs: dict[str, Any], wanted: Wanted
) -> EditReport:
    verified_as(True, kwargs)
    given = Given(model, edit)
    call = model._pass(args, kwargs)
    tree: Tree = model._tree
    verifier = Verifier(tree, wanted, model._tell)
    edits = [*model._interventions(), *given.interventions]
    tracer = Tracer(tree, call, None, edits, verifier)
    try:
        tracer.run(given.function) if given.function is not None else tracer.run()
    except TracekitError:
        if verifier.report is None:
            raise
    assert verifier.report is not None
    return verifier.report


def _in_float32(model: Any) -> Any:
    """The model with a copy of its weights in float32; it stands for the same modules."""
    try:
        found = twin(model._tree, _copied_in_float32, is_of_a_library)
    except Exception as error:
        raise UnsupportedError(
            f"{type(model.module).__name__} can't be copied into float32 ({error}): give "
            f"check_precision=False."
        ) from error
    found.names  # noqa: B018 - they are found once
    other = copy.copy(model)
    object.__setattr__(other, "_tree", found)
    return other


def _copied_in_float32(tensor: Tensor) -> Tensor:
    own = _as_float32(tensor.detach())
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(own, requires_grad=tensor.requires_grad)
    return own.clone() if own is tensor.detach() else own


def _as_float32(leaf: Any) -> Any:
    return leaf.float() if isinstance(leaf, Tensor) and leaf.dtype in _HALVES else leaf


def _required(function: Any) -> int:
    """How many arguments a function requires, 1 where nobody knows; of what is none, 0."""
    if isinstance(function, Tensor) or not callable(function):
        return 0
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return 1
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    needed = (each.default is each.empty and each.kind in kinds for each in parameters)
    return max(1, sum(needed))


def _is_a_name(modules: object) -> bool:
    """Whether it is a standard name of one layer: ("resid_post", 3)."""
    if not isinstance(modules, tuple):
        return False
    parts = cast("tuple[object, ...]", modules)
    return len(parts) > 1 and isinstance(parts[0], str) and isinstance(parts[1], int)


def _without_hook(function: Callable[[Any], Any], tensor: Tensor, _: object) -> Any:
    return function(tensor)


def _written(value: Any, tensor: Tensor, _: object) -> Tensor:
    return value if isinstance(value, Tensor) else torch.full_like(tensor, value)


def refuse_generation(kwargs: Mapping[str, Any]) -> None:
    """UnsupportedError if a generation is to be verified."""
    if kwargs.get("verify"):
        raise UnsupportedError(
            "verify= is of one forward pass: a generation with other tokens has nothing to be held "
            "against. Verify the edit on the prompt, or on what was generated, as in "
            "model.verify(edit, model.generate(prompt))."
        )


def verified_as(verify: object, kwargs: Mapping[str, Any]) -> Wanted | None:
    """How a trace is to be verified; UnsupportedError where it can't run more than once."""
    wanted, prefix = Wanted.of(verify), kwargs.get("prefix")
    if wanted is not None and isinstance(prefix, KeyValueCache) and not prefix.frozen:
        raise UnsupportedError(
            "verify= runs the model more than once, and this KeyValueCache would grow each time: "
            "freeze() it, or give prefix=model.prefill(prompt)."
        )
    return wanted


def _no_edit(given: object) -> InputError:
    return InputError(
        f"verify() takes an edited model, a lasting edit, a pair of modules and what becomes of "
        f"them, a pair of a name and a function of `(tensor, hook)`, a function that is run as a "
        f"block, or a list of these; not {given!r:.60}."
    )
