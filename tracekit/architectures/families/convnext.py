"""ConvNeXt: no attention; a convolution mixes positions for the MLP, and channels come first."""

from tracekit.architectures.layouts import ChannelsFirst, Grid
from tracekit.architectures.schema import (
    Block,
    Family,
    Lacks,
    Residual,
    Sharing,
    Stack,
    given,
    output,
)
from tracekit.architectures.shared import NO_LOGITS

_BLOCK = Block(
    {"conv": "dwconv", "norm2": "layernorm", "up": "pwconv1", "down": "pwconv2"},
    residual=Residual.SINGLE,
    activations={
        "resid_pre": given("", ChannelsFirst()),
        "mixer_in": given("conv", ChannelsFirst(), Sharing.APART),
        "conv_out": Lacks("the convolution adds nothing: the MLP alone reads it, as mlp_in"),
        "mlp_in": given("norm2", Grid()),
        "mlp_pre": output("up", Grid()),
        "mlp_post": given("down", Grid()),
        "mlp_out": output("", ChannelsFirst(), inside="drop_path"),
        "resid_post": output("", ChannelsFirst()),
    },
)

FAMILY = Family(
    "convnext",
    model_types=("convnext",),
    modules={"patch_embed": "convnext.embeddings.patch_embeddings"},
    stacks={
        "layers": Stack(
            "convnext.encoder.stages.*.layers.*",
            (_BLOCK,),
            between="each stage but the first begins with a norm and a convolution",
        )
    },
    lacks={
        **NO_LOGITS,
        **dict.fromkeys(
            ("resid_final", "final_norm_out"),
            "the last norm is of the mean over all positions: name layers[-1].resid_post",
        ),
    },
)
