"""TransformerLens' names of activations, beside the standard ones."""

# What is not here has no counterpart: its `hook_attn_in` and `hook_q_input` are a copy for each
# head, where `attn_in` is what attention reads.

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

# Of the lists of blocks, each by the standard name of the stack.
STACKS: Final[Mapping[str, str]] = {
    "blocks": "layers",
    "decoder_blocks": "layers",
    "encoder_blocks": "encoder_layers",
}
# Of the whole model, by standard name: all spellings.
ROOT_HOOKS: Final[Mapping[str, tuple[str, ...]]] = {
    "embed_out": ("hook_embed", "embed.hook_out", "decoder_embed.hook_out"),
    "pos_embed_out": ("hook_pos_embed", "pos_embed.hook_out", "decoder_pos_embed.hook_out"),
    "resid_final": ("ln_final.hook_in",),
    "final_norm_scale": ("ln_final.hook_scale",),
    "final_norm_normalized": ("ln_final.hook_normalized",),
    "final_norm_out": ("ln_final.hook_out",),
    "logits": ("unembed.hook_out", "hook_unembed"),
}
# Behind `blocks.3.`
BLOCK_HOOKS: Final[Mapping[str, tuple[str, ...]]] = {
    "resid_pre": ("hook_resid_pre", "hook_in"),
    "norm1_scale": ("ln1.hook_scale",),
    "norm1_normalized": ("ln1.hook_normalized",),
    "q": ("attn.hook_q", "hook_q", "attn.q.hook_out", "self_attn.hook_q", "self_attn.q.hook_out"),
    "k": ("attn.hook_k", "hook_k", "attn.k.hook_out", "self_attn.hook_k", "self_attn.k.hook_out"),
    "v": ("attn.hook_v", "hook_v", "attn.v.hook_out", "self_attn.hook_v", "self_attn.v.hook_out"),
    "attn_q": ("attn.hook_rot_q",),
    "attn_k": ("attn.hook_rot_k",),
    "scores": ("attn.hook_attn_scores", "self_attn.hook_attn_scores"),
    "pattern": ("attn.hook_pattern", "self_attn.hook_pattern"),
    "z": ("attn.hook_z", "hook_z", "self_attn.hook_z"),
    "attn_gate": ("attn.hook_q_gate",),
    "head_result": ("attn.hook_result", "hook_result"),
    "attn_out": ("hook_attn_out",),
    "ssm_in": ("mixer.hook_in_proj", "mixer.in_proj.hook_out", "mamba.hook_in_proj"),
    "ssm_scan": ("mixer.inner_norm.hook_in",),
    "ssm_gate": ("mixer.inner_norm.hook_gate",),
    "ssm_inner": (
        "mixer.out_proj.hook_in",
        "mamba.out_proj.hook_in",
        "time_mix.output.hook_in",
    ),
    "ssm_out": (
        "mixer.hook_ssm_out",
        "mixer.hook_out",
        "hook_mixer_out",
        "mamba.hook_ssm_out",
        "mamba.hook_out",
        "linear_attn.hook_ssm_out",
        "linear_attn.hook_out",
        "hook_time_mix_out",
        "time_mix.hook_out",
    ),
    "conv_out": ("conv.hook_out",),
    "cross_q": ("cross_attn.hook_q", "cross_attn.q.hook_out"),
    "cross_attn_k": ("cross_attn.hook_k", "cross_attn.k.hook_out"),
    "cross_attn_v": ("cross_attn.hook_v", "cross_attn.v.hook_out"),
    "cross_scores": ("cross_attn.hook_attn_scores",),
    "cross_pattern": ("cross_attn.hook_pattern",),
    "cross_z": ("cross_attn.hook_z",),
    "cross_attn_out": ("hook_cross_attn_out",),
    "resid_mid": ("hook_resid_mid", "hook_resid_mid2"),
    "mlp_in": ("hook_mlp_in",),
    "norm2_scale": ("ln2.hook_scale", "ln3.hook_scale"),
    "norm2_normalized": ("ln2.hook_normalized", "ln3.hook_normalized"),
    "mlp_pre": ("mlp.hook_pre", "channel_mix.hook_pre"),
    "mlp_pre_linear": ("mlp.hook_pre_linear",),
    "mlp_post": ("mlp.hook_post", "mlp.out.hook_in", "channel_mix.hook_post"),
    "router_logits": ("mlp.router.hook_out",),
    "router_indices": ("mlp.hook_expert_indices",),
    "shared_expert_out": ("mlp.shared_expert.hook_out", "mlp.shared_experts.hook_out"),
    "mlp_out": ("hook_mlp_out", "hook_channel_mix_out", "channel_mix.hook_out"),
    "resid_post": ("hook_resid_post", "hook_out"),
}
# Its short names, as in cache["post", 3] and cache["scale", 3, "ln1"], by standard name.
SHORT: Final[Mapping[str, str]] = {
    "embed": "embed_out",
    "pos_embed": "pos_embed_out",
    "rot_q": "attn_q",
    "rot_k": "attn_k",
    "attn_scores": "scores",
    "result": "head_result",
    "pre": "mlp_pre",
    "pre_linear": "mlp_pre_linear",
    "post": "mlp_post",
}
# Which module of a block a short name is of, in the last place of a key.
KINDS: Final[Mapping[str, str]] = {
    "ln1": "norm1",
    "ln2": "norm2",
    "ln_final": "final_norm",
    "attn": "",
    "a": "",
    "mlp": "",
    "m": "",
}
