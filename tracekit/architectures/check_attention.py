"""Are q, k and v what attention is given as queries, keys and values, head for head?"""

# Between a projection and the attention function there may be norms, rotary embeddings, scales. So
# no numbers are compared: one head is changed, and what moves in the function's inputs is told.

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, final

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tracekit.architectures.binding import Names
from tracekit.architectures.check_writes import delta_for
from tracekit.architectures.findings import Claim
from tracekit.architectures.witness import Run, Testimony, Where, Write, layers_of, observe

_PRODUCTS: Final = {"matmul": 0, "__matmul__": 0, "bmm": 0, "baddbmm": 1}
_CORES: Final = {"attn_core": ("q", "k", "v"), "cross_core": ("cross_q",)}
_ROLES: Final = {"q": "query", "cross_q": "query", "k": "key", "v": "value"}


@dataclass(frozen=True)
class Attended:
    """What an attention function was given, and the number of its heads where that is told."""

    query: Tensor
    key: Tensor
    value: Tensor
    result: Tensor


def attention(names: Names, run: Run, seen: Testimony) -> Iterator[Claim]:
    """The claims about queries, keys and values."""
    usual = _attended(names, run, None)
    for where in layers_of(names):
        layer = names.layers.get(where.path)
        for core, parts in _CORES.items() if layer is not None else ():
            path = layer.modules.get(core, "") if layer is not None else ""
            if not any((where, name) in seen.named for name in parts):
                continue
            before = usual.get((path, where.call))
            if before is None:
                why = "no attention function was seen"
                yield Claim(str(where), parts[0], "it is the query", None, why=why)
                continue
            if core == "attn_core":
                yield from _result(where, seen, before)
            for name in parts:
                if (where, name) in seen.named:
                    yield from _moved(names, run, seen, where, name, path, before)


def _result(where: Where, seen: Testimony, found: Attended) -> Iterator[Claim]:
    z, claim = seen.value(where, "z"), "it is what the attention function gives"
    if z is None:
        return
    result = found.result.transpose(1, 2) if found.result.ndim == 4 else found.result
    if result.numel() == z.numel() and torch.equal(result.reshape(z.shape), z):
        yield Claim(str(where), "z", claim, True, 0.0)
    else:
        why = "something comes between it and o, or it is laid out in another way"
        yield Claim(str(where), "z", claim, None, why=why)


def _moved(
    names: Names, run: Run, seen: Testimony, where: Where, name: str, path: str, before: Attended
) -> Iterator[Claim]:
    value = seen.named[where, name].value
    head = value.shape[-2] - 1
    delta = torch.zeros_like(value)
    delta[..., head, :] = delta_for(value)[..., head, :]
    after = _attended(names, run, Write(where, name, delta)).get((path, where.call), before)
    role = _ROLES[name]
    for each in ("query", "key", "value"):
        has_moved = not torch.equal(getattr(before, each), getattr(after, each))
        if has_moved != (each == role):
            why = f"a write to it {'moves' if has_moved else 'does not move'} the {each}"
            yield Claim(str(where), name, f"it is the {role} of attention", False, why=why)
            return
    yield Claim(str(where), name, f"it is the {role} of attention, alone", True)
    yield from _head_for_head(names, where, name, head, getattr(before, role), getattr(after, role))


