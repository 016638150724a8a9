"""GPT-J: attention and MLP read one norm, and are added in one sum."""

from tracekit.architectures.schema import Block, Family, Residual, Stack
from tracekit.architectures.shared import OWN_SOFTMAX

FAMILY = Family(
    "gptj",
    model_types=("gptj",),
    modules={"embed": "transformer.wte", "final_norm": "transformer.ln_f", "unembed": "lm_head"},
    stacks={
        "layers": Stack(
            "transformer.h",
            (
                Block(
                    {
                        "norm1": "ln_1",
                        "attn": "attn",
                        "q": "attn.q_proj",
                        "k": "attn.k_proj",
                        "v": "attn.v_proj",
                        "o": "attn.out_proj",
                        "mlp": "mlp",
                        "up": "mlp.fc_in",
                        "down": "mlp.fc_out",
                    },
                    residual=Residual.PARALLEL,
                    activations=OWN_SOFTMAX,
                ),
            ),
        )
    },
)
