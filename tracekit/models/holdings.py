"""Copies of a module's weights, wherever these are: in memory, offloaded, or quantised."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, final

from torch import Tensor, nn

from tracekit.architectures.matrices import unfit
from tracekit.capture import showing_own_lines
from tracekit.core.nest import describe
from tracekit.core.offload import brought
from tracekit.core.tree import Tree
from tracekit.errors import (
    InputError,
    OffloadedError,
    UnknownPathError,
    UnsupportedError,
    did_you_mean,
)
from tracekit.tracing.envoy import Envoy


@final
class Holdings(Mapping[str, Tensor]):
    """Copies of the parameters and buffers of a module, by name: each made when it is asked for.

    What accelerate keeps elsewhere is read from there, and what torchao has quantised is handed
    out dequantised. Writing to a copy changes nothing.
    """

    def __init__(self, tree: Tree, path: str) -> None:
        self._root, self._path = tree.root, path
        below = tree.below(path)
        self._prefix = f"{below}." if below else ""

    @showing_own_lines
    def __getitem__(self, name: str) -> Tensor:
        weight = self._held().get(name)
        if weight is None:
            near = did_you_mean(name, self._held())
            raise UnknownPathError(f"{self._path} has no weight {name!r}{near}")
        found = brought(self._root, self._prefix + name) if weight.is_meta else weight.detach()
        if found is None:
            raise OffloadedError(
                f"{self._path}.{name} is not in memory, and nothing is there to bring it."
            )
        if isinstance(weight, nn.Parameter):
            found = self._as_numbers(name, found)
        return found if weight.is_meta else found.clone()

    def __iter__(self) -> Iterator[str]:
        return iter(self._held())

    def __len__(self) -> int:
        return len(self._held())

    def __repr__(self) -> str:
        held = self._held().items()
        lines = (f"\n  {name}: {describe(weight)}" for name, weight in held)
        return f"Holdings of {self._path} ({len(self)} weights){''.join(lines)}"

    def _as_numbers(self, name: str, weight: Tensor) -> Tensor:
        why = unfit(weight)
        if why is None:
            return weight
        if type(weight).dequantize is not Tensor.dequantize:
            return weight.dequantize()
        raise UnsupportedError(
            f"{self._path}.{name} can't be read as numbers: {why}. Call the module instead, or "
            f"load the model without."
        )

    def _held(self) -> dict[str, Tensor]:
        module = self._root.get_submodule(self._prefix.removesuffix("."))
        found: dict[str, Tensor] = dict(module.named_parameters(remove_duplicate=False))
        found.update(module.named_buffers(remove_duplicate=False))
        return found


class Weights:
    """What is asked of a model's weights: `model.weights`."""

    def __init__(self, model: Any) -> None:
        self._model = model

    @showing_own_lines
    def of(self, module: Envoy | nn.Module | str) -> Holdings:
        """`model.weights.of(model.lm_head)["weight"]`: copies of a module's weights, by name.

        Wherever they are: what `device_map` keeps on the disk or the CPU is read from there, one
        weight at a time, and handed out on the device that the module computes on. The module is
        an Envoy, a PyTorch module, or a path; of a module with parts, names are paths below it.
        """
        if self._model._tree.load_first is not None:
            self._model._tree.load_first()
        tree: Tree = self._model._here()
        return Holdings(tree, _path_in(tree, self._model, module))

    def __repr__(self) -> str:
        return f"Weights of {self._model.path}: weights.of(module) has copies of a module's"


def _path_in(tree: Tree, model: Any, module: Envoy | nn.Module | str) -> str:
    if isinstance(module, str):
        return tree.canonical(module)
    if isinstance(module, Envoy):
        if module.belongs_to(model._tree) or module.belongs_to(tree):
            return tree.canonical(module.path)
    else:
        found = next((path for path in tree.order if tree.modules[path] is module), None)
        if found is not None:
            return found
    kind = type(module).__name__
    raise InputError(
        f"weights.of() takes a module of this model, or its path, and this {kind} is none."
    )