def _head_for_head(
    names: Names, where: Where, name: str, head: int, before: Tensor, after: Tensor
) -> Iterator[Claim]:
    """That a write to one head moves this head of what the attention function is given."""
    count = names.layers[where.path].sizes.get("kv_heads" if name in ("k", "v") else "heads", 0)
    claim = f"head {head} of it is head {head} of attention"
    if before.ndim != 4 or not count or before.shape[1] % count:
        wrong = before.ndim == 4 and count > 0
        why = (
            f"attention has {before.shape[1]} heads, of {count}" if wrong else "heads are not told"
        )
        yield Claim(str(where), name, claim, False if wrong else None, why=why)
        return
    times = before.shape[1] // count
    if name in ("q", "cross_q") and times != 1:
        why = f"attention has {before.shape[1]} heads, not {count}"
        yield Claim(str(where), name, claim, False, why=why)
        return
    moved = {i for i in range(before.shape[1]) if not torch.equal(before[:, i], after[:, i])}
    if len(moved) == before.shape[1] > times:
        why = "all heads move with one: they are normed together"
        yield Claim(str(where), name, claim, None, why=why)
        return
    expected = set(range(head * times, (head + 1) * times))
    yield Claim(
        str(where), name, claim, moved == expected,
        why="" if moved == expected else f"heads {sorted(moved)} move",
    )  # fmt: skip


# -- seeing what an attention function is given ---------------------------------------------------


def _attended(names: Names, run: Run, write: Write | None) -> dict[tuple[str, int], Attended]:
    """What each attention of a run was given, by the path of its core and the call of it."""
    paths = {
        layer.modules[core] for layer in names.layers.values() for core in _CORES
        if core in layer.modules
    }  # fmt: skip
    tap = _Tap()
    with _cores(names, paths, tap), tap:
        observe(names, run, write)
    return tap.found


@final
class _Tap(TorchFunctionMode):
    """Notes the products and the softmax that are computed while a core runs."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[tuple[str, int], Attended] = {}
        self._open: list[tuple[str, list[tuple[str, tuple[Tensor, ...]]]]] = []
        self._calls: dict[str, int] = {}

    def begin(self, path: str, *_: Any) -> None:
        self._open.append((path, []))

    def end(self, path: str, *_: Any) -> None:
        events = self._open.pop()[1]
        call = self._calls.get(path, 0)
        self._calls[path] = call + 1
        found = _read(events)
        if found is not None:
            self.found[path, call] = found

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if self._open:
            given = (*args, *(kwargs or {}).values())
            tensors = tuple(each for each in given if isinstance(each, Tensor))
            if name == "scaled_dot_product_attention":
                self._note(name, *tensors[:3], result)
            elif name in _PRODUCTS:
                first = _PRODUCTS[name]
                self._note("product", *tensors[first : first + 2], result)
            elif name == "softmax":
                self._note(name, result)
        return result

    def _note(self, name: str, *tensors: Tensor) -> None:
        self._open[-1][1].append((name, tuple(each.detach().clone() for each in tensors)))


def _read(events: list[tuple[str, tuple[Tensor, ...]]]) -> Attended | None:
    """The attention that was computed: by torch's function, or by two products about a softmax."""
    kinds = [kind for kind, _ in events]
    if "scaled_dot_product_attention" in kinds:
        return Attended(*events[kinds.index("scaled_dot_product_attention")][1])
    if "softmax" not in kinds:
        return None
    middle = kinds.index("softmax")
    shape = events[middle][1][0].shape
    made = (each for kind, each in events[:middle] if kind == "product")
    # The first of these: DeBERTa adds products with positions to that of queries and keys.
    before = [each for each in made if each[-1].shape[-2:] == shape[-2:]]
    after = [each for kind, each in events[middle:] if kind == "product"]
    # Scores may be a sum of products, of which those with positions have other axes.
    before = [each for each in before if after and each[2].shape[-1] == after[0][0].shape[-1]]
    if not before or not after:
        return None
    return Attended(before[0][0], before[0][1].transpose(-1, -2), after[0][1], after[0][2])


@contextmanager
def _cores(names: Names, paths: set[str], tap: _Tap) -> Generator[None]:
    handles: list[Any] = []
    try:
        for path in paths:
            module: nn.Module = names.modules[path]
            handles.append(module.register_forward_pre_hook(partial(tap.begin, path), prepend=True))
            handles.append(module.register_forward_hook(partial(tap.end, path)))
        yield
    finally:
        for handle in handles:
            handle.remove()
