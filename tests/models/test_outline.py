"""The outline of a model has every module and weight once, whatever the family."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from tests.tiny_models import NAMES, make
from tracekit import LanguageModel, Model
from tracekit.models.activity import activity
from tracekit.models.outline import outline

SOME = [name for name in NAMES if name in {"llama", "mixtral", "jamba", "albert", "t5", "vit"}]


@pytest.mark.parametrize("name", SOME)
def test_each_module_and_weight_of_a_family_is_in_it(name: str) -> None:
    module, _ = make(name)
    whole = outline(LanguageModel(module))
    modules = dict(module.named_modules(remove_duplicate=False))
    for branch in whole:
        for path in branch.paths:
            found = modules[path.partition(".")[2]]
            assert branch.kind == type(found).__name__
            assert branch.parameters == sum(each.numel() for each in found.parameters())
    first = {path for branch in whole for path in branch.paths}
    assert {f"model.{path}".rstrip(".") for path, _ in module.named_modules()} <= first
    own = [
        len(branch.paths) * torch.Size(shape).numel()
        for branch in whole
        if not branch.same_as
        for _, shape in branch.weights
    ]
    assert sum(own) == whole.parameters == whole.own


def test_layers_of_two_kinds_are_folded_where_neighbours_are_alike() -> None:
    def layer(width: int) -> nn.Module:
        return nn.Sequential(nn.Linear(4, width), nn.Linear(width, 4))

    net = nn.Sequential(*(layer(width) for width in (3, 3, 5, 3, 3, 3)))
    found = outline(Model(net))
    assert [branch.name for branch in found.branches] == ["0-1", "2", "3-5"]
    assert found.branches[2].branches[0].paths == ("model.3.0", "model.4.0", "model.5.0")
    assert [branch.name for branch in outline(Model(net), fold=False).branches] == [*"012345"]


def test_a_module_that_is_there_twice_says_where_it_is_shown() -> None:
    shared = nn.Linear(4, 4)
    net = nn.Sequential(shared, nn.ReLU(), shared)
    found = outline(Model(net))
    assert [branch.same_as for branch in found.branches] == ["", "", "model.0"]
    assert found.parameters == found.own == 20
    assert [(branch.parameters, branch.own) for branch in found.branches[::2]] == [
        (20, 20),
        (20, 0),
    ]


def test_modules_of_other_settings_are_not_alike() -> None:
    net = nn.Sequential(nn.Dropout(0.1), nn.Dropout(0.1), nn.Dropout(0.5))
    assert [branch.name for branch in outline(Model(net)).branches] == ["0-1", "2"]


def test_the_outline_of_a_module_is_a_part_of_the_whole() -> None:
    model = LanguageModel("tracekit/tiny")
    (whole,) = (each for each in outline(model, fold=False) if each.paths[0].endswith("h.2.attn"))
    assert outline(model.transformer.h[2].attn) == whole and len(whole.branches) > 2


def test_activity_is_over_finite_numbers_and_tells_of_others() -> None:
    value = torch.tensor([3.0, -4.0, torch.nan, -torch.inf])
    each = activity(Model(nn.Sequential(nn.Identity())), value)["model.0"]
    assert (each.mean, each.std, each.largest, each.nans) == (-0.5, 3.5, torch.inf, 1)
    assert each.rms == pytest.approx(12.5**0.5)
    none = activity(Model(nn.Sequential(nn.Identity())), value[2:3])["model.0"]
    assert none.nans == 1 and repr((none.mean, none.std, none.rms, none.largest)) == str(
        (math.nan,) * 4
    )


def test_activity_counts_calls_and_leaves_integers_without_sizes() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.flag = nn.ReLU(), nn.Identity()

        def forward(self, value: torch.Tensor) -> torch.Tensor:
            self.flag(torch.ones(3, dtype=torch.long))
            return self.inner(self.inner(value) - 1)

    found = activity(Model(Twice()), torch.tensor([[3.0, -4.0]]))
    assert (found["model.inner"].calls, found["model.inner"].shape) == (2, (1, 2))
    assert found["model.inner"].rms == pytest.approx((9 / 2) ** 0.5)
    assert found["model.inner"].largest == 3.0
    assert (found["model.flag"].dtype, found["model.flag"].rms) == ("int64", None)


def test_a_model_without_weights_weighs_what_it_will() -> None:
    empty = LanguageModel("tracekit/tiny", dispatch=False)
    assert outline(empty) == outline(LanguageModel("tracekit/tiny"))  # tied weights are one there
