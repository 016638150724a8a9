"""A prefix as a file of safetensors: its tensors, and in the metadata what they are of."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any, Final, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from tracekit.core.fingerprint import fingerprint
from tracekit.core.offload import devices_of
from tracekit.errors import LoadingError, UnsupportedError
from tracekit.models.inputs import device_of
from tracekit.models.kv_layers import FIXED, SHAREABLE, KvLayer, kind_of
from tracekit.models.prefix import Prefix, Source

FORMAT: Final = "tracekit prefix 1"
_FOLLOW: Final = frozenset({"dtype", "device"})  # from the tensors that are loaded


def save_prefix(prefix: Prefix, path: str | Path) -> None:
    """Write `prefix` to `path`. UnsupportedError for what a file can't hold."""
    if prefix.has_edits:
        raise UnsupportedError(
            "this prefix was made under lasting edits, which its file would not hold. Save it "
            "without them, or prefill where it is needed."
        )
    if not FIXED.isdisjoint(prefix.kinds):
        raise UnsupportedError(
            "a prefix in a static cache can't be saved. Prefill with the default cache."
        )
    layers = {name: [_described(each) for each in part] for name, part in prefix.layers.items()}
    described = {
        "format": FORMAT,
        "model": type(prefix.model.module).__name__,
        "weights": fingerprint(prefix.model.module),
        "has_media": prefix.has_media,
        "layers": layers,
    }
    save_file(_tensors(prefix), path, {"tracekit": json.dumps(described)})


def load_prefix(model: Any, path: str | Path) -> Prefix:
    """The prefix of `model` that was written to `path`."""
    described, tensors = _read(path)
    _check_belongs(model.module, described, path)
    device = device_of(model.module)
    places = _places(model)
    tensors = {name: each.to(places.get(_layer_of(name), device)) for name, each in tensors.items()}
    layers = {
        part: [_layer(saved, f"{part}.{index}", tensors) for index, saved in enumerate(every)]
        for part, every in described["layers"].items()
    }
    source = None
    if "source" in tensors:
        source = Source(tensors["source"], tensors.get("source_mask"))
    return Prefix(
        model,
        _kv_cache(layers),
        tensors["tokens"],
        tensors["attention_mask"],
        positions=tensors.get("positions"),
        source=source,
        has_media=described["has_media"],
    )


def _places(model: Any) -> dict[str, torch.device]:
    """By part and number, where the layers of a model over several devices want what they keep."""
    if len(devices_of(model.module)) < 2:
        return {}
    names, found = model._tree.names, dict[str, torch.device | None]()
    stacks: dict[str, Any] = {} if names is None else names.stacks
    for number, (path, *_) in enumerate(stacks.get("layers", ())):
        device = device_of(model.module.get_submodule(path))
        for part in ("self", "cross"):
            found[f"{part}.{number}"] = device
    return {name: device for name, device in found.items() if device is not None}


def _layer_of(name: str) -> str:
    return ".".join(name.split(".")[:2])


# -- write ----------------------------------------------------------------------------------------


def _tensors(prefix: Prefix) -> dict[str, Tensor]:
    found = {"tokens": prefix.tokens, "attention_mask": prefix.attention_mask}
    if prefix.positions is not None:
        found["positions"] = prefix.positions
    if prefix.source is not None:
        found["source"] = prefix.source.hidden
        if prefix.source.attention_mask is not None:
            found["source_mask"] = prefix.source.attention_mask
    for part, layers in prefix.layers.items():
        for index, layer in enumerate(layers):
            for name, tensor in _named_tensors(layer).items():
                found[f"{part}.{index}.{name}"] = tensor
    return {name: tensor.detach().clone().contiguous() for name, tensor in found.items()}


def _named_tensors(layer: KvLayer) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, value in vars(layer).items():
        if isinstance(value, Tensor):
            found[name] = value
        elif isinstance(value, dict):
            states = cast("dict[int, Any]", value)
            found |= {f"{name}.{k}": v for k, v in states.items() if isinstance(v, Tensor)}
    return found


def _described(layer: KvLayer) -> dict[str, Any]:
    """What a layer is besides its tensors: numbers, and dictionaries of numbers by index."""
    values: dict[str, Any] = {}
    for name, value in vars(layer).items():
        if isinstance(value, dict):
            states = cast("dict[int, Any]", value)
            values[name] = {k: None if isinstance(v, Tensor) else v for k, v in states.items()}
        elif name not in _FOLLOW and not isinstance(value, Tensor):
            values[name] = value
    return {"kind": kind_of(layer), "values": values}


# -- read -----------------------------------------------------------------------------------------


def _read(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            described = json.loads((file.metadata() or {}).get("tracekit", "{}"))
            if described.get("format") != FORMAT:
                raise LoadingError(
                    f"{str(path)!r} is no prefix that this tracekit wrote (format "
                    f"{described.get('format')!r}, not {FORMAT!r})."
                )
            return described, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise LoadingError(
            f"{str(path)!r} can't be read as a prefix: {error}. Give a file that "
            f"prefix.save(path) wrote."
        ) from error


def _check_belongs(module: nn.Module, described: dict[str, Any], path: str | Path) -> None:
    kind = type(module).__name__
    if described["model"] != kind:
        raise LoadingError(
            f"{str(path)!r} is a prefix of a {described['model']}, and this model is a {kind}."
        )
    if described["weights"] != fingerprint(module):
        raise LoadingError(
            f"{str(path)!r} is a prefix of a {kind} with other weights, or in another dtype: keys "
            f"and values are of the weights that made them. Prefill with this model."
        )


def _layer(saved: dict[str, Any], path: str, tensors: dict[str, Tensor]) -> KvLayer:
    from transformers import cache_utils

    if saved["kind"] not in SHAREABLE or not hasattr(cache_utils, saved["kind"]):
        raise LoadingError(
            f"this version of transformers has no {saved['kind']}, of which the prefix consists."
        )
    kind: Any = getattr(cache_utils, saved["kind"])
    values = saved["values"]
    taken = inspect.signature(kind).parameters
    layer: Any = kind(**{name: value for name, value in values.items() if name in taken})
    for name, value in values.items():
        is_states = isinstance(value, dict)
        own = cast("dict[str, Any]", value) if is_states else {}
        vars(layer)[name] = {int(k): v for k, v in own.items()} if is_states else value
    for name, tensor in tensors.items():
        if name.startswith(f"{path}."):
            _put(layer, name.removeprefix(f"{path}."), tensor)
    return layer


def _put(layer: KvLayer, name: str, tensor: Tensor) -> None:
    name, _, index = name.partition(".")
    if index:
        vars(layer)[name][int(index)] = tensor
    else:
        vars(layer)[name] = tensor
    if tensor.is_floating_point():
        layer.dtype, layer.device = tensor.dtype, tensor.device


def _kv_cache(layers: dict[str, list[KvLayer]]) -> Any:
    from transformers import DynamicCache, EncoderDecoderCache

    parts: list[Any] = []
    for every in layers.values():
        part: Any = DynamicCache()
        part.layers = every
        parts.append(part)
    return parts[0] if len(parts) == 1 else EncoderDecoderCache(*parts)
