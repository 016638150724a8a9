"""A Model is any nn.Module that can be traced; it is the Envoy of its own root."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, final

from torch import nn

from tracekit.capture import caller_frame, is_with_item
from tracekit.core.nest import tensors
from tracekit.core.tree import Tree
from tracekit.errors import InputError
from tracekit.models.batching import Batch, Inputs, join_inputs
from tracekit.models.generation import generate, run
from tracekit.tracing.envoy import Envoy
from tracekit.tracing.tracer import Tracer


class Model(Envoy):
    """Any PyTorch module, ready to be traced.

    The module itself is not changed: outside a trace it runs as if tracekit were not there.
    `name` is the first part of every path, as in `model.layers.0`.
    """

    __slots__ = ()

    def __init__(self, module: nn.Module, name: str = "model") -> None:
        super().__init__(Tree(module, name), name)

    def trace(self, *args: Any, **kwargs: Any) -> Tracer:
        """`with model.trace(input) as tracer:` runs the block beside one forward pass.

        Takes what the module's forward takes. Without input, each `with tracer.invoke(input):` in
        the block has rows of its own in one pass; inputs are joined along their first axis.
        """
        if is_without_input(args, kwargs) and _takes_input(self.module):
            return Tracer(self._tree, self._batch(kwargs, run_forward, "trace"))
        return Tracer(self._tree, lambda _: run(self._tree, args, kwargs))

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate; as the header of a `with`, trace all its steps, else return the tokens.

        Takes what the module's own `generate` takes (Hugging Face: `max_new_tokens`, …).
        """
        call = self._generation(args, kwargs)
        if is_without_input(args, kwargs) and is_with_item(caller_frame()):
            batch = self._batch(kwargs, generate, "generate")
            return Tracer(self._tree, batch, grad=False)
        return self._traced_or_run(call)

    def _generation(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[..., Any]:
        module = self.module
        if not callable(getattr(module, "generate", None)):
            raise InputError(f"{type(module).__name__} has no generate().")
        return lambda end_step=None: generate(self._tree, end_step, args, kwargs)

    def _batch(self, shared: dict[str, Any], call: Callable[..., Any], kind: str) -> Batch:
        return Batch(_Joined(shared), self._tree, call, kind)

    def _traced_or_run(self, call: Callable[..., Any]) -> Any:
        if is_with_item(caller_frame()):
            return Tracer(self._tree, call, grad=False)  # generate runs without gradients
        return call()

    def __repr__(self) -> str:
        return repr(self.module)


def run_forward(tree: Tree, _: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """One forward pass, as a call that steps mean nothing to."""
    return run(tree, args, kwargs)


@final
class _Joined:
    """Inputs of any module: joined along their first axis, beside what all calls `share`."""

    def __init__(self, shared: dict[str, Any]) -> None:
        self._shared = shared

    def read(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Inputs:
        return args, kwargs

    def joined(self, inputs: list[Inputs]) -> Inputs:
        args, kwargs = join_inputs(inputs)
        return args, {**kwargs, **self._shared}


def is_without_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether no tensor is given: the inputs come with invokes, then."""
    return not args and not any(True for _ in tensors(kwargs))


def _takes_input(module: nn.Module) -> bool:
    return bool(inspect.signature(module.forward).parameters)
