"""Phi 1 and 2: one norm in front of attention and MLP, which are added in one sum."""

from tracekit.architectures.schema import Block, Family, Residual, Stack

_BLOCK = Block(
    {
        "norm1": "input_layernorm",
        "attn": "self_attn",
        "q": "self_attn.q_proj",
        "k": "self_attn.k_proj",
        "v": "self_attn.v_proj",
        "q_norm": "self_attn.q_layernorm",
        "k_norm": "self_attn.k_layernorm",
        "o": "self_attn.dense",
        "mlp": "mlp",
        "up": "mlp.fc1",
        "down": "mlp.fc2",
    },
    residual=Residual.PARALLEL,
)
FAMILY = Family(
    "phi",
    model_types=("phi",),
    modules={
        "embed": "model.embed_tokens",
        "final_norm": "model.final_layernorm",
        "unembed": "lm_head",
    },
    stacks={"layers": Stack("model.layers", (_BLOCK,))},
)
