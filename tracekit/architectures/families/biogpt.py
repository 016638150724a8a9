"""BioGPT: pre-norm, learned positions, the MLP in the layer itself."""

from tracekit.architectures.schema import Block, Family, Stack

_BLOCK = Block(
    {
        "norm1": "self_attn_layer_norm",
        "attn": "self_attn",
        "q": "self_attn.q_proj",
        "k": "self_attn.k_proj",
        "v": "self_attn.v_proj",
        "o": "self_attn.out_proj",
        "norm2": "final_layer_norm",
        "up": "fc1",
        "down": "fc2",
    }
)
FAMILY = Family(
    "biogpt",
    model_types=("biogpt",),
    modules={
        "embed": "biogpt.embed_tokens",
        "pos_embed": "biogpt.embed_positions",
        "final_norm": "biogpt.layer_norm",
        "unembed": "output_projection",
    },
    stacks={"layers": Stack("biogpt.layers", (_BLOCK,))},
)
