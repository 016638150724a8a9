"""Write lasting edits to a safetensors file, and read them back: source, values, and tensors."""

# The file: the tensors that the blocks use, and in its metadata, under "tracekit.edits", JSON:
#   {"version": 1, "edits": [{"source", "file", "line", "goes_through_steps", "names": {name: v}}]}
# where v is null, a boolean, a number or text as it is, and anything else an object of one key, its
# kind: {"tensor": …}, {"list": […]}, {"dict": [[k, v], …]}, {"module": "transformer.h.0"}, …

from __future__ import annotations

import importlib
import itertools
import json
import linecache
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import EllipsisType, ModuleType
from typing import Any, final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from tracekit.capture import from_text
from tracekit.core.offload import device_of
from tracekit.errors import LoadingError, UnknownModuleError, UnknownPathError, UnsupportedError
from tracekit.tracing.edit import Edit, EditTracer
from tracekit.tracing.envoy import Envoy
from tracekit.tracing.ways import HELPERS

VERSION = 1
_KEY = "tracekit.edits"
_PLAIN = (type(None), bool, int, float, str)
_SEQUENCES: dict[str, type[Any]] = {
    "list": list,
    "tuple": tuple,
    "set": set,
    "frozenset": frozenset,
}
_TRUSTED = frozenset({"torch", *sys.stdlib_module_names}) - {"__main__"}


def save(path: str | Path, edits: Iterable[Edit], model: Envoy) -> None:
    """Write `edits` of `model` to one file; UnsupportedError for what can't be written."""
    packer = _Packer(model)
    packed = [packer.edit(edit) for edit in edits]
    if not packed:
        raise UnsupportedError("there are no edits to save; make one with model.edit() first.")
    content = json.dumps({"version": VERSION, "edits": packed})
    save_file(packer.tensors, str(path), metadata={_KEY: content})


def load(path: str | Path, model: Envoy) -> list[Edit]:
    """The edits of a file, for `model`; LoadingError if it is not such a file."""
    try:
        with safe_open(str(path), framework="pt") as file:
            content = (file.metadata() or {}).get(_KEY)
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no dict
    except (OSError, SafetensorError) as error:
        raise LoadingError(f"{str(path)!r} can't be read as a safetensors file: {error}") from error
    if content is None:
        raise LoadingError(f"{str(path)!r} holds no edits; model.edits.save(path) writes them.")
    found = json.loads(content)
    if found["version"] != VERSION:
        raise LoadingError(
            f"{str(path)!r} was written in version {found['version']} of the format, and this "
            f"tracekit reads version {VERSION}: install the tracekit that wrote it, or save again."
        )
    unpacker = _Unpacker(model, tensors)
    return [_loaded(packed, unpacker, Path(path).name) for packed in found["edits"]]


def _loaded(packed: Any, unpacker: _Unpacker, place: str) -> Edit:
    origin = f"{Path(packed['file']).name}:{packed['line']}"
    filename = _free_filename(f"<edit of {place}, from {origin}>", packed["source"])
    names = {name: unpacker.value(value) for name, value in packed["names"].items()}
    body = from_text(packed["source"], filename, names, HELPERS)
    return Edit(body, packed["source"], filename, 1, packed["goes_through_steps"])


def _free_filename(name: str, text: str) -> str:
    """`name`, or one like it, that no other text has: tracebacks find their lines by it."""
    for number in itertools.count(2):
        known = linecache.cache.get(name)
        if known is None or "".join(linecache.getlines(name)) == text:
            return name
        name = f"{name.removesuffix('>').partition(' (')[0]} ({number})>"
    raise AssertionError


def _weights_of(root: nn.Module) -> dict[int, str]:
    named = itertools.chain(
        root.named_parameters(remove_duplicate=False), root.named_buffers(remove_duplicate=False)
    )
    return {id(tensor): name for name, tensor in named}


def _device_of(root: nn.Module) -> torch.device:
    buffers = (buffer.device for buffer in root.buffers() if not buffer.is_meta)
    return device_of(root) or next(buffers, torch.device("cpu"))


