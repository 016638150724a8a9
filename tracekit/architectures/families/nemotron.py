"""Nemotron, Arcee, Apertus, StarCoder 2: Llama with an MLP that has no gate."""

from tracekit.architectures.schema import Block, Family, Stack
from tracekit.architectures.shared import MODEL_OF_LLAMA

_BLOCK = Block(
    {
        "norm1": ("input_layernorm", "attention_layernorm"),
        "attn": "self_attn",
        "q": "self_attn.q_proj",
        "k": "self_attn.k_proj",
        "v": "self_attn.v_proj",
        "q_norm": "self_attn.q_norm",
        "k_norm": "self_attn.k_norm",
        "o": "self_attn.o_proj",
        "norm2": ("post_attention_layernorm", "feedforward_layernorm"),
        "mlp": "mlp",
        "up": ("mlp.up_proj", "mlp.c_fc"),
        "down": ("mlp.down_proj", "mlp.c_proj"),
    }
)
FAMILY = Family(
    "nemotron",
    model_types=("nemotron", "apertus", "arcee", "starcoder2"),
    modules=MODEL_OF_LLAMA,
    stacks={"layers": Stack("model.layers", (_BLOCK,))},
)
