"""StableLM: Llama, or with one norm in front of attention and MLP and one sum."""

from dataclasses import replace

from tracekit.architectures.conditions import otherwise, says
from tracekit.architectures.schema import Block, Family, Residual, Stack, output

_PARALLEL = Block(
    {
        "norm1": "input_layernorm",
        "attn": "self_attn",
        "q": "self_attn.q_proj",
        "k": "self_attn.k_proj",
        "v": "self_attn.v_proj",
        "q_norm": "self_attn.q_layernorm",
        "k_norm": "self_attn.k_layernorm",
        "o": "self_attn.o_proj",
        "mlp": "mlp",
        "gate": "mlp.gate_proj",
        "up": "mlp.up_proj",
        "down": "mlp.down_proj",
    },
    residual=Residual.PARALLEL,
    activations={"mlp_out": output("", inside="dropout")},
    when=says(use_parallel_residual=True),
)
_SEQUENTIAL = replace(
    _PARALLEL,
    modules={**_PARALLEL.modules, "norm2": "post_attention_layernorm"},
    residual=Residual.SEQUENTIAL,
    when=otherwise,
)
FAMILY = Family(
    "stablelm",
    model_types=("stablelm",),
    modules={
        "embed": "model.embed_tokens",
        "final_norm": "model.norm",
        "unembed": "lm_head",
    },
    stacks={"layers": Stack("model.layers", (_PARALLEL, _SEQUENTIAL))},
)
