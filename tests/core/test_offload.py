"""Where a module computes, told without running it; `meta` stands for a second device."""

from __future__ import annotations

from pathlib import Path

import accelerate
import torch
from accelerate.hooks import AlignDevicesHook, SequentialHook, add_hook_to_module
from torch import nn

from tracekit.analysis.components import stacked
from tracekit.core.nest import misfit
from tracekit.core.offload import (
    at_hand,
    brought,
    device_of,
    devices_of,
    execution_device,
    identity_of,
    is_offloaded,
    places_of,
)

CPU, META = torch.device("cpu"), torch.device("meta")


def layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))


def away(folder: Path) -> nn.Sequential:
    net = layers()
    accelerate.disk_offload(net, folder, execution_device=CPU)
    return net


def test_a_module_computes_where_its_weights_are() -> None:
    net = layers()
    assert (device_of(net), devices_of(net), execution_device(net)) == (CPU, {CPU}, None)
    assert device_of(net.to("meta")) is None  # nothing brings them
    assert device_of(nn.ReLU()) is None


def test_a_model_over_several_devices_has_a_place_for_each_part() -> None:
    net = layers()
    add_hook_to_module(net[1], AlignDevicesHook(execution_device="meta"))
    assert (device_of(net), device_of(net[1])) == (CPU, META)
    assert devices_of(net) == {CPU, META}
    add_hook_to_module(net, AlignDevicesHook(execution_device="meta", io_same_device=True))
    assert device_of(net) == META  # where the model as a whole moves its inputs to


def test_what_is_offloaded_computes_where_it_is_brought(tmp_path: Path) -> None:
    net = away(tmp_path)
    assert net[0].weight.is_meta
    assert (device_of(net), device_of(net[0]), devices_of(net)) == (CPU, CPU, {CPU})
    assert (is_offloaded(net[0]), is_offloaded(net)) == (True, False)
    assert set(places_of(net)) == {id(weight) for weight in net.parameters()}
    hook = SequentialHook(net[0]._hf_hook)
    net[0]._hf_hook = hook
    assert (is_offloaded(net[0]), execution_device(net[0])) == (True, CPU)


def test_weights_at_hand_leave_the_module_as_it_was(tmp_path: Path) -> None:
    net, memory = away(tmp_path), layers()
    before = {name: dict(vars(each)) for name, each in net.named_modules()}
    held = at_hand(net[0])
    assert held is not net[0]
    assert torch.equal(held.weight, memory[0].weight)
    assert torch.equal(type(held).forward(held, torch.ones(1, 2)), memory[0](torch.ones(1, 2)))
    found = brought(net, "1.bias")
    assert found is not None
    assert torch.equal(found, memory[1].bias)
    found.zero_()  # a file may be mapped for reading alone
    assert {name: dict(vars(each)) for name, each in net.named_modules()} == before
    assert at_hand(memory[0]) is memory[0]
    assert brought(memory, "0.weight") is None


def test_weights_are_the_same_after_a_call_and_others_after_a_change(tmp_path: Path) -> None:
    on_disk, on_cpu, memory = away(tmp_path), layers(), layers()
    state = {name: each.clone() for name, each in on_cpu.state_dict().items()}
    accelerate.cpu_offload(on_cpu, execution_device=CPU, state_dict=state)
    for net in (on_disk, on_cpu, memory):
        before = identity_of(net)
        net(torch.ones(1, 2))
        assert identity_of(net) == before
    before = identity_of(on_cpu)
    state["1.weight"].mul_(2)
    assert identity_of(on_cpu) != before
    before = identity_of(memory)
    memory[0].weight.data = memory[0].weight.data.double()
    assert identity_of(memory) != before


def test_a_value_on_another_device_is_told_how_to_fit() -> None:
    here, there = torch.zeros(2), torch.zeros(2, device="meta")
    found = misfit(here, there)
    assert found is not None
    assert found.endswith("Tensor[2] float32 cpu was written (its .to('meta') fits)")
    assert ".to(" not in str(misfit(torch.zeros(3), there))


def test_parts_of_layers_on_several_devices_are_stacked_on_the_first() -> None:
    found = stacked([("there", torch.zeros(2, device="meta")), ("here", torch.zeros(2))])
    assert (found.values.device, list(found.values.shape)) == (META, [2, 2])
