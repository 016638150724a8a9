"""What is known of the modules of a model: their paths, aliases, containers, and changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.tiny_models import NAMES, make
from tracekit.core.tree import Tree
from tracekit.errors import UnknownModuleError


class Inner(nn.Module):
    """Two children, in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = nn.ModuleList([nn.Linear(2, 2), nn.ReLU()])

    def forward(self, value: Tensor) -> Tensor:
        for step in self.steps:
            value = step(value)
        return value


class Shared(nn.Module):
    """One module under two names, and one in no list at all."""

    def __init__(self) -> None:
        super().__init__()
        self.first = Inner()
        self.again = self.first
        self.table = nn.ModuleDict({"a": nn.Tanh(), "b": Inner()})
        self.nothing = None
        self.register_module("empty", None)

    def forward(self, value: Tensor) -> Tensor:
        return self.table["b"](self.table["a"](self.again(self.first(value))))


@pytest.fixture
def root() -> Shared:
    return Shared()


@pytest.fixture
def tree(root: Shared) -> Tree:
    return Tree(root, "model")


def test_every_module_has_a_path_that_begins_with_the_roots_name(tree: Tree, root: Any) -> None:
    assert list(tree.paths()) == [
        "model",
        "model.first",
        "model.first.steps",
        "model.first.steps.0",
        "model.first.steps.1",
        "model.table",
        "model.table.a",
        "model.table.b",
        "model.table.b.steps",
        "model.table.b.steps.0",
        "model.table.b.steps.1",
    ]
    assert tree.module("model.table.b.steps.1") is root.table["b"].steps[1]
    assert list(tree.order.values()) == list(range(11))


def test_the_second_name_of_a_module_is_an_alias_of_the_first(tree: Tree) -> None:
    assert tree.aliases == {
        "model.again": "model.first",
        "model.again.steps": "model.first.steps",
        "model.again.steps.0": "model.first.steps.0",
        "model.again.steps.1": "model.first.steps.1",
    }
    assert tree.canonical("model.again.steps.0") == "model.first.steps.0"
    assert tree.module("model.again") is tree.module("model.first")


def test_a_path_may_leave_out_the_roots_name(tree: Tree) -> None:
    assert tree.canonical("table.a") == tree.canonical("model.table.a") == "model.table.a"
    with pytest.raises(UnknownModuleError, match="'tabel' is not a module of Shared"):
        tree.canonical("tabel")


def test_a_child_of_the_roots_own_name_can_be_named() -> None:
    llama, _ = make("llama")
    tree = Tree(llama, "model")
    assert tree.module(tree.canonical("model.model.layers.0")) is llama.model.layers[0]
    assert tree.module(tree.canonical("model")) is llama


def test_containers_are_never_called_and_stand_for_what_they_hold(tree: Tree) -> None:
    assert [path for path in tree.paths() if not tree.is_called(path)] == [
        "model.first.steps",
        "model.table",
        "model.table.b.steps",
    ]
    below = ["model.first", "model.table.a", "model.table.b"]
    assert list(dict.fromkeys(tree.called_children("model"))) == below  # the alias leads to it too
    assert tree.called_children("model.table.b") == [
        "model.table.b.steps.0",
        "model.table.b.steps.1",
    ]
    assert tree.called_children("model.table.a") == []


def test_callers_and_ancestors_go_up_through_containers(tree: Tree) -> None:
    assert tree.callers("model.table.b.steps.0") == ["model.table.b"]
    assert tree.ancestors("model.table.b.steps.0") == ["model.table.b", "model"]
    assert tree.callers("model.table.a") == ["model"]
    assert tree.callers("model") == tree.ancestors("model") == []


def test_a_shared_module_has_every_caller_once() -> None:
    one, two = Inner(), Inner()
    two.steps[0] = one.steps[0]
    tree = Tree(nn.Sequential(one, two), "net")
    assert tree.callers("net.0.steps.0") == ["net.0", "net.1"]
    assert sorted(tree.ancestors("net.0.steps.0")) == ["net", "net.0", "net.1"]


@pytest.mark.parametrize("change", ["replace", "add", "remove", "share"])
def test_a_change_of_the_modules_is_seen_when_asked_for(change: str) -> None:
    root = Shared()
    tree = Tree(root, "model")
    if change == "replace":
        root.table["a"] = nn.Sigmoid()
    elif change == "add":
        root.first.extra = nn.Tanh()
    elif change == "remove":
        del root.table["a"]
    else:
        root.table["a"] = root.first
    tree.refresh_if_changed()
    fresh = Tree(root, "model")
    assert tree.modules == fresh.modules
    assert tree.aliases == fresh.aliases
    assert list(tree.paths()) == list(fresh.paths())
    assert tree.called_children("model") == fresh.called_children("model")


def test_a_tree_of_another_root_forgets_the_first(tree: Tree) -> None:
    known = tree.called_children("model")
    other = Shared()
    tree.replace_root(other)
    assert tree.root is other
    assert tree.module("model.table.a") is other.table["a"]
    assert tree.called_children("model") == known


def test_a_root_alone_is_a_tree() -> None:
    linear = nn.Linear(2, 2)
    tree = Tree(linear, "it")
    assert list(tree.paths()) == ["it"]
    assert tree.called_children("it") == tree.callers("it") == []
    assert tree.is_called("it")


@pytest.mark.parametrize("name", NAMES)
def test_the_tree_of_any_model_is_that_of_named_modules(name: str) -> None:
    root, inputs = make(name)
    tree = Tree(root, "model")
    named = {f"model.{path}" if path else "model": part for path, part in root.named_modules()}
    assert {path: tree.module(path) for path in tree.paths()} == named
    ran: list[nn.Module] = []
    handles = [part.register_forward_hook(lambda m, *_: ran.append(m)) for part in named.values()]
    with torch.no_grad():
        root(**inputs)
    for handle in handles:
        handle.remove()
    paths = {id(part): path for path, part in named.items()}
    assert all(tree.is_called(paths[id(part)]) for part in ran)
