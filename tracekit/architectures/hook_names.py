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
    "embed_out": ("hook_embed", "embed.hook_out"),
    "pos_embed_out": ("hook_pos_embed", "pos_embed.hook_out"),
    "resid_final": ("ln_final.hook_in",),
    "final_norm_scale": ("ln_final.hook_scale",),
    "final_norm_normalized": ("ln_final.hook_normalized",),
    "final_norm_out": ("ln_final.hook_out",),
    "logits": ("unembed.hook_out",),
}
# Behind `blocks.3.`
BLOCK_HOOKS: Final[Mapping[str, tuple[str, ...]]] = {
    "resid_pre": ("hook_resid_pre", "hook_in"),
    "norm1_scale": ("ln1.hook_scale",),
    "norm1_normalized": ("ln1.hook_normalized",),
    "q": ("attn.hook_q", "hook_q", "attn.q.hook_out"),
    "k": ("attn.hook_k", "hook_k", "attn.k.hook_out"),
    "v": ("attn.hook_v", "hook_v", "attn.v.hook_out"),
    "attn_q": ("attn.hook_rot_q",),
    "attn_k": ("attn.hook_rot_k",),
    "scores": ("attn.hook_attn_scores",),
    "pattern": ("attn.hook_pattern",),
    "z": ("attn.hook_z", "hook_z"),
    "head_result": ("attn.hook_result", "hook_result"),
    "attn_out": ("hook_attn_out",),
    "resid_mid": ("hook_resid_mid",),
    "mlp_in": ("hook_mlp_in",),
    "norm2_scale": ("ln2.hook_scale",),
    "norm2_normalized": ("ln2.hook_normalized",),
    "mlp_pre": ("mlp.hook_pre",),
    "mlp_pre_linear": ("mlp.hook_pre_linear",),
    "mlp_post": ("mlp.hook_post",),
    "mlp_out": ("hook_mlp_out",),
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
