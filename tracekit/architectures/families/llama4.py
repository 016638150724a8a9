"""Llama 4: experts that see what the router has scaled, beside a shared one, in some layers."""

from tracekit.architectures.conditions import has, otherwise
from tracekit.architectures.schema import Block, Family, Lacks, Sharing, Stack, output
from tracekit.architectures.shared import ATTENTION_OF_LLAMA, MODEL_OF_LLAMA

_ATTENTION = {
    "norm1": "input_layernorm",
    **ATTENTION_OF_LLAMA,
    "norm2": "post_attention_layernorm",
    "mlp": "feed_forward",
}
_SPARSE = Block(
    {
        **_ATTENTION,
        "router": "feed_forward.router",
        "experts": "feed_forward.experts",
        "shared_expert": "feed_forward.shared_expert",
    },
    activations={
        "router_logits": output("router", key=1, sharing=Sharing.UNUSED),
        "router_weights": output("router", key=0, shape="batch*pos experts"),
        "router_indices": Lacks("no module gives them: router_weights are 0 for the others"),
        "experts_out": output("experts", shape="experts*batch*pos model"),
        "shared_expert_out": output("shared_expert", shape="batch*pos model"),
        "mlp_out": output("mlp", shape="batch*pos model"),
    },
    when=has("feed_forward.experts"),
)
_DENSE = Block(
    {
        **_ATTENTION,
        "gate": "feed_forward.gate_proj",
        "up": "feed_forward.up_proj",
        "down": "feed_forward.down_proj",
    },
    when=otherwise,
)
FAMILY = Family(
    "llama4",
    model_types=("llama4_text",),
    modules=MODEL_OF_LLAMA,
    stacks={"layers": Stack("model.layers", (_SPARSE, _DENSE))},
)
