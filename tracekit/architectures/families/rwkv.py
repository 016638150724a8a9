"""RWKV-4: a recurrence, and an MLP whose output is gated; the first layer norms the embeddings."""

# Where the weights are rescaled for inference, a layer in six halves the stream behind itself.

from tracekit.architectures.schema import Block, Family, Lacks, Sharing, Stack, given, output

FAMILY = Family(
    "rwkv",
    model_types=("rwkv",),
    modules={
        "embed": "rwkv.embeddings",
        "embed_norm": "rwkv.blocks.0.pre_ln",
        "final_norm": "rwkv.ln_out",
        "unembed": "head",
    },
    stacks={
        "layers": Stack(
            "rwkv.blocks",
            (
                Block(
                    {
                        "norm1": "ln1",
                        "ssm": "attention",
                        "mixer_gate": "attention.receptance",
                        "out_proj": "attention.output",
                        "norm2": "ln2",
                        "mlp": "feed_forward",
                        "up": "feed_forward.key",
                        "down": "feed_forward.value",
                        "down_gate": "feed_forward.receptance",
                    },
                    activations={
                        "resid_pre": given("norm1", sharing=Sharing.SHARED),
                        "ssm_x": output("ssm", inside="value"),
                        "ssm_b": output("ssm", inside="key"),
                        "ssm_c": Lacks("the whole state is read: ssm_gate says how much of it"),
                        "ssm_gate": output("mixer_gate"),
                        "ssm_scan": Lacks("no module has it: ssm_inner is gated by ssm_gate"),
                        "ssm_in": Lacks("it has three projections: ssm_x, ssm_b and ssm_gate"),
                        "ssm_state": Lacks("the model returns it, of all layers, as `state`"),
                    },
                ),
            ),
        )
    },
)
