"""StableLM: Llama, or with one norm in front of attention and MLP and one sum."""

from dataclasses import replace

from tracekit.architectures.conditions import otherwise, says
from tracekit.architectures.schema import Block, Family, Residual, Stack, output
from tracekit.architectures.shared import MLP_OF_LLAMA, MODEL_OF_LLAMA

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
        **MLP_OF_LLAMA,
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
    modules=MODEL_OF_LLAMA,
    stacks={"layers": Stack("model.layers", (_PARALLEL, _SEQUENTIAL))},
)
