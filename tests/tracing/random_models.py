"""Small models from a description, so that a failing example prints what it ran on."""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

# ("linear",), ("residual", inner), ("sequence", [part, ...]) …: see _build.
Part: TypeAlias = Any
WIDTH = 4


class Residual(nn.Module):
    """Adds what it computes to its input."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


class AddsInto(Residual):
    """As Falcon does: overwrites the output of its inner module."""

    def forward(self, x: Tensor) -> Tensor:
        found = self.inner(x)
        found += x
        return found


class Twice(Residual):
    """Calls its inner module two times."""

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.inner(x))


class ByName(Residual):
    """Takes its input by keyword alone."""

    def forward(self, *, x: Tensor, scale: float = 1.0) -> Tensor:
        return self.inner(x) * scale


class CallsByName(Residual):
    """Calls its inner module by keyword alone."""

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x=x, scale=0.5)


class Pair(Residual):
    """Returns a tuple."""

    def forward(self, x: Tensor) -> tuple[Tensor, Any]:
        return self.inner(x), (x.mean(), "note")


class Named(Residual):
    """Returns a dictionary."""

    def forward(self, x: Tensor) -> dict[str, Any]:
        return {"state": self.inner(x), "mean": x.mean(), "size": x.shape[-1]}


class Unpacks(Residual):
    """Goes on with the tensor in its inner module's structure."""

    def forward(self, x: Tensor) -> Tensor:
        found = self.inner(x)
        return found["state"] if isinstance(found, dict) else found[0]


class Either(nn.Module):
    """Calls one of two modules, by the data."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) if x.sum() > 0 else self.second(x)


class Layers(nn.Module):
    """Goes through a ModuleList, which is never called itself."""

    def __init__(self, parts: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Net(nn.Module):
    """A body and a head; the head can be applied to any value of the body."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body
        self.head = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


_LEAVES = [("linear",), ("relu",), ("relu in place",), ("tanh",), ("identity",), ("again",)]
_WRAPPERS = ["residual", "adds into", "twice", "by name", "pair", "named", "unpacked"]


def _around(inner: st.SearchStrategy[Part]) -> st.SearchStrategy[Part]:
    parts = st.lists(inner, min_size=1, max_size=3)
    return st.one_of(
        st.tuples(st.sampled_from(["sequence", "layers"]), parts),
        st.tuples(st.sampled_from(_WRAPPERS), inner),
        st.tuples(st.just("either"), inner, inner),
    )


parts = st.recursive(st.sampled_from(_LEAVES), _around, max_leaves=6)
# Whatever they return has rows, each computed from its own row of the input alone; and nothing
# is overwritten.
parts_with_rows = st.recursive(
    st.sampled_from([("linear",), ("relu",), ("tanh",), ("identity",), ("again",)]),
    lambda inner: st.one_of(
        st.tuples(st.just("sequence"), st.lists(inner, min_size=1, max_size=3)),
        st.tuples(st.sampled_from(["residual", "twice", "by name"]), inner),
    ),
    max_leaves=5,
)


def build(part: Part) -> Net:
    """The model of a description; the same numbers each time."""
    torch.manual_seed(0)
    net = Net(_build(part, []))
    return net.eval()


def _build(part: Part, made: list[nn.Module]) -> nn.Module:
    """`made` are the linear layers so far: ("again",) is the first of them once more."""
    kind, *inner = part
    leaf = {
        "linear": lambda: nn.Linear(WIDTH, WIDTH),
        "relu": nn.ReLU,
        "relu in place": lambda: nn.ReLU(inplace=True),
        "tanh": nn.Tanh,
        "identity": nn.Identity,
        "again": lambda: made[0] if made else nn.Linear(WIDTH, WIDTH),
    }.get(kind)
    if leaf is not None:
        module = leaf()
        if isinstance(module, nn.Linear):
            made.append(module)
        return module
    if kind in {"sequence", "layers"}:
        modules = [_build(one, made) for one in inner[0]]
        return nn.Sequential(*modules) if kind == "sequence" else Layers(modules)
    modules = [_build(one, made) for one in inner]
    wrap: Any = {
        "residual": Residual,
        "adds into": AddsInto,
        "twice": Twice,
        "by name": lambda module: CallsByName(ByName(module)),
        "pair": lambda module: Unpacks(Pair(module)),
        "named": lambda module: Unpacks(Named(module)),
        "unpacked": lambda module: Unpacks(Pair(Residual(module))),
        "either": Either,
    }[kind]
    return wrap(*modules)
