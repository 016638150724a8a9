"""RecurrentGemma: a gated linear recurrence (RG-LRU) or attention, then a gated MLP."""

from tracekit.architectures.schema import Block, Family, Lacks, Stack, given, output

_MLP = {
    "norm1": "temporal_pre_norm",
    "norm2": "channel_pre_norm",
    "mlp": "mlp_block",
    "gate": "mlp_block.gate_proj",
    "up": "mlp_block.up_proj",
    "down": "mlp_block.down_proj",
}
_ATTENTION = Block(
    {
        **_MLP,
        "attn": "temporal_block",
        "q": "temporal_block.q_proj",
        "k": "temporal_block.k_proj",
        "v": "temporal_block.v_proj",
        "o": "temporal_block.o_proj",
    }
)
_IN_THE_RECURRENCE = Lacks("it is computed inside the recurrence, from ssm_conv_out")
_RECURRENT = Block(
    {
        **_MLP,
        "ssm": "temporal_block",
        "in_proj": "temporal_block.linear_x",
        "mixer_gate": "temporal_block.linear_y",
        "conv1d": "temporal_block.conv_1d",
        "recurrence": "temporal_block.rg_lru",
        "out_proj": "temporal_block.linear_out",
    },
    activations={
        "ssm_x": output("in_proj"),
        "ssm_gate": output("mixer_gate"),
        "ssm_conv_out": given("recurrence"),
        "ssm_scan": output("recurrence"),  # the state itself, behind each position
        "ssm_in_gate": _IN_THE_RECURRENCE,
        "ssm_forget_gate": _IN_THE_RECURRENCE,
        "ssm_state": Lacks("it is the last position of ssm_scan"),
    },
)
FAMILY = Family(
    "recurrent_gemma",
    model_types=("recurrent_gemma",),
    modules={
        "embed": "model.embed_tokens",
        "final_norm": "model.final_norm",
        "unembed": "lm_head",
    },
    stacks={"layers": Stack("model.layers", (_ATTENTION, _RECURRENT))},
)
