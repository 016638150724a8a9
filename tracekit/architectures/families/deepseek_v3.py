"""DeepSeek V3: keys and values from one compressed part; experts, but in the first layers."""

from dataclasses import replace

from tracekit.architectures.conditions import has, otherwise
from tracekit.architectures.mixers import ROUTED, ROUTED_BEFORE_5
from tracekit.architectures.schema import Block, Family, Lacks, Stack, output
from tracekit.architectures.shared import MLP_OF_LLAMA, MODEL_OF_LLAMA

_ATTENTION = {
    "norm1": "input_layernorm",
    "attn": "self_attn",
    "q_down": "self_attn.q_a_proj",
    "q_down_norm": "self_attn.q_a_layernorm",
    "q": ("self_attn.q_b_proj", "self_attn.q_proj"),
    "kv_down": "self_attn.kv_a_proj_with_mqa",
    "kv_down_norm": "self_attn.kv_a_layernorm",
    "kv_up": "self_attn.kv_b_proj",
    "o": "self_attn.o_proj",
    "norm2": "post_attention_layernorm",
}
_COMPRESSED = {
    "k": Lacks(
        "keys are made of a compressed part and a rotary part that all heads share: "
        "use attn_k, or the outputs of kv_down and kv_up"
    ),
    "v": Lacks("values are made of a compressed part: use attn_v, or the output of kv_up"),
}
_SPARSE = Block(
    {
        **_ATTENTION,
        "mlp": "mlp",
        "router": "mlp.gate",
        "experts": "mlp.experts",
        "shared_expert": "mlp.shared_experts",
    },
    activations={**ROUTED, **_COMPRESSED},
    when=has("mlp.experts"),
)
# Before transformers 5 the router gives no logits, and the experts are modules of their own.
_SPARSE_BEFORE_5 = replace(
    _SPARSE,
    activations={
        **ROUTED_BEFORE_5,
        **_COMPRESSED,
        "router_logits": Lacks("before transformers 5 no module has them: use router_weights"),
        "router_indices": output("router", key=0),
        "router_weights": output("router", key=1),
    },
    when=has("mlp.experts.0"),
)
_DENSE = Block(
    {
        **_ATTENTION,
        **MLP_OF_LLAMA,
    },
    activations=_COMPRESSED,
    when=otherwise,
)
FAMILY = Family(
    "deepseek_v3",
    model_types=("deepseek_v3",),
    modules=MODEL_OF_LLAMA,
    stacks={"layers": Stack("model.layers", (_SPARSE_BEFORE_5, _SPARSE, _DENSE))},
)
