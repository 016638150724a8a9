"""The twin of a model for a planned run: fake tensors, each where the real one lies or will lie."""

from __future__ import annotations

from typing import Any, Final, final

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from tracekit.core.ledger import Ledger
from tracekit.core.supposed import SupposingMode
from tracekit.core.tree import Tree
from tracekit.core.twin import twin
from tracekit.errors import DryRunError
from tracekit.tracing.planned import ByDevice

WEIGHTS: Final = "weights"
OFFLOADED: Final = "offloaded weights"


@final
class Weights:
    """Where the weights of a model lie, in bytes, each storage once; all on `stead`, if given.

    `loaded`: those that are there now; `brought_in`: of offloaded ones, the most that a module
    brings to its device while it runs; `lying`: all of them where they wait.
    """

    def __init__(self, tree: Tree, stead: str | None) -> None:
        self.lying, self.loaded, self.brought_in = ByDevice(), ByDevice(), ByDevice()
        self.waiting = ByDevice()  # offloaded ones, where they lie
        self.largest = 0  # of the module that has most of its own
        self.homes: dict[int, torch.device] = {}  # of offloaded ones, where they are computed with
        self._seen: set[object] = set()
        for module in tree.root.modules():
            self._add_offloaded(module)
            own = sum(weight.nbytes for weight in module.parameters(recurse=False))
            self.largest = max(self.largest, own)
        for tensor in (*tree.root.parameters(), *tree.root.buffers()):
            if id(tensor) not in self.homes:
                self._add(tensor, stead)

    def _add(self, tensor: Tensor, stead: str | None) -> None:
        storage = tensor.untyped_storage()
        key: object = id(tensor) if tensor.is_meta else StorageWeakRef(storage).cdata
        if key in self._seen:
            return
        self._seen.add(key)
        where = stead or ("cpu" if tensor.is_meta else str(tensor.device))
        self.lying[where] += storage.nbytes()
        if not tensor.is_meta and stead is None:
            self.loaded[where] += storage.nbytes()

    def _add_offloaded(self, module: nn.Module) -> None:
        hook = _offloading(module)
        if hook is None:
            return
        home = _device(hook.execution_device)
        brought = 0
        for name, tensor in (*module.named_parameters(recurse=False), *_own_buffers(module)):
            if not tensor.is_meta:
                continue
            self.homes[id(tensor)] = home
            brought += tensor.nbytes
            if id(tensor) not in self._seen:
                self._seen.add(id(tensor))
                where = _lies(hook.weights_map, name)
                self.lying[where] += tensor.nbytes
                self.waiting[where] += tensor.nbytes
                if where != "disk":
                    self.loaded[where] += tensor.nbytes
        device = str(home)
        self.brought_in[device] = max(self.brought_in[device], brought)


def planned_twin(tree: Tree, ledger: Ledger, stead: str | None) -> tuple[Tree, Weights]:
    """A twin of the model of `tree` whose memory is followed, and where the weights lie."""
    weights = Weights(tree, stead)
    mode = SupposingMode(ledger)
    mode.homes.update(weights.homes)

    def exchange(tensor: Tensor) -> Tensor:
        fake = mode.fake_tensor(tensor)
        is_offloaded = id(tensor) in weights.homes
        ledger.see(fake, OFFLOADED if is_offloaded else WEIGHTS)
        return fake

    try:
        found = twin(tree, exchange, lambda _: True, has_weights=False)
    except Exception as error:
        raise DryRunError(
            f"{type(tree.root).__name__} can't be planned, as it can't be copied "
            f"({type(error).__name__}: {error})."
        ) from error
    for own, other in zip(tree.root.modules(), found.root.modules(), strict=True):
        hook = _offloading(own)
        if hook is not None:
            _at(other, hook.execution_device)
    found.mode = mode
    found.overwrites = {
        kind: {slot: dict(habits) for slot, habits in each.items()}
        for kind, each in tree.overwrites.items()
    }
    return found, weights


def _offloading(module: nn.Module) -> Any:
    """accelerate's hook that brings the weights of a module, if it has one."""
    hook: Any = getattr(module, "_hf_hook", None)
    found = [each for each in getattr(hook, "hooks", (hook,)) if getattr(each, "offload", False)]
    return found[0] if found else None


def _at(module: Any, device: Any) -> None:
    for each in getattr(module._hf_hook, "hooks", (module._hf_hook,)):
        each.execution_device = device


def _own_buffers(module: nn.Module) -> list[tuple[str, Tensor]]:
    return list(module.named_buffers(recurse=False))


def _lies(weights_map: Any, name: str) -> str:
    """Where an offloaded weight waits: on the CPU, or on disk."""
    data, full = weights_map, name
    while hasattr(data, "prefix"):  # PrefixedDataset
        full, data = f"{data.prefix}{full}", data.dataset
    in_memory = getattr(data, "state_dict", data)
    try:
        return "cpu" if full in in_memory else "disk"
    except TypeError:
        return "disk"


def _device(given: Any) -> torch.device:
    if given is None:
        return torch.device("cpu")
    return torch.device("cuda", given) if isinstance(given, int) else torch.device(given)
