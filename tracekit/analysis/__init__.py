"""Answers: which part of a model matters, by what it adds, by its gradient, and by patching it."""

from tracekit.analysis.ablation import ablate, ablation_sweep
from tracekit.analysis.attribution import logit_attrs
from tracekit.analysis.attribution_patching import attribution_patching
from tracekit.analysis.components import Components
from tracekit.analysis.direct import direct_logit_attribution
from tracekit.analysis.edges import Circuit, Edge, Edges, edge_attribution
from tracekit.analysis.heads import HeadScores, copying_scores, head_scores, repeated_tokens
from tracekit.analysis.integrated import Integrated, integrated_gradients
from tracekit.analysis.labelled import Axis, Labelled
from tracekit.analysis.lens import Lens, logit_lens
from tracekit.analysis.metrics import (
    Metric,
    log_probability,
    logit,
    logit_difference,
    probability,
)
from tracekit.analysis.norming import apply_norm_to_stack
from tracekit.analysis.parts import (
    full_resid_decomposition,
    get_neuron_results,
    stack_head_results,
    stack_neuron_results,
)
from tracekit.analysis.patching.patched import PatchSweep
from tracekit.analysis.patching.patches import Patch
from tracekit.analysis.patching.sweep import patch_sweep
from tracekit.analysis.probes import Probes, probe
from tracekit.analysis.residual import accumulated_resid, decompose_resid
from tracekit.analysis.saliency import gradient_x_input
from tracekit.analysis.steering import DoseCurve, SteeringVector, dose_curve, steering_vector

__all__ = [
    "Axis",
    "Circuit",
    "Components",
    "DoseCurve",
    "Edge",
    "Edges",
    "HeadScores",
    "Integrated",
    "Labelled",
    "Lens",
    "Metric",
    "Patch",
    "PatchSweep",
    "Probes",
    "SteeringVector",
    "ablate",
    "ablation_sweep",
    "accumulated_resid",
    "apply_norm_to_stack",
    "attribution_patching",
    "copying_scores",
    "decompose_resid",
    "direct_logit_attribution",
    "dose_curve",
    "edge_attribution",
    "full_resid_decomposition",
    "get_neuron_results",
    "gradient_x_input",
    "head_scores",
    "integrated_gradients",
    "log_probability",
    "logit",
    "logit_attrs",
    "logit_difference",
    "logit_lens",
    "patch_sweep",
    "probability",
    "probe",
    "repeated_tokens",
    "stack_head_results",
    "stack_neuron_results",
    "steering_vector",
]
