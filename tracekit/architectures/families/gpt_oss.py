"""gpt-oss: experts for an MLP, sinks beside the keys."""

from dataclasses import replace
from typing import Any

from tracekit.architectures.conditions import otherwise
from tracekit.architectures.mixers import ROUTED
from tracekit.architectures.schema import Block, Family, Lacks, Stack, output
from tracekit.architectures.shared import ATTENTION_OF_LLAMA, MODEL_OF_LLAMA

_BLOCK = Block(
    {
        "norm1": "input_layernorm",
        **ATTENTION_OF_LLAMA,
        "norm2": "post_attention_layernorm",
        "mlp": "mlp",
        "router": "mlp.router",
        "experts": "mlp.experts",
    },
    activations=ROUTED,
)
# Before transformers 5 the router gives the weights of all experts, and no logits.
_BEFORE_5 = {
    "router_logits": Lacks("before transformers 5 no module has them: use router_weights"),
    "router_weights": output("router", key=0, shape="batch*pos experts"),
    "router_indices": output("router", key=1),
}


def _gives_logits(layer: Any, _config: Any) -> bool:
    return hasattr(layer.mlp.experts, "is_transposed")


FAMILY = Family(
    "gpt_oss",
    model_types=("gpt_oss",),
    modules=MODEL_OF_LLAMA,
    stacks={
        "layers": Stack(
            "model.layers",
            (
                replace(_BLOCK, when=_gives_logits),
                replace(_BLOCK, activations=_BEFORE_5, when=otherwise),
            ),
        )
    },
)
