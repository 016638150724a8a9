"""Objects that only pickle can tell of: a change on the host is never lost in silence."""

# ruff: noqa: PT031 - the block is what warns

from __future__ import annotations

import warnings
from datetime import date
from pathlib import Path

import pytest
import torch

from tests.distributed.helpers import Meter
from tracekit import LanguageModel
from tracekit.distributed import ModelHost
from tracekit.errors import TracekitWarning

BEN = "The Big Ben is in"


def test_a_change_that_can_not_come_back_names_its_variable(
    model: LanguageModel, host: ModelHost
) -> None:
    meter = Meter()
    with (
        pytest.warns(TracekitWarning, match="'meter', a Meter, on the host") as told,
        model.trace(BEN, on=host),
    ):
        hidden = model.transformer.h[0].output
        meter.seen += 1
        seen = meter.seen
    assert [each.filename for each in told] == [__file__]
    assert (meter.seen, seen) == (0, 1) and hidden.shape[-1] == 128


def test_it_is_named_in_a_container_too(model: LanguageModel, host: ModelHost) -> None:
    meters = {"one": [Meter()]}
    with (
        pytest.warns(TracekitWarning, match="a Meter in 'meters'"),
        model.trace(BEN, on=host),
    ):
        model.lm_head.output
        meters["one"][0].seen = 5


def test_a_new_one_that_the_block_binds_comes_back(model: LanguageModel, host: ModelHost) -> None:
    old = Meter()
    with model.trace(BEN, on=host):
        model.lm_head.output
        meter = Meter()
        meter.seen = old.seen + 3
    assert meter.seen == 3


def test_those_that_are_only_read_are_not_told_of(model: LanguageModel, host: ModelHost) -> None:
    meter, place, day, kind = Meter(), Path("a"), date(2026, 1, 1), torch.float64
    ours = [meter, (place, day)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with model.trace(BEN, on=host):
            hidden = model.transformer.h[0].output.to(kind) + day.day + meter.seen
            told = (str(place / "b"), len(ours), hash(place))
    assert hidden.dtype is kind and told[:2] == ("a/b", 2)


def test_a_generator_of_random_numbers_that_went_on_is_told_of(
    model: LanguageModel, host: ModelHost
) -> None:
    numbers = torch.Generator().manual_seed(0)
    with (
        pytest.warns(TracekitWarning, match="'numbers', a Generator"),
        model.trace(BEN, on=host),
    ):
        noise = torch.randn(3, generator=numbers)
        model.lm_head.output
    assert torch.equal(noise, torch.randn(3, generator=numbers))
