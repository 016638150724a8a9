"""See and change what happens inside any PyTorch model, in plain Python, and trust the numbers."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from tracekit import errors

if TYPE_CHECKING:
    from tracekit.core.factored import FactoredMatrix
    from tracekit.core.keep import Note
    from tracekit.core.settings import settings
    from tracekit.distributed.harvests import harvest
    from tracekit.errors import TracekitError, TracekitWarning
    from tracekit.harvesting.harvest import Harvest
    from tracekit.models.kv_cache import KeyValueCache, KeyValueEntry
    from tracekit.models.language import LanguageModel
    from tracekit.models.model import Model
    from tracekit.models.prefix import Prefix
    from tracekit.models.streaming import Stream
    from tracekit.storage.activations import Activations, load_activations
    from tracekit.tracing.cache import Cache
    from tracekit.tracing.declared import Outcome
    from tracekit.tracing.entries import Entries, Entry
    from tracekit.tracing.envoy import Envoy
    from tracekit.tracing.gradients import backward
    from tracekit.tracing.graph import Graph
    from tracekit.tracing.planned import Plan, PlannedSite
    from tracekit.tracing.save import save
    from tracekit.tracing.sequence import TokenSequence
    from tracekit.tracing.source import Operation, Source
    from tracekit.tracing.tracer import Tracer
    from tracekit.tracing.verified.report import EditReport
    from tracekit.tracing.verify import Verification
    from tracekit.viz.picture import Picture
    from tracekit.viz.show import show

__version__ = "0.1.0"

# Imported when first asked for, so that `import tracekit` is cheap and `tracekit.capture` needs
# no torch.
_HOMES = {
    "Activations": "tracekit.storage.activations",
    "Cache": "tracekit.tracing.cache",
    "EditReport": "tracekit.tracing.verified.report",
    "Entries": "tracekit.tracing.entries",
    "Entry": "tracekit.tracing.entries",
    "Envoy": "tracekit.tracing.envoy",
    "FactoredMatrix": "tracekit.core.factored",
    "Graph": "tracekit.tracing.graph",
    "Harvest": "tracekit.harvesting.harvest",
    "KeyValueCache": "tracekit.models.kv_cache",
    "KeyValueEntry": "tracekit.models.kv_cache",
    "LanguageModel": "tracekit.models.language",
    "Model": "tracekit.models.model",
    "Note": "tracekit.core.keep",
    "Operation": "tracekit.tracing.source",
    "Outcome": "tracekit.tracing.declared",
    "Picture": "tracekit.viz.picture",
    "Plan": "tracekit.tracing.planned",
    "PlannedSite": "tracekit.tracing.planned",
    "Prefix": "tracekit.models.prefix",
    "Source": "tracekit.tracing.source",
    "Stream": "tracekit.models.streaming",
    "TokenSequence": "tracekit.tracing.sequence",
    "Tracer": "tracekit.tracing.tracer",
    "TracekitError": "tracekit.errors",
    "TracekitWarning": "tracekit.errors",
    "Verification": "tracekit.tracing.verify",
    "backward": "tracekit.tracing.gradients",
    "harvest": "tracekit.distributed.harvests",
    "load_activations": "tracekit.storage.activations",
    "save": "tracekit.tracing.save",
    "settings": "tracekit.core.settings",
    "show": "tracekit.viz.show",
}

__all__ = [
    "Activations",
    "Cache",
    "EditReport",
    "Entries",
    "Entry",
    "Envoy",
    "FactoredMatrix",
    "Graph",
    "Harvest",
    "KeyValueCache",
    "KeyValueEntry",
    "LanguageModel",
    "Model",
    "Note",
    "Operation",
    "Outcome",
    "Picture",
    "Plan",
    "PlannedSite",
    "Prefix",
    "Source",
    "Stream",
    "TokenSequence",
    "TracekitError",
    "TracekitWarning",
    "Tracer",
    "Verification",
    "backward",
    "errors",
    "harvest",
    "load_activations",
    "save",
    "settings",
    "show",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        cure = errors.did_you_mean(name, __all__)
        raise AttributeError(f"module 'tracekit' has no attribute {name!r}{cure}")
    return getattr(importlib.import_module(home), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
