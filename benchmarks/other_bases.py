"""Work that is held against another base than the forward of the prompt: invokes, and dry runs."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from subjects import Subject
from timing import Clock, Estimate, Job, Part, Series, measure, quartiles, ratio
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from tracekit import LanguageModel

FURTHER = 8  # invokes beside the first
INVOKE_BOUND = 1e-4  # seconds, for each further one
SCAN_BOUND = 2.0  # forwards on fake tensors


# -- invokes --------------------------------------------------------------------------------------


def further_invokes(subject: Subject, rounds: int, clock: Clock) -> dict[str, Series]:
    """Who takes how many seconds for each further invoke that stores one read, forwards aside."""
    models: dict[str, Any] = {
        "tracekit": LanguageModel(subject.module, tokenizer=subject.tokenizer)
    }
    if importlib.util.find_spec("nnsight") is not None:
        models["nnsight"] = _nnsight(subject.copied())
    jobs: dict[tuple[str, int], Job] = {}
    for who, model in models.items():
        for count in (1, 1 + FURTHER):
            rows = subject.ids.expand(count, -1)
            inputs = {"input_ids": rows, "attention_mask": torch.ones_like(rows)}
            bare = partial(subject.module, **inputs, use_cache=False)
            run = partial(_invokes, model, list(subject.ids.expand(count, 1, -1)))
            jobs[who, count] = Job(Part(run, bare), Part(bare, bare))
    _check_agreement(jobs)
    timings = measure(jobs, rounds, clock)
    usual = {key: _median(timing.base) for key, timing in timings.items()}
    spent = {key: timing.overhead(usual[key]) for key, timing in timings.items()}
    return {who: (spent[who, 1 + FURTHER] - spent[who, 1]) / FURTHER for who in models}


def _nnsight(own: Subject) -> Any:
    from nnsight import TransformersModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return TransformersModel(own.module, tokenizer=own.tokenizer)


def _invokes(model: Any, prompts: list[Tensor]) -> list[Any]:
    place = model.transformer.h[2].mlp
    values: list[Any] = []
    with model.trace(use_cache=False) as tracer:
        for prompt in prompts:
            with tracer.invoke(prompt):
                values.append(place.output)
    return values


def _check_agreement(jobs: dict[tuple[str, int], Job]) -> None:
    for count in (1, 1 + FURTHER):
        kept: list[Any] = [job.work.run() for (_, number), job in jobs.items() if number == count]
        for values in kept:
            assert len(values) == count
            assert all(torch.allclose(one, kept[0][0], atol=1e-5) for one in values)


# -- scans ----------------------------------------------------------------------------------------


def scan_to_fake_forward(subject: Subject, rounds: int, clock: Clock) -> Estimate:
    """What a scan that reads one module takes, in forwards on fake tensors."""
    model = LanguageModel(subject.module, tokenizer=subject.tokenizer)
    fake = _fake_forward(subject)
    scan = partial(_scan, model, subject.ids)
    timing = measure({"scan": Job(Part(scan, fake), Part(fake, fake))}, rounds, clock)["scan"]
    return ratio(timing.work, timing.base)


def _fake_forward(subject: Subject) -> Callable[[], object]:
    mode = FakeTensorMode()
    module = subject.module
    named = [*module.named_parameters(), *module.named_buffers()]
    fakes = {name: mode.from_tensor(tensor) for name, tensor in named}
    inputs = {"input_ids": mode.from_tensor(subject.ids), "use_cache": False}

    def forward() -> object:
        with mode:
            return torch.func.functional_call(module, fakes, kwargs=inputs)

    return forward


def _scan(model: Any, ids: Tensor) -> Any:
    with model.scan(ids, use_cache=False):
        hidden = model.transformer.h[2].output
    return hidden  # noqa: RET504 - the name is what the block hands back


def _median(series: Series) -> float:
    return quartiles(series)[1]
