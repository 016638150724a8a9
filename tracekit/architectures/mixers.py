"""State-space mixers and experts that several families share: their modules, and their values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from tracekit.architectures.layouts import Chunk, Part
from tracekit.architectures.schema import Declared, Lacks, Sharing, given, output

IN_CACHE: Final = Lacks(
    "no module has it: the kv_cache that the model returns keeps it, "
    "as past_key_values (or cache_params).layers[i].recurrent_states"
)
_IN_THE_SCAN: Final = Lacks("it is gated inside the scan: use ssm_inner, which is gated")

# Mamba's: input and gate from one projection, then step, B and C from what was convolved.
MAMBA_1_SIZES: Final[Mapping[str, tuple[str, ...]]] = {
    "step": ("time_step_rank",),
    "state": ("ssm_state_size",),
}
_FROM_X: Final = ("step", "state", "state")


def mamba_1_modules(path: str, norm: str) -> dict[str, str]:
    """The modules of a Mamba mixer at `path`."""
    inside = ("in_proj", "conv1d", "x_proj", "dt_proj", "out_proj")
    return {"norm1": norm, "ssm": path, **{each: f"{path}.{each}" for each in inside}}


MAMBA_1: Final[Mapping[str, Declared]] = {
    "ssm_x": output("in_proj", Chunk(0)),
    "ssm_gate": output("in_proj", Chunk(1)),
    "ssm_conv_out": given("x_proj", sharing=Sharing.SHARED),
    "ssm_dt": output("x_proj", Part(0, _FROM_X)),
    "ssm_b": output("x_proj", Part(1, _FROM_X)),
    "ssm_c": output("x_proj", Part(2, _FROM_X)),
    "ssm_scan": _IN_THE_SCAN,
    "ssm_state": IN_CACHE,
}

# Mamba-2's: all from one projection.
MAMBA_2_SIZES: Final[Mapping[str, tuple[str, ...]]] = {
    "inner": ("intermediate_size",),
    "state": ("n_groups", "ssm_state_size"),
    "step": ("num_heads",),
}
_FROM_IN: Final = ("inner", "inner", "state", "state", "step")


def mamba_2_modules(path: str, norm: str) -> dict[str, str]:
    """The modules of a Mamba-2 mixer at `path`."""
    inside = ("in_proj", "conv1d", "out_proj")
    modules = {"norm1": norm, "ssm": path, **{each: f"{path}.{each}" for each in inside}}
    return {**modules, "gate_norm": f"{path}.norm"}


MAMBA_2: Final[Mapping[str, Declared]] = {
    "ssm_gate": output("in_proj", Part(0, _FROM_IN)),
    "ssm_x": output("in_proj", Part(1, _FROM_IN)),
    "ssm_b": output("in_proj", Part(2, _FROM_IN)),
    "ssm_c": output("in_proj", Part(3, _FROM_IN)),
    "ssm_dt": output("in_proj", Part(4, _FROM_IN)),
    "ssm_conv_out": Lacks("no module has it: ssm_x, ssm_b and ssm_c are what is convolved"),
    "ssm_scan": given("gate_norm"),
    "ssm_state": IN_CACHE,
}

# Experts. From transformers 5 they are one module, behind a router that gives all there is to know;
# before, each was a module, and a linear map chose among them.
ROUTED: Final[Mapping[str, Declared]] = {
    "router_logits": output("router", key=0, sharing=Sharing.UNUSED),
    "router_weights": output("router", key=1),
    "router_indices": output("router", key=2),
}
_IN_THE_MLP: Final = Lacks("before transformers 5 no module has it: use router_logits")
ROUTED_BEFORE_5: Final[Mapping[str, Declared]] = {
    "router_weights": _IN_THE_MLP,
    "router_indices": _IN_THE_MLP,
    "experts_out": Lacks("before transformers 5 no module adds the experts up: use mlp_out"),
}
