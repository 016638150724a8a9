"""Fold the gains and biases of norms into the weights that read what they give."""

# A norm gives gain * n + bias, and a reader W @ that + b: so W * gain and b + W @ bias read n. Who
# reads a norm is seen by running the model: whoever is called with the very memory it gave.

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn

from tracekit.architectures import Names
from tracekit.architectures.matrices import is_transposed
from tracekit.architectures.schema import Residual
from tracekit.core.nest import first_input, first_tensor
from tracekit.core.norms import NormKind, known_kind
from tracekit.errors import UnsupportedError

_INTO_LAYER: Final = ("norm1", "cross_norm", "norm2")
# Of experts in one tensor: the weights that read the stream.
_READING: Final = ("gate_up_proj", "gate_proj", "up_proj", "w1", "w3")


class Readers(NamedTuple):
    """A norm in front of a part of a layer, and all that reads what it gives."""

    path: str
    norm: nn.Module
    readers: list[tuple[str, nn.Module]]


def reading_norms(names: Names) -> dict[str, list[str]]:
    """The paths of the norms that the stream is read through; of each, who surely reads it."""
    found: dict[str, list[str]] = {}
    for path, _ in names.stacks["layers"]:
        modules = names.layers[path].modules
        for word in _INTO_LAYER:
            if word in modules:
                found.setdefault(modules[word], [])
        last = modules.get("norm2", modules.get("norm1"))
        if last is not None and "experts" in modules:
            found[last].append(modules["experts"])
    final, unembed = names.module("", "final_norm"), names.module("", "unembed")
    if final is not None:
        found.setdefault(final, []).extend([unembed] if unembed is not None else [])
    return found


def why_not_fold(names: Names, root: nn.Module) -> str | None:
    """Why norms can't be folded here; None if they can."""
    for path, _ in names.stacks["layers"]:
        layer = names.layers.get(path)
        residual = layer.block.residual if layer is not None and layer.block is not None else None
        if residual is None or residual is Residual.OTHER:
            return f"how {path} adds to the residual stream is not known"
        if residual is Residual.POST_NORM:
            return "what its norms give is the residual stream itself, which is read again unnormed"
    for path in reading_norms(names):
        norm = root.get_submodule(path)
        if known_kind(norm) is None and any(True for _ in norm.parameters()):
            return f"{path} ({type(norm).__name__}) is no norm whose gain is known"
    return None


class NoReader(Exception):
    """A norm can't be folded, and no norm has been yet."""


def fold_norms(names: Names, root: nn.Module, run: Callable[[], object]) -> None:
    """Leave every norm that the stream is read through with no gain and no bias.

    NoReader, before anything is changed, if a norm is read by nothing that it could be folded into.
    """
    folds: list[tuple[Readers, NormKind]] = []
    for each in _readers(root, reading_norms(names), run):
        norm = known_kind(each.norm)
        if norm is not None and not any(_weights_of(reader) for _, reader in each.readers):
            raise NoReader(f"nothing that reads {each.path} as it is is a linear map")
        folds += [(each, norm)] if norm is not None else []
    for each, norm in folds:
        _fold(each, norm)


def _readers(
    root: nn.Module, norms: dict[str, list[str]], run: Callable[[], object]
) -> list[Readers]:
    """Of every norm, who was called with what it gave in `run()`, or surely reads it."""
    given: dict[int, nn.Module] = {}  # by the memory of it
    kept: list[Tensor] = []  # so that no memory is used again meanwhile
    found = {
        id(root.get_submodule(path)): Readers(path, root.get_submodule(path), []) for path in norms
    }
    paths = {id(module): path for path, module in root.named_modules()}

    def gave(module: nn.Module, args: Any, output: Any) -> None:
        tensor = first_tensor(output)
        if tensor is not None:
            kept.append(tensor)
            given[_memory(tensor)] = module

    def reads(module: nn.Module, args: Any, kwargs: Any) -> None:
        value = first_input((args, kwargs))
        norm = given.get(_memory(value)) if isinstance(value, Tensor) else None
        if norm is not None:
            _note(found[id(norm)].readers, paths[id(module)], module)

    hooks = [each.norm.register_forward_hook(gave) for each in found.values()]
    for module in root.modules():
        if any(True for _ in module.parameters(recurse=False)):
            hooks.append(module.register_forward_pre_hook(reads, with_kwargs=True))
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    for path, sure in norms.items():
        known = found[id(root.get_submodule(path))].readers
        for reader in [each for each in sure if not known or "experts" in each]:
            for inner, module in _reading(reader, root.get_submodule(reader)):
                _note(known, inner, module)
    return list(found.values())


