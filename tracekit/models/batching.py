"""The inputs of several invokes as one batch: rows of different lengths are padded."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import partial
from typing import Any, Protocol, TypeAlias, final

import torch
from torch import Tensor
from torch.nn import functional

from tracekit.core.nest import map_leaves, tensors
from tracekit.core.tree import Tree
from tracekit.errors import InputError
from tracekit.models.behind import run_behind
from tracekit.models.generation import of_a_forward
from tracekit.models.lengths import count_steps
from tracekit.tracing.call import TracedCall, one_step

Inputs: TypeAlias = "tuple[tuple[Any, ...], dict[str, Any]]"
# What is padded along its second axis, and with what; None: the token for padding.
_PADDED: dict[str, int | None] = {
    "input_ids": None,
    "attention_mask": 0,
    "token_type_ids": 0,
    "inputs_embeds": 0,
    "labels": -100,
    "decoder_input_ids": None,
    "decoder_attention_mask": 0,
    "decoder_inputs_embeds": 0,
}


class Reader(Protocol):
    """How one model reads and joins inputs."""

    def read(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Inputs:
        """The model's own arguments for one input; InputError if it is none."""
        ...

    def joined(self, inputs: list[Inputs]) -> Inputs:
        """The arguments for all of them, row behind row."""
        ...


