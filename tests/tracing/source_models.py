"""Models whose forwards are written in the ways that forwards are, in a file as it was imported."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def double(value: Tensor) -> Tensor:
    """A function that is called in forwards, and which tests replace."""
    return value * 2


def shift(value: Tensor) -> Tensor:
    """Another."""
    return value + 1


def negate(value: Tensor) -> Tensor:
    """Another."""
    return -value


def halve(value: Tensor, by: float = 2) -> Tensor:
    """One with a default, that calls what it is given."""
    return torch.div(value, by)


class Order(nn.Module):
    """Calls of functions, submodules, a method and a nested function, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)

    def forward(self, value: Tensor) -> Tensor:
        value = self.first(double(value))
        value = self.inner(value)

        def local(each: Tensor) -> Tensor:
            return negate(each)

        return halve(local(value))

    def inner(self, value: Tensor) -> Tensor:
        value = self.second(shift(value))
        return torch.tanh(value)


def in_order() -> nn.Sequential:
    """An Order between two other modules."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), Order(), nn.Linear(4, 4))


class Loop(nn.Module):
    """One call that is made several times, and others in comprehensions."""

    times = 3

    def forward(self, value: Tensor) -> Tensor:
        for _ in range(self.times):
            value = double(value)
        parts = [shift(part) for part in value.unbind(0)]
        return torch.stack(parts) + sum(negate(part) for part in parts)


class Base(nn.Module):
    """What Derived inherits."""

    def forward(self, value: Tensor) -> Tensor:
        return double(value)


class Derived(Base):
    """Calls the forward that it inherits, and a name that is private to its class."""

    def __secret(self, value: Tensor) -> Tensor:
        return shift(value)

    def forward(self, value: Tensor) -> Tensor:
        names = sorted(locals())
        return self.__secret(super().forward(value)) + len(names)


def doubled(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A decorator that says what it wraps."""

    @functools.wraps(forward)
    def wrapper(*args: Any, **kwargs: Any) -> Tensor:
        return forward(*args, **kwargs) * 2

    return wrapper


def silently(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A decorator that does not."""

    def wrapper(self: nn.Module, value: Tensor) -> Tensor:
        return forward(self, value) * 2

    return wrapper


class Decorated(nn.Module):
    """Under two decorators."""

    @torch.no_grad()
    @doubled
    def forward(self, value: Tensor, *, by: float = 3, **_: Any) -> Tensor:
        return halve(value, by)


class Hidden(nn.Module):
    """Under a decorator that can't be seen through."""

    @silently
    def forward(self, value: Tensor) -> Tensor:
        return halve(value)


def closing_over(factor: float) -> tuple[nn.Module, Callable[[float], None]]:
    """A module whose forward, a function on the instance, closes over what can be changed."""
    module = nn.Module.__new__(Base)
    nn.Module.__init__(module)

    def forward(value: Tensor) -> Tensor:
        return torch.mul(value, factor)

    def change(new: float) -> None:
        nonlocal factor
        factor = new

    module.forward = forward
    return module, change


class Catching(nn.Module):
    """Goes on when a call fails."""

    def forward(self, value: Tensor) -> Tensor:
        for size in (3, 4):
            try:
                value = torch.reshape(value, (size, size))
            except RuntimeError:
                value = double(value)
        return value


class Passing(nn.Module):
    """Calls functions that it is given, others each time."""

    def __init__(self) -> None:
        super().__init__()
        self.functions: list[Any] = [halve, torch.tanh, Derived().forward]

    def forward(self, value: Tensor) -> Tensor:
        for function in self.functions:
            value = function(value)
        return value
