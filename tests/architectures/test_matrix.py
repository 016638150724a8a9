"""The matrix: the standard names of every tiny model are proved, one row for each family."""

from __future__ import annotations

import functools

import pytest
import torch

from tests.architectures.stirred import stirred
from tests.matrix.spec import Inputs
from tests.tiny_models import NAMES, SPECS, make
from tracekit import Model
from tracekit.architectures import Names, names_of
from tracekit.architectures.check import prove
from tracekit.architectures.witness import layers_of
from tracekit.models.naming import envoy_of

pytestmark = pytest.mark.usefixtures("without_gradients")


@functools.lru_cache(maxsize=1)
def made(name: str) -> tuple[torch.nn.Module, Inputs]:
    net, inputs = make(name)
    return stirred(net), inputs


def names_in(net: torch.nn.Module) -> Names:
    names = names_of(net)
    assert names is not None, "its family is not declared"
    return names


@pytest.mark.parametrize("name", NAMES)
def test_names_are_proved_by_plain_hooks_and_by_traces(name: str) -> None:
    net, inputs = made(name)
    proof = Model(net).check_names(**inputs)
    assert not proof.failed, "\n".join(map(str, proof.failed))
    proved = {claim.name for claim in proof if claim.is_right}
    for where in layers_of(names_in(net)):
        there = {bound.name for bound in names_in(net).points(where.path)}
        assert "resid_post" in there
        assert {"resid_pre", "resid_post"} <= proved


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "mixtral", "t5", "bert"])
def test_names_are_proved_in_bfloat16(name: str) -> None:
    net, inputs = make(name)
    net = stirred(net).to(torch.bfloat16)
    proof = prove(names_in(net), lambda: net(**inputs))
    assert not proof.failed, "\n".join(map(str, proof.failed))


@pytest.mark.parametrize("name", ["gpt2", "llama", "gptj", "mamba", "jamba", "bart"])
def test_names_are_read_and_written_in_each_step_of_a_generation(name: str) -> None:
    net, inputs = made(name)
    model, given = Model(net), SPECS[name].gen_inputs(inputs)
    where = [each for each in layers_of(names_in(net)) if each.stack == "layers"][-1]
    inputs_of, outputs_of = [], []
    module = net.get_submodule(where.path)
    handles = [
        module.register_forward_hook(lambda _, given, out: inputs_of.append(given[0].clone())),
        module.register_forward_hook(
            lambda _, given, out: outputs_of.append(
                (out if isinstance(out, torch.Tensor) else out[0]).clone()
            )
        ),
    ]
    pre, post = [], []
    with model.generate(**given, max_new_tokens=3, do_sample=False) as tracer:
        for _ in tracer.iter[:]:
            layer = envoy_of(model, where)
            pre.append(layer.resid_pre.clone())
            layer.resid_post[:, -1] += 1
            post.append(layer.resid_post.clone())
    for handle in handles:
        handle.remove()
    assert len(pre) == 3
    for seen, by_hook in zip(pre, inputs_of, strict=True):
        assert torch.equal(seen, by_hook)
    for seen, by_hook in zip(post, outputs_of, strict=True):
        changed = by_hook.clone()
        assert torch.equal(seen[:, :-1], changed[:, :-1])
        assert torch.equal(seen[:, -1], changed[:, -1])


@pytest.mark.parametrize("name", ["gpt2", "llama", "gptj", "mixtral", "mamba", "bert"])
def test_an_invoke_reads_and_writes_its_own_rows(name: str) -> None:
    net, inputs = made(name)
    model, where = Model(net), layers_of(names_in(net))[0]
    rows = [{key: value[row : row + 1] for key, value in inputs.items()} for row in (0, 1)]
    alone = []
    for row in rows:
        with model.trace(**row):
            alone.append(envoy_of(model, where).resid_post.clone())
    with model.trace() as tracer:
        with tracer.invoke(**rows[0]):
            envoy_of(model, where).resid_post[:] = 0
            first = envoy_of(model, where).resid_post.clone()
        with tracer.invoke(**rows[1]):
            second = envoy_of(model, where).resid_post.clone()
    assert first.shape == alone[0].shape
    assert not first.any()
    torch.testing.assert_close(second, alone[1])
