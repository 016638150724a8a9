"""Swin: stages of narrowing pictures, with attention in windows that shift."""

from dataclasses import replace

from tracekit.architectures.layouts import Heads, HeadsFirst
from tracekit.architectures.schema import Block, Family, Stack, attended, given, output
from tracekit.architectures.shared import NO_LOGITS

# Attention is given the windows of all pictures as rows; in every second layer they are shifted.
_HEADS = "batch*windows window heads head_dim"
_SCORES = "batch*windows heads window window"
_BLOCK = Block(
    {
        "norm1": "layernorm_before",
        "attn": "attention",
        "attn_core": "attention.self",
        "q": ("attention.q_proj", "attention.self.query"),
        "k": ("attention.k_proj", "attention.self.key"),
        "v": ("attention.v_proj", "attention.self.value"),
        "o": ("attention.o_proj", "attention.output.dense"),
        "norm2": "layernorm_after",
        "mlp": "mlp",
        "up": ("mlp.fc1", "intermediate.dense"),
        "down": ("mlp.fc2", "output.dense"),
    },
    activations={
        **{name: output(name, Heads(), shape=_HEADS) for name in "qkv"},
        **{f"attn_{name}": replace(attended(name, HeadsFirst()), shape=_HEADS) for name in "qkv"},
        "scores": replace(attended("scores"), shape=_SCORES),
        "pattern": replace(attended("pattern"), shape=_SCORES),
        "z": given("o", Heads(), shape=_HEADS),
        "head_result": output("o", inside="head_result", shape="batch*windows window heads model"),
        # What attention gives lies in windows; put back in the picture it goes through here.
        "attn_out": output("", inside="drop_path"),
    },
)
FAMILY = Family(
    "swin",
    model_types=("swin",),
    modules={
        "patch_embed": "swin.embeddings.patch_embeddings",
        "embed_norm": "swin.embeddings.norm",
        "final_norm": "swin.layernorm",
    },
    stacks={
        "layers": Stack(
            "swin.encoder.layers.*.blocks.*",
            (_BLOCK,),
            between="each stage but the last ends by merging patches, four by four",
            sizes={"heads": "num_attention_heads", "kv_heads": "num_attention_heads"},
        )
    },
    lacks=NO_LOGITS,
)
