"""What hooks see of a planned run: where each forward begins, and the keys and values behind it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final, cast, final

from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from tracekit.core.ledger import Ledger
from tracekit.core.tree import Tree
from tracekit.models.signatures import is_transformers

KV_CACHE: Final = "kv_cache"
LOGITS: Final = "logits"
_NAMES: Final = ("past_key_values", "cache_params", "state", "past_buckets_states")


@final
class Forwards:
    """Notes each forward of a twin in a ledger."""

    def __init__(self, tree: Tree, ledger: Ledger) -> None:
        self._ledger = ledger
        self._depth = 0
        self._begun: list[tuple[nn.Module, int]] = []  # how many events there were before
        self._kept: list[tuple[nn.Module, int]] = []  # bytes of keys and values behind each
        modules = [each for each in tree.modules.values() if is_transformers(each)]
        for module in {id(each): each for each in (*modules, tree.root)}.values():
            module.register_forward_pre_hook(self._begin)
            module.register_forward_hook(self._end, with_kwargs=True)

    @property
    def starts(self) -> list[int]:
        """How many events there were before each forward of the model that generates."""
        return [count for module, count in self._begun if module is self._main]

    @property
    def kv_cache(self) -> tuple[int, ...]:
        """Bytes of keys, values and states behind each of these forwards."""
        return tuple(size for module, size in self._kept if module is self._main)

    @property
    def _main(self) -> nn.Module | None:
        return self._begun[-1][0] if self._begun else None

    def _begin(self, module: nn.Module, _: Any) -> None:
        if not self._depth:
            self._begun.append((module, len(self._ledger.events)))
        self._depth += 1

    def _end(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self._depth -= 1
        if self._depth:
            return
        found = list(_kept_in(kwargs, output))
        for tensor in found:
            self._ledger.see(tensor, KV_CACHE)
        storages = {StorageWeakRef(each.untyped_storage()).cdata: each for each in found}
        size = sum(each.untyped_storage().nbytes() for each in storages.values())
        self._kept.append((module, size))
        logits = getattr(output, "logits", None)
        if isinstance(logits, Tensor):
            self._ledger.see(logits, LOGITS)


def _kept_in(kwargs: Mapping[str, Any], output: Any) -> Iterator[Tensor]:
    seen: set[int] = set()
    for name in _NAMES:
        for owner in (kwargs.get(name), getattr(output, name, None)):
            yield from _tensors_in(owner, seen)


def _tensors_in(value: Any, seen: set[int]) -> Iterator[Tensor]:
    """All tensors in a kv_cache, however its class lays them out."""
    if value is None or id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for each in cast("Mapping[Any, Any]", value).values():
            yield from _tensors_in(each, seen)
    elif isinstance(value, (list, tuple)):
        for each in cast("list[Any]", value):
            yield from _tensors_in(each, seen)
    elif _is_a_kv_cache(value):
        for each in vars(value).values():
            yield from _tensors_in(each, seen)


def _is_a_kv_cache(value: Any) -> bool:
    kind = type(value)
    is_theirs = kind.__module__.partition(".")[0] in {"transformers", "tracekit"}
    return is_theirs and hasattr(value, "__dict__") and not isinstance(value, nn.Module)
