"""Tools on recorded activations: what the residual stream is made of, and what logits come of."""

from tracekit.analysis.attribution import logit_attrs
from tracekit.analysis.components import Components
from tracekit.analysis.norming import apply_norm_to_stack
from tracekit.analysis.parts import (
    full_resid_decomposition,
    get_neuron_results,
    stack_head_results,
    stack_neuron_results,
)
from tracekit.analysis.residual import accumulated_resid, decompose_resid

__all__ = [
    "Components",
    "accumulated_resid",
    "apply_norm_to_stack",
    "decompose_resid",
    "full_resid_decomposition",
    "get_neuron_results",
    "logit_attrs",
    "stack_head_results",
    "stack_neuron_results",
]
