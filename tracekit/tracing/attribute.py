"""Let `.grad`, `.backward` and `.save` of every tensor mean something else while a block runs."""

# Guarantees:
#   - on other threads, in torch's own functions and outside such blocks nothing is changed;
#   - when the last block has ended, torch.Tensor is exactly as it was.

from __future__ import annotations

import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import partial, wraps
from typing import Any, Final, Protocol

from torch import Tensor

from tracekit.capture import caller_frame, is_with_item
from tracekit.interleave.worker import exclusively, this_thread
from tracekit.tracing.save import save


class Reader(Protocol):
    """Answers for the gradients of tensors (a Backward)."""

    def read(self, tensor: Tensor) -> Tensor: ...
    def write(self, tensor: Tensor, gradient: object) -> None: ...


_PLAIN_GRAD: Final[Any] = Tensor.grad  # inherited, so what torch.Tensor has is not its own
_readers: Final[dict[int, list[Reader]]] = {}  # by thread, innermost block last
_replaced: Final[dict[str, Any]] = {}  # attributes of torch.Tensor's own, as they were
_makers: Final[dict[int, list[Callable[..., Any]]]] = {}  # by thread: what makes a Backward
_savers: Final[dict[int, list[Any]]] = {}  # by thread: one item for each block
_ABSENT: Final = object()


@contextmanager
def answering(reader: Reader) -> Generator[None]:
    """Let `reader` answer for `.grad` on this thread."""
    with _in_place("grad", property(_get, _set, _delete), _readers, reader):
        yield


@contextmanager
def with_items_opened_by(make: Callable[..., Any]) -> Generator[None]:
    """Let `with x.backward(...):` on this thread open what `make(x, ...)` gives.

    For blocks that run where they stand; in a captured one the call is compiled to this effect.
    """
    plain = Tensor.backward

    @wraps(plain)
    def backward(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        makers = _makers.get(this_thread())
        if makers and is_with_item(caller_frame()):
            return makers[-1](self, *args, **kwargs)
        return plain(self, *args, **kwargs)

    with _in_place("backward", backward, _makers, make):
        yield


@contextmanager
def with_save() -> Generator[None]:
    """Let every tensor on this thread have `.save()`, which gives the tensor itself.

    For blocks that run where they stand; in a captured one the call is compiled to this effect.
    """
    if not _savers and hasattr(Tensor, "save"):  # another library's, which knows its own
        yield
        return
    with _in_place("save", _Save(), _savers, _ABSENT):
        yield


class _Save:
    """The method on the threads that have it; no data descriptor, so a tensor's own comes first."""

    def __get__(self, tensor: Tensor | None, kind: type[Tensor]) -> Any:
        if this_thread() not in _savers:
            raise AttributeError(
                f"{kind.__name__!r} object has no attribute 'save'", name="save", obj=tensor
            )
        return save if tensor is None else partial(save, tensor)


@contextmanager
def _in_place(
    name: str, replacement: Any, by_thread: dict[int, list[Any]], item: Any
) -> Generator[None]:
    thread = this_thread()
    with exclusively:
        if not by_thread:
            _replaced[name] = vars(Tensor).get(name, _ABSENT)
            setattr(Tensor, name, replacement)
        by_thread.setdefault(thread, []).append(item)
    try:
        yield
    finally:
        with exclusively:
            stack = by_thread[thread]
            stack.remove(item)
            if not stack:
                del by_thread[thread]
            if not by_thread:
                _restore(name)


def _restore(name: str) -> None:
    before = _replaced.pop(name)
    if before is _ABSENT:
        delattr(Tensor, name)
    else:
        setattr(Tensor, name, before)


def _reader() -> Reader | None:
    """Who answers the caller of the property: nobody for torch's own functions."""
    stack = _readers.get(this_thread())
    if not stack:
        return None
    caller = sys._getframe(2).f_globals.get("__name__") or ""  # pyright: ignore[reportPrivateUsage]
    return None if caller.partition(".")[0] == "torch" else stack[-1]


def _get(tensor: Tensor) -> Any:
    reader = _reader()
    return _PLAIN_GRAD.__get__(tensor) if reader is None else reader.read(tensor)


def _set(tensor: Tensor, gradient: Any) -> None:
    reader = _reader()
    if reader is None or (gradient is None and tensor.is_leaf):  # as zero_grad() does
        _PLAIN_GRAD.__set__(tensor, gradient)
    else:
        reader.write(tensor, gradient)


def _delete(tensor: Tensor) -> None:
    _PLAIN_GRAD.__delete__(tensor)
