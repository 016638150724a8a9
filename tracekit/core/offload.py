"""Weights that accelerate keeps elsewhere: where they are, and copies of them without a forward."""

# accelerate (1.1 to 1.15) puts a forward around a module's own, and a hook into `_hf_hook`. A hook
# that offloads brings the weights in front of each call, and puts meta tensors in their place
# behind it. They are read here from where it takes them, so the module stays as it is: while it
# runs, it may be the one that has its weights in memory.

from __future__ import annotations

from collections.abc import Iterator
from functools import partial, update_wrapper
from types import MethodType
from typing import Any, Final, TypeVar

import torch
from torch import Tensor, nn

from tracekit.core.nest import tensors

M = TypeVar("M", bound=nn.Module)

_AROUND: Final = ("forward", "_old_forward", "_hf_hook")
_HELD: Final = ("_parameters", "_buffers")


def is_offloaded(module: nn.Module) -> bool:
    """Whether accelerate brings its weights when it is called."""
    return any(getattr(hook, "offload", False) for hook in _hooks(module))


def execution_device(module: nn.Module) -> torch.device | None:
    """Where accelerate has it computed; None if accelerate has no say in it."""
    for hook in _hooks(module):
        device = getattr(hook, "execution_device", None)
        if device is not None:
            return torch.device(device)
    return None


def device_of(module: nn.Module) -> torch.device | None:
    """Where `module` computes: of a module with parts, where the first of its weights is used.

    None if it has no weights, or if they are on meta and nothing brings them.
    """
    found = execution_device(module)
    if found is not None:
        return found
    for part in module.modules():
        for weight in _own(part).values():
            return weight.device if not weight.is_meta else execution_device(part)
    return None


def devices_of(module: nn.Module) -> set[torch.device]:
    """All the devices that `module` computes on."""
    found = {execution_device(part) for part in module.modules() if "_hf_hook" in vars(part)}
    found |= {weight.device for weight in module.parameters() if not weight.is_meta}
    return {device for device in found if device is not None}


def places_of(module: nn.Module) -> dict[int, torch.device]:
    """Where accelerate uses the weights on meta, by their identity."""
    found: dict[int, torch.device] = {}
    for part in module.modules():
        device = execution_device(part)
        if device is not None and is_offloaded(part):
            own = tensors([part._parameters, part._buffers])  # pyright: ignore[reportPrivateUsage]
            found.update((id(weight), device) for weight in own if weight.is_meta)
    return found


def at_hand(module: M) -> M:
    """The module, its own weights in memory: itself, or a copy that shares all else with it.

    What nothing brings stays on meta. Write to nothing in it.
    """
    if not any(weight.is_meta for weight in _own(module).values()) or not is_offloaded(module):
        return module
    found = object.__new__(type(module))
    state = vars(found)
    state.update((name, value) for name, value in vars(module).items() if name not in _AROUND)
    for kind in _HELD:
        state[kind] = {name: _brought(module, name, each) for name, each in state[kind].items()}
    return found


def brought(root: nn.Module, path: str) -> Tensor | None:
    """A copy of the weight at a path below `root`, where it is used; None if nothing brings it."""
    *above, name = path.split(".")
    for depth in range(len(above), -1, -1):  # a hook may bring the weights of the modules in it
        holder = root.get_submodule(".".join(above[:depth]))
        value = _stored(holder, ".".join((*above[depth:], name)))
        if value is not None:
            return _copied(holder, value)
    return None


def is_accelerates(module: nn.Module) -> bool:
    """Whether what is put around its forward is accelerate's, and nothing else."""
    around = _around(module)
    is_on = "_hf_hook" in vars(module) and "_old_forward" in vars(module)
    return is_on and isinstance(around, partial) and around.args == (module,)


def go_through_accelerate(copied: nn.Module, module: nn.Module) -> None:
    """Let `copied`, which has the hook of `module`, go through it as `module` does."""
    own = MethodType(type(copied).forward, copied)
    around = partial(_around(module).func, copied)
    vars(copied).update(_old_forward=own, forward=update_wrapper(around, own))


def _around(module: nn.Module) -> Any:
    """The forward on the instance; while a run has a say in it, the one that this stands for."""
    around = vars(module).get("forward")
    return getattr(around, "forward", around)


def identity_of(module: nn.Module) -> tuple[object, ...]:
    """What changes when a weight of `module` is exchanged, moved, cast, or changed in place.

    Of an offloaded weight, which is another object after each call: what brings it.
    """
    return tuple(_identity(part, name) for part in module.modules() for name in _own(part))


def _identity(module: nn.Module, name: str) -> tuple[object, ...]:
    weight = _own(module)[name]
    if weight.is_meta and is_offloaded(module):
        held = _held_in_memory(module, name)
        brings = tuple(id(getattr(hook, "weights_map", None)) for hook in _hooks(module))
        return (brings, name, None if held is None else version_of(held), weight.dtype)
    return (id(weight), version_of(weight), weight.dtype, weight.device)


def version_of(tensor: Tensor) -> int:
    """How often it was written to in place."""
    if tensor.is_inference():
        return 0  # it has none
    return tensor._version  # pyright: ignore[reportPrivateUsage] - the only way to tell


def _hooks(module: nn.Module) -> Iterator[Any]:
    hook = vars(module).get("_hf_hook")
    if hook is not None:
        yield from getattr(hook, "hooks", (hook,))  # a SequentialHook has several


def _own(module: nn.Module) -> dict[str, Tensor]:
    """Its own parameters, which are there."""
    held = module._parameters.items()  # pyright: ignore[reportPrivateUsage] - named_parameters drops tied ones
    return {name: weight for name, weight in held if weight is not None}


def _stored(module: nn.Module, name: str) -> Tensor | None:
    """The weight as accelerate keeps it: a tensor of its own, or one just read from a file."""
    for hook in _hooks(module):
        known = getattr(hook, "weights_map", None)
        if getattr(hook, "offload", False) and known is not None:
            try:
                value = known[name]
            except KeyError:
                continue
            if isinstance(value, Tensor) and not value.is_meta:
                return value
    return None


def _held_in_memory(module: nn.Module, name: str) -> Tensor | None:
    """The weight as accelerate keeps it, if that is in memory: no file is read."""
    for hook in _hooks(module):
        known = getattr(hook, "weights_map", None)
        key = f"{getattr(known, 'prefix', '')}{name}"
        known = getattr(known, "dataset", known)  # a PrefixedDataset
        known = getattr(known, "state_dict", known)  # an OffloadedWeightsLoader
        value = known.get(key) if isinstance(known, dict) else None  # pyright: ignore[reportUnknownVariableType, reportUnknownMemberType]
        if isinstance(value, Tensor):
            return value
    return None


def _brought(module: nn.Module, name: str, weight: Any) -> Any:
    if weight is None or not weight.is_meta:
        return weight
    value = _stored(module, name)
    if value is None:
        return weight
    found = _copied(module, value, weight.dtype)
    is_parameter = isinstance(weight, nn.Parameter) and found.is_floating_point()
    return nn.Parameter(found, weight.requires_grad) if is_parameter else found


def _copied(module: nn.Module, value: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """In memory of its own, on the device where it is used: a file may be mapped for reading."""
    device = execution_device(module) or value.device
    if dtype is None or not value.is_floating_point():
        dtype = value.dtype
    return value.detach().to(device, dtype, copy=True)