@final
class _Packer:
    """Turns the values of blocks into JSON, and collects their tensors."""

    def __init__(self, model: Envoy) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._root: nn.Module = model.module
        self._weights = _weights_of(self._root)
        self._modules = {module: path for path, module in self._root.named_modules()}
        self._device = _device_of(self._root)
        self._where = ""  # whose value it is, for errors

    def edit(self, edit: Edit) -> dict[str, Any]:
        if edit.names is None:
            raise UnsupportedError(
                f"{edit!r} is a function, which can't be saved to a file; write it as the block of "
                f"`with model.edit() as edited:`."
            )
        try:
            compile(edit.source, edit.filename, "exec")
        except SyntaxError as error:
            raise UnsupportedError(
                f"{edit!r} can't be saved to a file, as it means something only where it stands: "
                f"{error.msg}; write it without that."
            ) from None
        names: dict[str, Any] = {}
        for name, value in edit.names.items():
            self._where = f"{edit!r} uses {name!r}"
            names[name] = self._value(value)
        return {
            "source": edit.source,
            "file": edit.filename,
            "line": edit.line,
            "goes_through_steps": edit.goes_through_steps,
            "names": names,
        }

    def _value(self, value: Any) -> Any:
        if type(value) in _PLAIN:
            return value
        for kind, sequence in _SEQUENCES.items():
            if type(value) is sequence:
                return {kind: [self._value(item) for item in value]}
        if type(value) is dict:
            return {"dict": [[self._value(key), self._value(item)] for key, item in value.items()]}
        if isinstance(value, (Tensor, nn.Module, Envoy)):
            return self._of_torch(value)
        if isinstance(value, slice):
            return {"slice": [self._value(part) for part in (value.start, value.stop, value.step)]}
        if isinstance(value, range):
            return {"range": [value.start, value.stop, value.step]}
        if isinstance(value, (torch.dtype, torch.device)):
            return {type(value).__name__: str(value).removeprefix("torch.")}
        if isinstance(value, (EditTracer, EllipsisType)):
            return {"tracer" if isinstance(value, EditTracer) else "ellipsis": None}
        return self._by_name(value)

    def _of_torch(self, value: Tensor | nn.Module | Envoy) -> dict[str, Any]:
        if isinstance(value, Tensor):
            name = self._weights.get(id(value))
            return {"weight": name} if name is not None else self._tensor(value)
        module = value.module if isinstance(value, Envoy) else value
        path = self._modules.get(module)
        if path is None:
            raise self._refused(
                value,
                "make it a part of the model, as in `model.sae = sae`, so that its weights are "
                "saved with the model's, or use its weights as tensors in the block",
            )
        if not isinstance(value, Envoy):
            return {"torch_module": path}
        return {"module": [path, value._call]}  # pyright: ignore[reportPrivateUsage] - tracing's own

    def _tensor(self, tensor: Tensor) -> dict[str, Any]:
        if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout is not torch.strided:
            raise self._refused(tensor, "make a plain tensor of it before the block")
        if tensor.is_meta:
            raise self._refused(tensor, "take a copy of the weight, by model.weights.of(module)")
        key = str(len(self.tensors))
        order = sorted(range(tensor.dim()), key=lambda axis: -tensor.stride(axis))
        # As it lies in memory, where nothing is left out: a product may round otherwise else.
        dense = tensor.detach().permute(order)
        is_dense = dense.is_contiguous()
        self.tensors[key] = (
            (dense if is_dense else tensor.detach())
            .to("cpu")
            .clone(memory_format=torch.contiguous_format)
        )
        return {
            "tensor": key,
            "order": order if is_dense else None,
            "is_with_the_model": tensor.device == self._device,
            "requires_grad": tensor.requires_grad and tensor.is_leaf,
            "is_parameter": isinstance(tensor, nn.Parameter),
        }

    def _by_name(self, value: Any) -> dict[str, Any]:
        if isinstance(value, ModuleType):
            if sys.modules.get(value.__name__) is value and value.__name__ != "__main__":
                return {"import": [value.__name__, ""]}
            raise self._refused(value, "import it under its own name")
        own = (getattr(value, "__module__", None) or "", getattr(value, "__qualname__", ""))
        for home, name in (own, ("torch", getattr(value, "__name__", ""))):  # torch.relu is so
            if home.partition(".")[0] in _TRUSTED and _found(home, name) is value:
                return {"import": [home, name]}
        if callable(value):
            cure = "write its lines into the block, or define it there"
        else:
            cure = "take tensors, numbers or text from it before the block"
        raise self._refused(value, cure)

    def _refused(self, value: object, cure: str) -> UnsupportedError:
        kind = type(value).__name__
        return UnsupportedError(f"{self._where}, a {kind}, which can't be saved to a file; {cure}.")


def _found(home: str, name: str) -> object:
    value: Any = sys.modules.get(home)
    for part in name.split("."):
        value = getattr(value, part, None)
    return value


@final
class _Unpacker:
    """Turns JSON back into values, for one model."""

    def __init__(self, model: Envoy, tensors: dict[str, Tensor]) -> None:
        self._model = model
        self._tensors = tensors
        self._device = _device_of(model.module)
        self._kinds: dict[str, Callable[[Any], Any]] = {
            "dict": lambda pairs: {self.value(key): self.value(item) for key, item in pairs},
            "slice": lambda parts: slice(*map(self.value, parts)),
            "range": lambda parts: range(*parts),
            "dtype": lambda name: getattr(torch, name),
            "device": torch.device,
            "ellipsis": lambda _: ...,
            "tracer": lambda _: EditTracer(),
            "module": self._envoy,
            "torch_module": lambda path: self._envoy((path, 0)).module,
            "weight": self._weight,
            "import": self._imported,
        }

    def value(self, packed: Any) -> Any:
        if type(packed) in _PLAIN:
            return packed
        if "tensor" in packed:
            return self._tensor(packed)
        ((kind, content),) = packed.items()
        if kind in _SEQUENCES:
            return _SEQUENCES[kind](map(self.value, content))
        return self._kinds[kind](content)

    def _tensor(self, packed: Any) -> Tensor:
        tensor = self._tensors[packed["tensor"]]
        if packed["order"] is not None:
            order: Sequence[int] = packed["order"]
            tensor = tensor.permute([order.index(axis) for axis in range(len(order))])
        if packed["is_with_the_model"]:
            tensor = tensor.to(self._device)
        if packed["is_parameter"]:
            return nn.Parameter(tensor, packed["requires_grad"])
        return tensor.requires_grad_(packed["requires_grad"])

    def _envoy(self, where: tuple[str, int]) -> Any:
        path, call = where
        found: Any = self._model
        try:
            for name in path.split(".") if path else ():
                found = found[name]
        except UnknownModuleError as error:
            raise UnknownPathError(
                f"the edit is of {path!r}, which this model does not have: {error.args[0]}"
            ) from None
        return found.calls[call] if call else found

    def _weight(self, name: str) -> Tensor:
        path, _, last = name.rpartition(".")
        return getattr(self._envoy((path, 0)), last)

    def _imported(self, where: tuple[str, str]) -> Any:
        home, name = where
        try:
            module = importlib.import_module(home)
        except ImportError as error:
            raise LoadingError(f"the edit uses the module {home!r}: {error}.") from error
        return _found(home, name) if name else module
