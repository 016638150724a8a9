"""xLSTM: layers of a matrix memory with three gates, and a gated MLP."""

from tracekit.architectures.layouts import HeadsFirst
from tracekit.architectures.schema import Block, Family, Lacks, Stack, output

FAMILY = Family(
    "xlstm",
    model_types=("xlstm",),
    modules={
        "embed": "backbone.embeddings",
        "final_norm": "backbone.out_norm",
        "unembed": "lm_head",
    },
    stacks={
        "layers": Stack(
            "backbone.blocks",
            (
                Block(
                    {
                        "norm1": "norm_mlstm",
                        "ssm": "mlstm_layer",
                        "mixer_gate": "mlstm_layer.ogate_preact",
                        "recurrence": "mlstm_layer.mlstm_backend",
                        "gate_norm": "mlstm_layer.multihead_norm",
                        "out_proj": "mlstm_layer.out_proj",
                        "norm2": "norm_ffn",
                        "mlp": "ffn",
                        "gate": "ffn.proj_up_gate",
                        "up": "ffn.proj_up",
                        "down": "ffn.proj_down",
                    },
                    activations={
                        "ssm_in": Lacks("it has a projection for each of ssm_x, ssm_b and ssm_c"),
                        "ssm_x": output("ssm", inside="v"),
                        "ssm_b": output("ssm", inside="k"),
                        "ssm_c": output("ssm", inside="q"),
                        "ssm_gate": output("mixer_gate"),
                        "ssm_in_gate": output("ssm", inside="igate_preact"),
                        "ssm_forget_gate": output("ssm", inside="fgate_preact"),
                        "ssm_scan": output(
                            "recurrence", HeadsFirst(), key=0, shape="batch pos heads value"
                        ),
                        "ssm_state": output("recurrence", key=1),
                    },
                ),
            ),
        )
    },
)
