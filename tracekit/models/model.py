"""A Model is any nn.Module that can be traced; it is the Envoy of its own root."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from tracekit.capture import caller_frame, is_with_item
from tracekit.core.tree import Tree
from tracekit.errors import InputError
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

        Takes what the module's forward takes.
        """
        module = self.module
        if not args and not kwargs and _needs_input(module):
            raise InputError(
                f"trace() needs what {type(module).__name__}.forward takes: "
                f"{inspect.signature(module.forward)}."
            )
        return Tracer(self._tree, lambda _: run(self._tree, args, kwargs))

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate; as the header of a `with`, trace all its steps, else return the tokens.

        Takes what the module's own `generate` takes (Hugging Face: `max_new_tokens`, …).
        """
        return self._traced_or_run(self._generation(args, kwargs))

    def _generation(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[..., Any]:
        module = self.module
        if not callable(getattr(module, "generate", None)):
            raise InputError(f"{type(module).__name__} has no generate().")
        return lambda end_step=None: generate(self._tree, end_step, args, kwargs)

    def _traced_or_run(self, call: Callable[..., Any]) -> Any:
        if is_with_item(caller_frame()):
            return Tracer(self._tree, call, grad=False)  # generate runs without gradients
        return call()

    def __repr__(self) -> str:
        return repr(self.module)


def _needs_input(module: nn.Module) -> bool:
    parameters = inspect.signature(module.forward).parameters.values()
    optional = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return any(p.default is p.empty and p.kind not in optional for p in parameters)
