"""Zamba 2: Mamba-2; in some layers its mixer also reads what a block shared by layers gives."""

from tracekit.architectures.conditions import has, otherwise
from tracekit.architectures.mixers import MAMBA_2, MAMBA_2_SIZES, mamba_2_modules
from tracekit.architectures.schema import (
    Block,
    Family,
    Lacks,
    Residual,
    Stack,
    given,
    output,
)

_NOT_ADDED = Lacks("only the mixer reads what the shared block gives: use shared_out")
_WIDE = "batch pos 2*model"  # the residual stream, and the embeddings beside it
_HYBRID = Block(
    {
        **mamba_2_modules("mamba_decoder.mamba", "mamba_decoder.input_layernorm"),
        "attn": "shared_transformer.self_attn",
        "q": "shared_transformer.self_attn.q_proj",
        "k": "shared_transformer.self_attn.k_proj",
        "v": "shared_transformer.self_attn.v_proj",
        "o": "shared_transformer.self_attn.o_proj",
        "norm2": "shared_transformer.pre_ff_layernorm",
        "mlp": "shared_transformer.feed_forward",
        "gate_up": "shared_transformer.feed_forward.gate_up_proj",
        "down": "shared_transformer.feed_forward.down_proj",
    },
    residual=Residual.SINGLE,
    activations={
        **MAMBA_2,
        "attn_in": given("attn", shape=_WIDE),
        "mixer_in": given("norm1"),
        "shared_out": output("", inside="linear"),
        "attn_out": _NOT_ADDED,
        "mlp_in": given("norm2"),
        "mlp_out": _NOT_ADDED,
        "mlp_pre": given("mlp", inside="act_fn"),
        "mlp_pre_linear": Lacks("an adapter of the layer is added to it, outside of any module"),
    },
    sizes=MAMBA_2_SIZES,
    when=has("shared_transformer"),
)
_MAMBA = Block(
    mamba_2_modules("mamba", "input_layernorm"),
    residual=Residual.SINGLE,
    activations=MAMBA_2,
    sizes=MAMBA_2_SIZES,
    when=otherwise,
)
FAMILY = Family(
    "zamba2",
    model_types=("zamba2",),
    modules={
        "embed": "model.embed_tokens",
        "final_norm": "model.final_layernorm",
        "unembed": "lm_head",
    },
    stacks={"layers": Stack("model.layers", (_HYBRID, _MAMBA))},
)
