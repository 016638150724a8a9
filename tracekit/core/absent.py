"""Refuse to compute with weights that are not in memory: torch would give numbers all the same."""

# torch 2.13 on the CPU: matmul, linear, conv, gather and others of a tensor with one on meta return
# memory that was never written, with no error; add_ does nothing.

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final, final

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tracekit.errors import OffloadedError

# What asks the other tensor for its shape, dtype or device alone, or writes onto meta.
_HARMLESS: Final = frozenset(
    {
        Tensor.to,
        Tensor.type_as,
        Tensor.view_as,
        Tensor.expand_as,
        Tensor.reshape_as,
        Tensor.copy_,
        Tensor.__setstate__,
    }
)


@final
class NoAbsentWeights(TorchFunctionMode):
    """Raises OffloadedError where a tensor on meta meets one that has numbers.

    For runs of a model that has weights elsewhere: of its blocks, and of the model itself, whose
    forward may read a weight of a module that it does not call.
    """

    def __init__(self, root: nn.Module, name: str) -> None:
        super().__init__()
        self._root, self._name = root, name

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = list(_tensors((*args, *kwargs.values())))
        absent = [tensor for tensor in given if tensor.is_meta]
        if absent and len(absent) < len(given) and func not in _HARMLESS:
            raise OffloadedError(self._told(func, absent[0]))
        return func(*args, **kwargs)

    def _told(self, func: Any, absent: Tensor) -> str:
        path, what = self._path(absent), getattr(func, "__name__", func)
        if not path:
            return (
                f"{what} was called with a tensor {list(absent.shape)} on meta, which has no "
                f"numbers, as weights have that are offloaded. Call modules instead of using their "
                f"weights, or take copies: {self._name}.weights.of(module)."
            )
        whole, _, name = path.rpartition(".")
        return (
            f"{path} is offloaded, not in memory: {what} with it would give garbage. Call the "
            f"module instead, as in {whole}(x), or take a copy: "
            f"{self._name}.weights.of({whole})[{name!r}]. If it is the model's own forward that "
            f"reads a weight of a module that it does not call, accelerate has to bring it: "
            f"preload_module_classes= of disk_offload, cpu_offload and dispatch_model."
        )

    def _path(self, absent: Tensor) -> str:
        """Which weight it is, or is a view of; "" if that can't be told."""
        base = absent._base  # pyright: ignore[reportPrivateUsage] - the only way to tell
        for path, weight in self._root.named_parameters(self._name):
            if weight is absent or weight is base:
                return path
        return ""


def _tensors(values: Iterable[Any]) -> Iterable[Tensor]:
    """The tensors among arguments, and in lists of them."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from (each for each in value if isinstance(each, Tensor))  # pyright: ignore[reportUnknownVariableType]
