"""The standard names: what each means, and the shape of its tensor."""

# Shapes are written by axis. "batch" is rows; "pos" positions of the forward that runs (the
# new ones, in a cached step of a generation), "key" all that are attended to; "model" the width
# of the residual stream. Where a family folds rows and positions into one axis, it is "batch*pos".

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class Word:
    """What a standard name means; `shape` is empty for modules."""

    meaning: str
    shape: str = ""


# Of the whole model.
ROOT_MODULES: Final = {
    "embed": Word("token embedding"),
    "pos_embed": Word("embedding of absolute positions, where it is a module"),
    "embed_norm": Word("norm of the embeddings, before the first layer"),
    "layers": Word("the blocks of the main stack: the decoder's, where there are two"),
    "final_norm": Word("norm behind the last layer"),
    "unembed_head": Word("what the residual stream goes through between final norm and unembed"),
    "unembed": Word("linear map of the residual stream to logits"),
    "encoder": Word("what the decoder attends to the output of"),
    "encoder_layers": Word("the blocks of the encoder, beside a decoder"),
    "encoder_norm": Word("norm behind the encoder's last layer"),
    "vision_tower": Word("what reads images"),
    "patch_embed": Word("embedding of the patches of an image"),
    "vision_embed_norm": Word("norm of the embedded patches, before the first layer"),
    "vision_layers": Word("the blocks of the vision tower"),
    "vision_norm": Word("norm behind the vision tower's last layer"),
    "qformer_layers": Word("the blocks that read an image into a fixed number of queries"),
    "projector": Word("maps image (or audio) features into the residual stream of the text"),
    "audio_tower": Word("what reads sounds"),
    "audio_layers": Word("the blocks of the audio tower"),
    "audio_norm": Word("norm behind the audio tower's last layer"),
    "text_layers": Word("the blocks of the text tower, beside a vision tower of equal rank"),
    "text_norm": Word("norm behind the text tower's last layer"),
}
# Of a block. Those of the second group are also names in the module that holds them: attn.q.
BLOCK_MODULES: Final = {
    "norm1": Word("norm in front of attention or mixer; in post-norm families, behind it"),
    "attn": Word("self-attention, with its projections"),
    "norm1_post": Word("norm of what attention adds to the residual stream"),
    "attn_scale": Word("scale of what attention adds, feature by feature (layer scale)"),
    "ssm": Word("state-space or other recurrent mixer, with its projections"),
    "conv": Word("gated short convolution that mixes positions"),
    "cross_norm": Word("norm in front of cross-attention; in post-norm families, behind it"),
    "cross_attn": Word("attention to the encoder"),
    "norm2": Word("norm in front of the MLP; in post-norm families, behind it"),
    "mlp": Word("the MLP, or the whole mixture of experts"),
    "norm2_post": Word("norm of what the MLP adds to the residual stream"),
    "mlp_scale": Word("scale of what the MLP adds, feature by feature (layer scale)"),
    "cross_norm_post": Word("norm of what cross-attention adds to the residual stream"),
}
PART_MODULES: Final = {
    "attn_core": Word("the module whose forward calls the attention function"),
    "q": Word("query projection"),
    "k": Word("key projection"),
    "v": Word("value projection"),
    "qkv": Word("query, key and value projections in one"),
    "rel_pos": Word("embedding of relative positions, which is added to the scores"),
    "q_norm": Word("norm of queries"),
    "k_norm": Word("norm of keys"),
    "q_down": Word("projection to a compressed query (multi-head latent attention)"),
    "q_down_norm": Word("norm of the compressed query"),
    "kv_down": Word(
        "projection to the compressed keys and values, and the rotary part of the keys"
    ),
    "kv_down_norm": Word("norm of the compressed keys and values"),
    "kv_up": Word("projection of the compressed keys and values to those of all heads"),
    "o": Word("output projection of attention"),
    "gate": Word("gate projection of a gated MLP"),
    "up": Word("projection into the MLP"),
    "gate_up": Word("gate and up projections in one"),
    "down": Word("projection out of the MLP"),
    "down_gate": Word("projection to what gates the MLP's output"),
    "router": Word("chooses experts"),
    "experts": Word("the experts, fused"),
    "shared_expert": Word("the MLP that sees all tokens, beside the experts"),
    "shared_expert_gate": Word("says how much of the shared expert counts"),
    "in_proj": Word("input projection of a mixer"),
    "conv1d": Word("convolution inside a mixer"),
    "in_proj_gates": Word("projection of a mixer to its gates, beside `in_proj`"),
    "mixer_gate": Word("projection to what gates a mixer's output, where it is one of its own"),
    "recurrence": Word("the recurrence of a mixer, where it is a module"),
    "x_proj": Word("projection to a state-space model's step, B and C"),
    "dt_proj": Word("projection to a state-space model's step"),
    "gate_norm": Word("gated norm inside a mixer"),
    "out_proj": Word("output projection of a mixer"),
    "cross_core": Word("the module whose forward calls the cross-attention function"),
    "cross_q": Word("query projection of cross-attention"),
    "cross_k": Word("key projection of cross-attention"),
    "cross_v": Word("value projection of cross-attention"),
    "cross_o": Word("output projection of cross-attention"),
}
_RESIDUAL: Final = "batch pos model"
_INNER: Final = "batch pos inner"
_HEADS: Final = "batch pos heads head_dim"
_KEYS: Final = "batch key kv_heads head_dim"
_SOURCE: Final = "batch source heads head_dim"
# Of the whole model.
ROOT_ACTIVATIONS: Final = {
    "embed_out": Word("token embeddings, as the module gives them", _RESIDUAL),
    "pos_embed_out": Word("embeddings of positions, as the module gives them", "1|batch pos model"),
    "resid_final": Word("residual stream behind the last layer", _RESIDUAL),
    "final_norm_scale": Word("what the final norm divides by", "batch pos 1"),
    "final_norm_normalized": Word("divided by it, before weight and bias", _RESIDUAL),
    "final_norm_out": Word("residual stream, normed", _RESIDUAL),
    "logits": Word(
        "what the unembedding gives, before a scale or cap of the model", "batch pos vocabulary"
    ),
    "encoder_out": Word("what cross-attention reads, in every layer", "batch source model"),
    "image_features": Word("images, as the text model is given them", "images*patches model"),
    "audio_features": Word("sounds, projected for the text model", "sounds*frames model"),
}
# Of a block.
BLOCK_ACTIVATIONS: Final = {
    "resid_pre": Word("residual stream in front of the block", _RESIDUAL),
    "attn_in": Word(
        "what attention reads, in front of its norm if that is its own; a write is for it alone",
        _RESIDUAL,
    ),
    "mixer_in": Word("what a recurrent mixer or convolution reads, as attn_in", _RESIDUAL),
    "shared_out": Word("what a block that layers share gives the mixer to read", _RESIDUAL),
    "norm1_scale": Word("what norm1 divides by", "batch pos 1"),
    "norm1_normalized": Word("divided by it, before weight and bias", _RESIDUAL),
    "q": Word("queries as projected, before norms and rotary embedding", _HEADS),
    "k": Word("keys as projected", "batch pos kv_heads head_dim"),
    "v": Word("values as projected", "batch pos kv_heads head_dim"),
    "attn_q": Word("queries as the scores use them, after norms and rotary embedding", _HEADS),
    "attn_k": Word("keys as the scores use them, all", _KEYS),
    "attn_v": Word(
        "values as the pattern weighs them",
        _KEYS,
    ),
    "scores": Word("scaled, capped, biased, masked", "batch heads pos key"),
    "pattern": Word("what comes out of the softmax, before any dropout", "batch heads pos key"),
    "z": Word("values, weighed: what `o` is given, or is gated before", _HEADS),
    "attn_gate": Word("what gates z, before its sigmoid", _HEADS),
    "z_gated": Word("z, gated: what `o` is given where attention has a gate", _HEADS),
    "head_result": Word("what each head adds to what `o` gives", "batch pos heads model"),
    "attn_out": Word("what attention adds to the residual stream, before a scale", _RESIDUAL),
    "ssm_out": Word("what a recurrent mixer adds to the residual stream", _RESIDUAL),
    "conv_out": Word("what a short convolution adds to the residual stream", _RESIDUAL),
    "resid_cross": Word("residual stream in front of cross-attention", _RESIDUAL),
    "cross_q": Word("queries of cross-attention, as projected", _HEADS),
    "cross_attn_q": Word("its queries, as the scores use them", _HEADS),
    "cross_attn_k": Word("its keys, as the scores use them", _SOURCE),
    "cross_attn_v": Word("its values", _SOURCE),
    "cross_scores": Word("what goes into its softmax", "batch heads pos source"),
    "cross_pattern": Word("what comes out of its softmax", "batch heads pos source"),
    "cross_z": Word("its values, weighed", _HEADS),
    "cross_attn_out": Word("what cross-attention adds to the residual stream", _RESIDUAL),
    "resid_mid": Word("residual stream between attention (or mixer) and MLP", _RESIDUAL),
    "mlp_in": Word("what the MLP reads; a write is for it alone", _RESIDUAL),
    "norm2_scale": Word("what norm2 divides by", "batch pos 1"),
    "norm2_normalized": Word("divided by it, before weight and bias", _RESIDUAL),
    "mlp_pre": Word("neurons before their nonlinearity", "batch pos neurons"),
    "mlp_pre_linear": Word("what a gate is multiplied with", "batch pos neurons"),
    "mlp_post": Word("neurons: what the down projection is given", "batch pos neurons"),
    "mlp_gate": Word("what gates the MLP's output, before its sigmoid", _RESIDUAL),
    "router_logits": Word("scores of experts, as the router computes them", "batch*pos experts"),
    "router_weights": Word("weights of the chosen experts", "batch*pos chosen"),
    "router_indices": Word("which experts were chosen", "batch*pos chosen"),
    "experts_out": Word("what the experts add up to", "batch*pos model"),
    "shared_expert_out": Word("what the shared expert gives", _RESIDUAL),
    "mlp_out": Word("what the MLP adds to the residual stream, before a scale", _RESIDUAL),
    "resid_post": Word("residual stream behind the block", _RESIDUAL),
    "ssm_in": Word("what a mixer's input projection gives", "batch pos projected"),
    "ssm_x": Word("what is written into the state, as projected: a value", _INNER),
    "ssm_b": Word("where it is written, as projected: Mamba's B, a key", "batch pos state"),
    "ssm_c": Word("where the state is read, as projected: Mamba's C, a query", "batch pos state"),
    "ssm_dt": Word("the time step, as projected, before its bias and softplus", "batch pos step"),
    "ssm_gate": Word("what gates a mixer's output, before its nonlinearity", _INNER),
    "ssm_in_gate": Word("how much is written, before its nonlinearity", "batch pos heads"),
    "ssm_forget_gate": Word("how much is kept, before its nonlinearity", "batch pos heads"),
    "ssm_conv_out": Word("what the convolution in a mixer gives", _INNER),
    "ssm_scan": Word("what the recurrence gives at each position, before gate and norm", _INNER),
    "ssm_state": Word("the state behind the last position", "batch heads key value"),
    "ssm_inner": Word("what a mixer's output projection is given", _INNER),
}
# Weights, of the whole model and of a block; x @ W + b, from the left. Of the whole model those of
# a block are stacked, with "layers" in front.
ROOT_WEIGHTS: Final = {
    "W_E": Word("token embeddings, as the module gives them", "vocabulary model"),
    "W_pos": Word("learned embeddings of positions, from position 0 on", "positions model"),
    "W_U": Word("unembedding", "model vocabulary"),
    "b_U": Word("bias of the unembedding", "vocabulary"),
}
BLOCK_WEIGHTS: Final = {
    "W_Q": Word("query weights: q is x @ W_Q + b_Q", "heads model head_dim"),
    "W_K": Word("key weights", "kv_heads model head_dim"),
    "W_V": Word("value weights", "kv_heads model head_dim"),
    "W_O": Word("output weights of attention: head_result is z @ W_O", "heads head_dim model"),
    "b_Q": Word("query biases", "heads head_dim"),
    "b_K": Word("key biases", "kv_heads head_dim"),
    "b_V": Word("value biases", "kv_heads head_dim"),
    "b_O": Word("bias of attention's output", "model"),
    "W_in": Word("weights into the MLP; in a gated one, of what the gate meets", "model neurons"),
    "W_gate": Word("weights of an MLP's gate, whose nonlinearity comes next", "model neurons"),
    "W_out": Word("weights out of the MLP", "neurons model"),
    "b_in": Word("biases into the MLP", "neurons"),
    "b_gate": Word("biases of an MLP's gate", "neurons"),
    "b_out": Word("bias of the MLP's output", "model"),
    "QK": Word("W_Q @ W_K.mT, factored; keys repeated for the heads", "heads model model"),
    "OV": Word("W_V @ W_O, factored; values repeated for the heads", "heads model model"),
}

ACTIVATIONS: Final = frozenset({*ROOT_ACTIVATIONS, *BLOCK_ACTIVATIONS})