def _reading(path: str, module: nn.Module) -> list[tuple[str, nn.Module]]:
    """A reader, or in a list of experts (transformers 4) the modules of each that read."""
    if _weights_of(module):
        return [(path, module)]
    inside = module.named_modules(prefix=path)
    return [each for each in inside if each[0].rpartition(".")[2] in _READING]


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _note(readers: list[tuple[str, nn.Module]], path: str, module: nn.Module) -> None:
    if all(module is not known for _, known in readers):
        readers.append((path, module))


class _Given(NamedTuple):
    """What a norm gives its readers: gain * normed + shift."""

    gain: Tensor
    shift: Tensor | None
    is_centred: bool  # what is normed has mean zero

    def folded(self, weight: Tensor, axis: int) -> Tensor:
        """Weights that read what is normed, along an axis; less their mean, if it reads nothing."""
        found = weight.detach().double() * (self.gain if axis == -1 else self.gain[:, None])
        return found - found.mean(axis, keepdim=True) if self.is_centred else found


def _fold(each: Readers, norm: NormKind) -> None:
    bias = getattr(each.norm, "bias", None)
    shift = bias.detach().double() if isinstance(bias, Tensor) and bias.any() else None
    given = _Given(norm.gain(each.norm), shift, norm.centers)
    for path, module in each.readers:
        _into(path, module, given)
    weight: Any = each.norm.weight
    put(each.norm, "weight", torch.full_like(weight, norm.neutral))
    if isinstance(bias, Tensor):
        put(each.norm, "bias", torch.zeros_like(bias))


def _weights_of(module: nn.Module) -> list[str]:
    """The names of the weights of a reader that what it reads is multiplied with."""
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor) and weight.ndim == 2:
        return ["weight"]
    return [name for name in _READING if _is_stack(getattr(module, name, None))]


def _into(path: str, module: nn.Module, given: _Given) -> None:
    """Fold into one reader; into none that has no weights that read, as a container."""
    for name in _weights_of(module):
        weight: Tensor = getattr(module, name)
        if name == "weight":
            _into_matrix(path, module, weight, given)
        elif given.shift is not None:
            raise UnsupportedError(
                f"fold_norms: the norm in front of {path} has a bias, which experts can't take."
            )
        else:
            axis = _reading_axis(weight, given.gain.numel(), module)
            put(module, name, given.folded(weight, axis))


def _into_matrix(path: str, module: nn.Module, weight: Tensor, given: _Given) -> None:
    is_in_first = is_transposed(module)
    matrix, shift = weight.detach().double(), given.shift
    put(module, "weight", given.folded(weight, -2 if is_in_first else -1))
    if shift is not None:
        if "bias" not in module._parameters:  # pyright: ignore[reportPrivateUsage] - None counts
            raise UnsupportedError(
                f"fold_norms: {path} ({type(module).__name__}) takes no bias, and the norm in "
                f"front of it has one."
            )
        add_bias(module, shift @ matrix if is_in_first else matrix @ shift)


def _is_stack(value: object) -> bool:
    return isinstance(value, Tensor) and value.ndim == 3


def _reading_axis(stack: Tensor, width: int, module: nn.Module) -> int:
    """The axis of a stack of matrices that reads the stream."""
    is_last = stack.shape[-1] == width
    if is_last and stack.shape[-2] == width:  # either could be it, but for what the class says
        is_last = not getattr(module, "is_transposed", False)
    return -1 if is_last else -2


# -- parameters ----------------------------------------------------------------------------------


def put(module: nn.Module, name: str, value: Tensor) -> None:
    """Let `module` have a parameter of its own with these numbers, in the dtype of the old one."""
    old: Any = module._parameters[name]  # pyright: ignore[reportPrivateUsage]
    new = value.detach().to(old.device, old.dtype).clone().contiguous()
    setattr(module, name, nn.Parameter(new, old.requires_grad))


def add_bias(module: nn.Module, value: Tensor) -> None:
    """Add to the bias of a linear module, which may have had none."""
    weight: Any = module.weight
    bias = getattr(module, "bias", None)
    total = value if bias is None else bias.detach().double() + value
    new = total.to(weight.device, weight.dtype)
    module.bias = nn.Parameter(new, weight.requires_grad)


def every(paths: Iterable[str | None]) -> list[str]:
    """Those that are there, each once, in order."""
    return list(dict.fromkeys(path for path in paths if path is not None))
