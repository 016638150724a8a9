"""Qwen3-Next: gated attention or a gated delta rule, and experts beside a gated shared one."""

from dataclasses import replace

from tracekit.architectures.conditions import has, otherwise
from tracekit.architectures.layouts import Behind, Chunk, Heads, OfEachHead, Part
from tracekit.architectures.mixers import IN_CACHE, ROUTED, ROUTED_BEFORE_5
from tracekit.architectures.schema import Block, Family, Lacks, Stack, attended, given, output
from tracekit.architectures.shared import MLP_OF_LLAMA, MODEL_OF_LLAMA

_NORMS = {"norm1": "input_layernorm", "norm2": "post_attention_layernorm"}
_ATTENTION = Block(
    {
        **_NORMS,
        "attn": "self_attn",
        "q": "self_attn.q_proj",
        "k": "self_attn.k_proj",
        "v": "self_attn.v_proj",
        "q_norm": "self_attn.q_norm",
        "k_norm": "self_attn.k_norm",
        "o": "self_attn.o_proj",
    },
    activations={
        "q": output("q", OfEachHead(Chunk(0))),
        "attn_gate": output("q", OfEachHead(Chunk(1))),
        "z": attended("z"),
        "z_gated": given("o", Heads("heads")),
    },
    when=has("self_attn"),
)
# Of each key head: its query, its key, then values and gates of the value heads that share it.
_KEYS = ("key", "key")
_OF_KEY_HEADS = "batch pos k_heads {}"
_DELTA_RULE = Block(
    {
        **_NORMS,
        "ssm": "linear_attn",
        "in_proj": "linear_attn.in_proj_qkvz",
        "in_proj_gates": "linear_attn.in_proj_ba",
        "conv1d": "linear_attn.conv1d",
        "gate_norm": "linear_attn.norm",
        "out_proj": "linear_attn.out_proj",
    },
    activations={
        "ssm_c": output(
            "in_proj", OfEachHead(Part(0, _KEYS), "k_heads"), shape=_OF_KEY_HEADS.format("key")
        ),
        "ssm_b": output(
            "in_proj", OfEachHead(Part(1, _KEYS), "k_heads"), shape=_OF_KEY_HEADS.format("key")
        ),
        "ssm_x": output(
            "in_proj",
            OfEachHead(Behind(_KEYS, Chunk(0)), "k_heads"),
            shape=_OF_KEY_HEADS.format("values"),
        ),
        "ssm_gate": output(
            "in_proj",
            OfEachHead(Behind(_KEYS, Chunk(1)), "k_heads"),
            shape=_OF_KEY_HEADS.format("values"),
        ),
        "ssm_in_gate": output(
            "in_proj_gates",
            OfEachHead(Chunk(0), "k_heads"),
            shape=_OF_KEY_HEADS.format("v_heads_of_each"),
        ),
        "ssm_forget_gate": output(
            "in_proj_gates",
            OfEachHead(Chunk(1), "k_heads"),
            shape=_OF_KEY_HEADS.format("v_heads_of_each"),
        ),
        "ssm_conv_out": Lacks("no module has it: ssm_c, ssm_b and ssm_x are what is convolved"),
        "ssm_scan": given("gate_norm", shape="batch*pos*v_heads value"),
        "ssm_state": IN_CACHE,
    },
    sizes={"k_heads": ("num_k_heads",), "key": ("head_k_dim",), "value": ("head_v_dim",)},
    when=has("linear_attn"),
)
_SPARSE = Block(
    {
        "mlp": "mlp",
        "router": "mlp.gate",
        "experts": "mlp.experts",
        "shared_expert": "mlp.shared_expert",
        "shared_expert_gate": "mlp.shared_expert_gate",
    },
    activations={
        **ROUTED,
        "shared_expert_out": output("shared_expert", shape="batch*pos model"),
    },
    when=has("mlp.experts"),
)
_SPARSE_BEFORE_5 = replace(
    _SPARSE,
    activations={**_SPARSE.activations, "router_logits": output("router"), **ROUTED_BEFORE_5},
    when=has("mlp.experts.0"),
)
_DENSE = Block(
    {
        **MLP_OF_LLAMA,
    },
    when=otherwise,
)
FAMILY = Family(
    "qwen3_next",
    model_types=("qwen3_next",),
    modules=MODEL_OF_LLAMA,
    stacks={
        "layers": Stack(
            "model.layers",
            tuple(
                mixer & mlp
                for mixer in (_ATTENTION, _DELTA_RULE)
                for mlp in (_SPARSE_BEFORE_5, _SPARSE, _DENSE)
            ),
        )
    },
)
