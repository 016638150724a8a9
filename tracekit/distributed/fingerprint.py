"""Whether two models are the same one: their classes, configuration, modules and shapes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, Final

from torch import nn

from tracekit.errors import OtherModelError
from tracekit.models.model import Model

# Of a configuration, what may differ where the model is the same: where it came from, who wrote it,
# in which precision it was loaded, and which attention was chosen.
_LOOSE: Final = frozenset(
    {
        "_name_or_path",
        "_attn_implementation",
        "_attn_implementation_autoset",
        "_experts_implementation",
        "attn_implementation",
        "dtype",
        "name_or_path",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)


def fingerprint_of(model: Model) -> dict[str, Any]:
    """What tells one model from another, as plain data: a few hundred bytes."""
    root: nn.Module = model._tree.root  # pyright: ignore[reportPrivateUsage] - the module itself
    modules = {path: type(module).__name__ for path, module in root.named_modules()}
    shapes = {name: list(weight.shape) for name, weight in root.named_parameters()}
    return {
        "class": type(root).__name__,
        "config": _hash(_config_of(root)),
        "modules": _hash(modules),
        "shapes": _hash(shapes),
        "told": {"modules": len(modules), "weights": sum(w.numel() for w in root.parameters())},
    }


def _config_of(root: Any) -> Any:
    config: Any = getattr(root, "config", None)
    told: Any = config.to_dict() if hasattr(config, "to_dict") else {}
    return _tight(told)


def _tight(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _tight(value[key]) for key in value if key not in _LOOSE}
    if isinstance(value, (list, tuple)):
        return [_tight(each) for each in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def check_same(here: Mapping[str, Any], there: Mapping[str, Any], host: object) -> None:
    """OtherModelError, with what differs, unless both are of one model."""
    differ = [part for part in _WORDS if here[part] != there[part]]
    if not differ:
        return
    raise OtherModelError(
        f"the model here is a {_told(here)}, and that of {host} is a {_told(there)}: they differ "
        f"in {', '.join(_WORDS[part] for part in differ)}. Trace the model that is served "
        f"(`host.model` is one without weights), or serve this one."
    )


_WORDS: Final = {
    "class": "their class",
    "modules": "their modules",
    "shapes": "the shapes of weights",
    "config": "values of the configuration",
}


def _told(fingerprint: Mapping[str, Any]) -> str:
    told = fingerprint["told"]
    return f"{fingerprint['class']} ({told['modules']} modules, {told['weights']:,} weights)"