@final
class Batch:
    """Inputs as they are given, and the call that runs them together."""

    def __init__(
        self, reader: Reader, tree: Tree, call: Callable[..., Any], kind: Hashable
    ) -> None:
        self._reader = reader
        self._tree = tree
        self._call = call  # takes the tree, what to call at the end of each step, and the arguments
        self._kind = kind
        self._read: list[Inputs] = []
        self._joined: Inputs | None = None

    @property
    def kind(self) -> Hashable:
        """Tells apart calls that take different ways through the model.

        A padded batch has masks, and positions for each row, that another does without.
        """
        args, kwargs = self._inputs
        attention = getattr(self._tree.root, "config", None)
        attention = getattr(attention, "_attn_implementation", None)  # may be set between runs
        is_padded = _most_padded(kwargs) is not None
        return self._kind, len(args), attention, is_padded, *sorted(kwargs)

    @property
    def _inputs(self) -> Inputs:
        if self._joined is None:
            self._joined = self._reader.joined(self._read)
        return self._joined

    @property
    def is_generation(self) -> bool:
        """Whether the call is no forward pass, but a loop of them with a result of its own."""
        return self._kind == "generate"

    def add(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
        """One more input, behind the others; how many rows it has."""
        inputs = self._reader.read(args, kwargs)
        if self._read:
            _check_alike(inputs, self._read[0])
        self._read.append(inputs)
        self._joined = None
        return _rows(inputs)

    def call(self) -> TracedCall:
        """Runs the model on all inputs, which nothing else holds while it runs."""
        inputs, self._joined = self._inputs, None
        tree, make = self._tree, self._call
        count = partial(count_steps, tree.root, *inputs) if self._kind == "generate" else one_step
        return TracedCall(lambda follower: make(tree, follower, *inputs), count)

    def call_with(self, rows: int) -> Callable[[Tree], object]:
        """Runs a forward pass of the model of a Tree on the row with most padding, repeated."""
        size = sum(map(_rows, self._read))
        args, kwargs = self._inputs
        row = _most_padded(kwargs) or 0
        if self.is_generation:
            kwargs = of_a_forward(self._tree.root, kwargs)

        def repeated(leaf: Any) -> Any:
            if isinstance(leaf, Tensor) and leaf.dim() and leaf.shape[0] == size:
                return leaf[row : row + 1].repeat(rows, *[1] * (leaf.dim() - 1))
            return leaf

        inputs: Any = map_leaves(repeated, (args, kwargs))
        return lambda tree: run_behind(tree, None, *inputs)


def _most_padded(kwargs: dict[str, Any]) -> int | None:
    """The row with most padding, as the mask tells; None if there is none."""
    mask = kwargs.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.dim() != 2 or bool(mask.all()):
        return None
    return int((mask != 0).sum(-1).argmin())


def join_inputs(inputs: list[Inputs], pad: int = 0, side: str = "right") -> Inputs:
    """The arguments of several inputs as those of one, row behind row.

    Token ids, masks and the like are padded to one length, on `side`, ids with `pad`.
    """
    every_args = [args for args, _ in inputs]
    every_kwargs = [kwargs for _, kwargs in inputs]
    args = tuple(
        _join(list(values), f"argument {index}", pad, side)
        for index, values in enumerate(zip(*every_args, strict=True))
    )
    names = every_kwargs[0]
    kwargs = {name: _join([each[name] for each in every_kwargs], name, pad, side) for name in names}
    return args, kwargs


def _join(values: list[Any], name: str, pad: int, side: str) -> Any:
    if not isinstance(values[0], Tensor):
        return _joined_leaves(values, name)
    lengths = [value.shape[1] for value in values if value.dim() > 1]
    if name in _PADDED and len(set(lengths)) > 1:
        found = _PADDED[name]
        fill = pad if found is None else found
        side = "right" if name.startswith("decoder") else side
        values = [_padded(value, max(lengths), fill, side) for value in values]
    if len({(value.shape[1:], value.dtype) for value in values}) > 1:
        shapes = ", ".join(str(tuple(value.shape)) for value in values)
        raise InputError(
            f"{name} of the invokes have shapes {shapes}, which make no batch: give them the same "
            f"size in all axes but the first, or trace them one by one."
        )
    return torch.cat(values)


def _joined_leaves(values: list[Any], name: str) -> Any:
    if any(True for _ in tensors(values[0])):
        parts = [list(tensors(value)) for value in values]
        following = iter([_join(list(each), name, 0, "right") for each in zip(*parts, strict=True)])
        return map_leaves(
            lambda leaf: next(following) if isinstance(leaf, Tensor) else leaf, values[0]
        )
    if any(value != values[0] for value in values[1:]):
        raise InputError(
            f"{name} is {values[0]!r} for one invoke and {values[1]!r} for another, but they run "
            f"as one call: give it once, to the trace."
        )
    return values[0]


def _padded(value: Tensor, length: int, fill: int, side: str) -> Tensor:
    missing = length - value.shape[1]
    ends = (missing, 0) if side == "left" else (0, missing)
    return functional.pad(value, [0, 0] * (value.dim() - 2) + list(ends), value=fill)


def _rows(inputs: Inputs) -> int:
    first = next(tensors(inputs), None)
    if first is None or not first.dim():
        raise InputError(
            "an invoke takes what the model takes, as a batch: no tensor with rows was given."
        )
    return first.shape[0]


def _check_alike(inputs: Inputs, others: Inputs) -> None:
    names, known = sorted(inputs[1]), sorted(others[1])
    if names != known or len(inputs[0]) != len(others[0]):
        raise InputError(
            f"the invokes of a trace take the same arguments, and one has {len(inputs[0])} "
            f"positional and {names}, another {len(others[0])} and {known}."
        )


@final
class Padded:
    """Inputs of a language model, padded to one length."""

    def __init__(
        self,
        read: Callable[..., dict[str, Any]],
        fitted: Callable[[dict[str, Any]], dict[str, Any]],
        pad: int,
        side: str,
    ) -> None:
        self._read = read
        self._fitted = fitted
        self._pad = pad
        self._side = side

    def read(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Inputs:
        if len(args) > 1:
            raise InputError(
                f"an invoke takes one input, or a list of rows, and {len(args)} were given."
            )
        inputs = self._read(args, kwargs)
        ids = inputs.get("input_ids")
        if isinstance(ids, Tensor) and "attention_mask" not in inputs:
            inputs["attention_mask"] = torch.ones_like(ids)
        return (), inputs

    def joined(self, inputs: list[Inputs]) -> Inputs:
        _, kwargs = join_inputs(inputs, self._pad, self._side)
        return (), self._fitted(kwargs)


@final
class Joined:
    """Inputs of any module: joined along their first axis, beside what all calls `share`."""

    def __init__(self, shared: dict[str, Any]) -> None:
        self._shared = shared

    def read(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Inputs:
        return args, kwargs

    def joined(self, inputs: list[Inputs]) -> Inputs:
        args, kwargs = join_inputs(inputs)
        return args, {**kwargs, **self._shared}


def is_without_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether no tensor is given: the inputs come with invokes, then."""
    return not args and not any(True for _ in tensors(kwargs))
