"""A model on several ranks against the same model on one: logits and activations, in numbers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from tracekit.core.nest import first_tensor, named_tensors, tensors
from tracekit.errors import InputError, LoadingError
from tracekit.interleave.meeting import digest
from tracekit.models.model import Model
from tracekit.tracing.select import Selector
from tracekit.tracing.sharded import sharding_of
from tracekit.tracing.tracer import Tracer
from tracekit.tracing.wanted import Names

_RESULT = "result"
_ROUNDING = 64  # of the last bits of the largest value: sums are made in another order


@final
@dataclass(frozen=True)
class RankReport:
    """How far the values of a model on `ranks` ranks are from those on one; true if all is well."""

    ranks: int
    deviations: dict[str, float]  # the largest difference, over the largest value on one rank
    tolerances: dict[str, float]
    problems: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return not self.problems

    @property
    def worst(self) -> str:
        """The value that is farthest off."""
        return max(self.deviations, key=self.deviations.__getitem__)

    def __repr__(self) -> str:
        if self.problems:
            count, shown = len(self.problems), "\n  ".join(self.problems[:8])
            more = f"\n  … and {count - 8} more" if count > 8 else ""
            return f"{self.ranks} ranks do not give what one gives:\n  {shown}{more}"
        return (
            f"{self.ranks} ranks give what one gives: {len(self.deviations)} values, the farthest "
            f"off is {self.worst}, by {self.deviations[self.worst]:.1e} of its largest."
        )


def save_tp_reference(
    path: str | Path,
    model: Model,
    *args: Any,
    modules: Selector | None = None,
    names: Names | None = None,
    **kwargs: Any,
) -> None:
    """Write what a model on one rank gives for an input, for `assert_tp_equal` on several.

    Takes an input as `model.trace` does. `modules` (as `tracer.cache`; every one by default) and
    `names` say which values, beside the result of the forward pass.
    """
    from safetensors.torch import save_file

    if sharding_of(model._tree) is not None:  # pyright: ignore[reportPrivateUsage] - a friend
        raise InputError("a reference is of the model on one rank: run this without torchrun.")
    values, given = _values(model, args, kwargs, modules, names)
    kept = {name: value.contiguous() for name, value in values.items()}
    save_file(kept, path, metadata={"tracekit_tp_reference": json.dumps({"input": given})})


def assert_tp_equal(
    model: Model,
    *args: Any,
    reference: Model | str | Path | None,
    modules: Selector | None = None,
    names: Names | None = None,
    tolerance: float | None = None,
    **kwargs: Any,
) -> RankReport:
    """The report of a tensor parallel model against itself on one rank; AssertionError if off.

    Call it on all ranks, with the same input: `assert_tp_equal(model, prompt, reference=whole)`.
    `reference` is the model on one rank (on rank 0, or on each; None elsewhere), or the path of a
    file that `save_tp_reference` wrote. `modules` and `names` are what to compare beside the
    logits, as `tracer.cache` takes them; by default the output of every module. `tolerance` is a
    difference over the largest value; by default rounding: 64 of its last bits. All ranks raise
    together.
    """
    __tracebackhide__ = True  # pytest shows the line of the test
    sharding = sharding_of(model._tree)  # pyright: ignore[reportPrivateUsage] - a friend
    if sharding is None:
        raise InputError(
            "assert_tp_equal compares a model on several ranks, and this one lies on one: run the "
            "script under torchrun, with LanguageModel(path, tp_plan='auto')."
        )
    values, given = _values(model, args, kwargs, modules, names)
    expected = None
    if isinstance(reference, Model):
        expected, _ = _values(reference, args, kwargs, modules, names)
    elif reference is not None:
        expected = _read(reference, given)
    own = None if expected is None else _report(sharding.ranks.size, values, expected, tolerance)
    reports: list[RankReport | None] = sharding.meeting.told(own)
    found = [each for each in reports if each is not None]
    if not found:
        raise InputError("reference= was None on every rank: give the model on one, on rank 0.")
    report = next((each for each in found if not each), found[0])
    if not report:
        raise AssertionError(repr(report))
    return report


def _values(
    model: Model, args: Any, kwargs: Any, modules: Selector | None, names: Names | None
) -> tuple[dict[str, Tensor], int]:
    """What the model gives, by name, and a number for what it was given."""
    caches: list[Any] = []

    def block(tracer: Tracer) -> Any:
        caches.append(tracer.cache(modules))
        if names is not None:
            caches.append(tracer.cache(names=names))
        return tracer.result

    with torch.no_grad():
        result: Any = model.trace(*args, **kwargs).run(block)
    found = {_RESULT: first_tensor(result)}
    for path in caches[0]:
        for key, tensor in named_tensors(caches[0][path].output):
            found[".".join(map(str, (path, *key)))] = tensor
    for key in caches[1] if names is not None else ():
        found[str(key)] = caches[1][key]
    given = digest([each.cpu() for each in tensors((args, kwargs))])
    return {name: each.detach().cpu() for name, each in found.items() if each is not None}, given


def _read(path: str | Path, given: int) -> dict[str, Tensor]:
    from safetensors import safe_open

    with safe_open(str(path), "pt") as file:  # pyright: ignore[reportUnknownVariableType] - untyped
        told = (file.metadata() or {}).get("tracekit_tp_reference")
        if told is None or json.loads(told)["input"] != given:
            why = "no reference" if told is None else "a reference for another input"
            raise LoadingError(f"{str(path)!r} is {why}: write it anew with save_tp_reference.")
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def _report(
    ranks: int, values: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float | None
) -> RankReport:
    deviations: dict[str, float] = {}
    tolerances: dict[str, float] = {}
    problems: list[str] = []
    for name, one in expected.items():
        several = values.get(name)
        if several is None or several.shape != one.shape:
            there = "nothing" if several is None else str(list(several.shape))
            problems.append(f"{name}: {there}, and {list(one.shape)} on one rank")
            continue
        deviations[name] = found = _deviation(several, one)
        tolerances[name] = allowed = _allowed(one) if tolerance is None else tolerance
        if not found <= allowed:
            problems.append(f"{name}: off by {found:.1e} of its largest value ({allowed:.0e} is)")
    problems += [f"{name}: there is none on one rank" for name in values if name not in expected]
    return RankReport(ranks, deviations, tolerances, tuple(problems))


def _deviation(several: Tensor, one: Tensor) -> float:
    if not one.numel():
        return 0.0
    a, b = several.double(), one.double()
    is_same = (a == b) | (a.isnan() & b.isnan())  # scores that are masked are infinite
    largest = b[b.isfinite()].abs().max() if bool(b.isfinite().any()) else b.new_ones(())
    return float(torch.where(is_same, 0.0, (a - b).abs()).max() / largest.clamp_min(1e-30))


def _allowed(one: Tensor) -> float:
    return _ROUNDING * torch.finfo(one.dtype).eps if one.is_floating_point() else 0.0
