"""Where an attention makes the call that its values are taken from, and who wants them in a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from types import CodeType, FunctionType
from typing import Any, Final, TypeAlias, final

from torch import nn

from tracekit.capture.functions import unwrap
from tracekit.capture.operations import Listing, operations_of
from tracekit.capture.percode import PerCode
from tracekit.core.annex import ANNEX
from tracekit.core.quirks import is_checkpointing
from tracekit.core.tree import Tree
from tracekit.errors import AttentionError, SourceError
from tracekit.interleave.attend import attend
from tracekit.interleave.forwards import own_forward
from tracekit.interleave.hooks import Hooks, is_elsewhere
from tracekit.interleave.leading import Leading
from tracekit.interleave.masks import beside
from tracekit.interleave.own_attention import OwnAttention
from tracekit.interleave.passage import Watch

_INTERFACE: Final = "attention_interface"  # what 348 files of transformers call it, 4.53 to 5
_EAGER: Final = "eager_attention_forward"
_OWN: Final = frozenset({"softmax", "Softmax", "scaled_dot_product_attention"})
_DEPTH: Final = 2  # of calls, from a forward to its softmax

# Makes of what is called, and of what runs in its place, what is to be called.
Wrap: TypeAlias = "Callable[[Callable[..., Any], Callable[..., Any]], Callable[..., Any]]"


@final
class Tap:
    """The attention at the path `owner`, in one run; AttentionError if it can't be tapped."""

    def __init__(self, tree: Tree, owner: str, hooks: Hooks, watches: dict[str, Watch]) -> None:
        self.is_by_interface = check_tappable(tree, owner)
        self._module = tree.module(owner)
        self.is_recomputed = any(is_checkpointing(tree.module(x)) for x in tree.ancestors(owner))
        self._hooks = hooks
        values = Leading(f"{owner}.{ANNEX}", tree, hooks, watches)
        self.is_wanted, self.passed = values.is_wanted, values.passed  # as Pieces

    def wraps(self, function: FunctionType, known: Listing) -> dict[int, Wrap]:
        """By the index of the call of an attention function in `known`, what is put around it."""
        if not self.is_by_interface:
            return {}
        wrapped = partial(self._wrapped, _eager_of(function))
        return dict.fromkeys(_attention_calls(function, known), wrapped)

    def _wrapped(
        self, eager: Callable[..., Any], call: Callable[..., Any], runs: Callable[..., Any]
    ) -> Callable[..., Any]:
        def tapped(*args: Any, **kwargs: Any) -> Any:
            if is_elsewhere(self._hooks.thread):
                return runs(*args, **kwargs)
            return attend(self, runs, None if call is eager else beside(eager), args, kwargs)

        return tapped

    def around(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """What is to run in the place of the forward `call`, if that computes its own pattern."""
        if self.is_by_interface:
            return call

        def tapped(*args: Any, **kwargs: Any) -> Any:
            with OwnAttention(self, self._module):
                return call(*args, **kwargs)

        return tapped


def is_attention(module: nn.Module) -> bool:
    """Whether it calls itself one."""
    name = type(module).__name__.lower()
    return ("attention" in name or "attn" in name) and not hasattr(module, ANNEX)


def is_tappable(tree: Tree, path: str) -> bool:
    """Whether the module at `path` is an attention whose values can be had."""
    try:
        check_tappable(tree, path)
    except AttentionError:
        return False
    return not hasattr(tree.module(path), ANNEX)


def check_tappable(tree: Tree, path: str) -> bool:
    """Whether the attention at `path` calls an attention function, or else computes it itself.

    AttentionError if it does neither.
    """
    module = tree.module(path)
    try:
        function, _ = unwrap(own_forward(module))
        if _INTERFACE not in _names(function.__code__):
            return _check_own(tree, path, function)
        calls = _attention_calls(function, operations_of(function))
    except SourceError as error:
        raise AttentionError(f"{path}.{ANNEX} can't be had: {error.args[0]}") from error
    if not calls or _eager_of(function) is None:
        raise _none_of_it(tree, path)
    return True


def _check_own(tree: Tree, path: str, function: FunctionType) -> bool:
    module = tree.module(path)
    if not is_attention(module) or not _reaches(function, type(module), _DEPTH):
        raise _none_of_it(tree, path)
    return False


def _none_of_it(tree: Tree, path: str) -> AttentionError:
    kind = type(tree.module(path)).__name__
    inside = [each for each in tree.called if each.startswith(f"{path}.")]
    found = next((each for each in inside if is_tappable(tree, each)), None)
    example = found or "model.transformer.h[0].attn"
    return AttentionError(
        f"{path}.{ANNEX} can't be had: the forward of {kind} makes no call of an attention "
        f"function, nor of a softmax; ask the module that does, as in {example}.{ANNEX}.pattern."
    )


def _reaches(function: FunctionType, kind: type, depth: int) -> bool:
    """Whether a function, or one that it calls, makes a pattern itself."""
    names = _names(function.__code__)
    if names & _OWN:
        return True
    called = (each for name in names for each in _meant(name, function, kind)) if depth else ()
    return any(_reaches(each, kind, depth - 1) for each in called)


def _meant(name: str, function: FunctionType, kind: type) -> Iterator[FunctionType]:
    """The functions that a name in a method of `kind` may mean."""
    known = function.__globals__.get(name)
    for found in (getattr(kind, name, None), known, *_values(known)):
        if isinstance(found, FunctionType):
            yield found


def _values(known: Any) -> list[Any]:
    return list(known.values()) if type(known) is dict else []


_names_of: PerCode[frozenset[str]] = PerCode()


def _names(code: CodeType) -> frozenset[str]:
    """The names that a function uses, those of comprehensions in it too; found out once."""
    known = _names_of.get(code)
    if known is None:
        inner = [constant for constant in code.co_consts if isinstance(constant, CodeType)]
        own = frozenset({*code.co_names, *code.co_varnames, *code.co_cellvars})
        known = own.union(*map(_names, inner))
        _names_of.put(code, known)
    return known


_calls_of: PerCode[tuple[int, ...]] = PerCode()
_eager_names_of: PerCode[tuple[str, ...]] = PerCode()


def _attention_calls(function: FunctionType, known: Listing) -> tuple[int, ...]:
    """Which calls written in a forward are those of the attention function; found out once."""
    found = _calls_of.get(function.__code__)
    if found is None:
        calls = enumerate(known.calls)
        found = tuple(index for index, call in calls if call.text.startswith(f"{_INTERFACE}("))
        _calls_of.put(function.__code__, found)
    return found


def _eager_of(function: FunctionType) -> Any:
    """The model's own attention function."""
    names = _eager_names_of.get(function.__code__)
    if names is None:
        names = (_EAGER, *(name for name in _names(function.__code__) if name.endswith(_EAGER)))
        _eager_names_of.put(function.__code__, names)
    known = function.__globals__
    return next((known[name] for name in names if name in known), None)
