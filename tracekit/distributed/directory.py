"""What client and host both have, and need not send: the modules of one model, by path."""

from __future__ import annotations

from functools import cached_property
from types import SimpleNamespace
from typing import Any, final

import torch
from torch import Tensor, nn

from tracekit.distributed import tensors
from tracekit.errors import UnsendableError
from tracekit.models.model import Model
from tracekit.tracing.envoy import Envoy


@final
class ModelDirectory:
    """Names what belongs to `model`, and finds by these names what belongs to it.

    On the client weights have names, too; a host sends their numbers instead, as the client may
    have none.
    """

    def __init__(
        self,
        model: Model,
        has_named_weights: bool,
        put_on: torch.device | str | None = None,
        host: object = None,
    ) -> None:
        self._model = model
        self._host = host
        self._put_on = None if put_on is None else torch.device(put_on)
        self._tree: Any = model._tree  # pyright: ignore[reportPrivateUsage] - the model's modules
        self._has_named_weights = has_named_weights

    @cached_property
    def _modules(self) -> dict[int, str]:
        return {id(module): path for path, module in self._tree.root.named_modules()}

    @cached_property
    def _weights(self) -> dict[int, str]:
        if not self._has_named_weights:
            return {}
        root = self._tree.root
        named = [*root.named_parameters(), *root.named_buffers()]
        return {id(tensor): name for name, tensor in named}

    @cached_property
    def device(self) -> torch.device:
        """Where the model is."""
        first = next(self._tree.root.parameters(), None)
        return torch.device("cpu") if first is None or first.is_meta else first.device

    def name_of(self, value: object) -> tuple[Any, ...] | None:
        """How the other side finds it; None for what has to be sent.

        UnsendableError for a part of another model: it would be sent whole, and hook nothing.
        """
        if isinstance(value, Envoy):
            return self._name_of_envoy(value)
        if isinstance(value, nn.Module):
            path = self._modules.get(id(value))
            return None if path is None else ("module", path)
        if isinstance(value, Tensor):
            name = self._weights.get(id(value))
            return None if name is None else ("weight", name)
        if self._host is not None and isinstance(value, type(self._host)):
            return ("host",)
        tokenizer = getattr(self._model, "_tokenizer", None)
        return ("tokenizer",) if tokenizer is not None and value is tokenizer else None

    def _name_of_envoy(self, value: Any) -> tuple[Any, ...]:
        if value._tree is not self._tree:
            raise UnsendableError(
                f"it is {value._path!r} of another model than the one that runs on the host; a "
                f"block there can use one model, so take the values you need before the block"
            )
        if isinstance(value, Model):
            return ("model",)
        return ("envoy", value._path.split(".")[self._tree.name.count(".") + 1 :], value._call)

    def find(self, name: tuple[Any, ...]) -> object:
        """What the other side calls so."""
        kind, *rest = name
        if kind == "model":
            return self._model
        if kind == "host":
            return SimpleNamespace(model=self._model)  # for `host.model` in a block
        if kind == "tokenizer":
            return getattr(self._model, "_tokenizer")  # noqa: B009 - of a LanguageModel
        if kind == "envoy":
            found: Any = self._model
            for part in rest[0]:
                found = found[part]
            return found.calls[rest[1]] if rest[1] else found
        if kind == "module":
            return self._tree.root.get_submodule(rest[0])
        owner, _, last = rest[0].rpartition(".")
        return getattr(self._tree.root.get_submodule(owner), last)

    def dump_tensor(self, value: Any) -> tuple[Any, ...] | None:
        """A plain tensor as shape, dtype and bytes; None for all else."""
        return tensors.dump(value, value.device == self.device)

    def load_tensor(self, dumped: tuple[Any, ...]) -> Tensor:
        """The tensor: with the model here, if it was with the model there."""
        return tensors.load(dumped, self._put_on or self.device)

    def state_of(self, tensor: Any) -> object:
        """Differs once the tensor, or its gradient, was changed."""
        return tensors.state_of(tensor)

    def change(self, tensor: Any, dumped: tuple[Any, ...]) -> None:
        """Give a tensor the numbers, and the gradient, that it has on the other side."""
        tensors.change(tensor, dumped)
