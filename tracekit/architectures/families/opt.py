"""OPT: its MLP stands in the layer itself, and sees rows and positions in one axis."""

from dataclasses import replace

from tracekit.architectures.conditions import otherwise, says
from tracekit.architectures.schema import Block, Family, Residual, Sharing, Stack, given, output

_PRE_NORM = Block(
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
    },
    activations={
        "resid_mid": given("norm2", sharing=Sharing.SHARED, shape="batch*pos model"),
        "mlp_in": given("norm2", sharing=Sharing.APART, shape="batch*pos model"),
        "norm2_scale": output("norm2", inside="norm_scale", shape="batch*pos 1"),
        "norm2_normalized": output("norm2", inside="norm_normalized", shape="batch*pos model"),
        "mlp_pre": output("up", shape="batch*pos neurons"),
        "mlp_post": given("down", shape="batch*pos neurons"),
        "mlp_out": output("down", shape="batch*pos model"),
    },
    when=says(do_layer_norm_before=True),
)
# OPT-350m.
_POST_NORM = replace(
    _PRE_NORM,
    residual=Residual.POST_NORM,
    activations={
        **_PRE_NORM.activations,
        "resid_mid": output("norm1"),
        "mlp_in": given("up", sharing=Sharing.APART, shape="batch*pos model"),
        "norm2_scale": output("norm2", inside="norm_scale"),
        "norm2_normalized": output("norm2", inside="norm_normalized"),
    },
    when=otherwise,
)
FAMILY = Family(
    "opt",
    model_types=("opt",),
    modules={
        "embed": "model.decoder.embed_tokens",
        "pos_embed": "model.decoder.embed_positions",
        "final_norm": "model.decoder.final_layer_norm",
        "unembed": "lm_head",
    },
    stacks={"layers": Stack("model.decoder.layers", (_PRE_NORM, _POST_NORM))},
)
