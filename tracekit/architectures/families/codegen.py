"""CodeGen: GPT-J with queries, values and keys in one projection, in four parts of heads."""

from tracekit.architectures.schema import Block, Family, Lacks, Residual, Stack
from tracekit.architectures.shared import OWN_SOFTMAX

_IN_QUARTERS = Lacks(
    "the output of qkv is in four parts, of a quarter of the heads each: their queries, their "
    "values, their keys. No view has all heads: divide the output of qkv, or use scores and z"
)

FAMILY = Family(
    "codegen",
    model_types=("codegen",),
    modules={"embed": "transformer.wte", "final_norm": "transformer.ln_f", "unembed": "lm_head"},
    stacks={
        "layers": Stack(
            "transformer.h",
            (
                Block(
                    {
                        "norm1": "ln_1",
                        "attn": "attn",
                        "qkv": "attn.qkv_proj",
                        "o": "attn.out_proj",
                        "mlp": "mlp",
                        "up": "mlp.fc_in",
                        "down": "mlp.fc_out",
                    },
                    residual=Residual.PARALLEL,
                    activations={
                        **OWN_SOFTMAX,
                        **dict.fromkeys(("q", "k", "v"), _IN_QUARTERS),
                    },
                ),
            ),
        )
    },
)
