"""Tiny models of families close to those of the matrix, for the proof of their standard names."""

from __future__ import annotations

from tests.matrix.decoders import FULL, PLAIN, causal
from tests.matrix.spec import GPT2, HEADS, INNER, WIDTH

XGLM = dict(PLAIN, num_attention_heads=HEADS, max_position_embeddings=128, ffn_dim=INNER)
PHI = dict(FULL, num_key_value_heads=2, max_position_embeddings=128)

SPECS = {
    "phi": causal("decoder", "phi", base=PHI),
    "stablelm": causal("decoder", "stablelm"),
    "starcoder2": causal("decoder", "starcoder2"),
    "granite": causal("decoder", "granite", residual_multiplier=0.5),
    "cohere": causal("decoder", "cohere", use_qk_norm=True),
    "olmo": causal("decoder", "olmo"),
    "olmo3": causal("decoder", "olmo3", sliding_window=4),
    "nemotron": causal("decoder", "nemotron"),
    "arcee": causal("decoder", "arcee"),
    "helium": causal("decoder", "helium", head_dim=8),
    "seed_oss": causal("decoder", "seed_oss", head_dim=8),
    "ministral": causal("decoder", "ministral", head_dim=8, sliding_window=4),
    "ernie4_5": causal("decoder", "ernie4_5", head_dim=8),
    "exaone4": causal("decoder", "exaone4", sliding_window=4),
    "glm": causal("decoder", "glm", head_dim=8),
    "hunyuan_v1_dense": causal("decoder", "hunyuan_v1_dense", head_dim=8),
    "apertus": causal("decoder", "apertus"),
    "persimmon": causal("decoder", "persimmon", base=dict(FULL, max_position_embeddings=128)),
    "gpt_bigcode": causal(
        "decoder",
        "gpt_bigcode",
        "transformer.h",
        dict(PLAIN, n_embd=WIDTH, n_layer=2, n_head=HEADS, n_positions=128),
    ),
    # Eight heads: with four, the four parts of its projection would be one head each.
    "codegen": causal("decoder", "codegen", "transformer.h", GPT2, n_head=8, rotary_dim=2),
    "mpt": causal(
        "decoder",
        "mpt",
        "transformer.blocks",
        dict(PLAIN, d_model=WIDTH, n_layers=2, n_heads=HEADS, max_seq_len=128),
    ),
    "biogpt": causal("decoder", "biogpt", "biogpt.layers", dict(FULL, max_position_embeddings=128)),
    "xglm": causal("decoder", "xglm", base=XGLM),
    "qwen2_moe": causal(
        "moe",
        "qwen2_moe",
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
    ),
    "granitemoe": causal(
        "moe",
        "granitemoe",
        num_local_experts=4,
        num_experts_per_tok=2,
        residual_multiplier=0.5,
    ),
    "falcon_mamba": causal("ssm", "falcon_mamba", "backbone.layers", PLAIN, state_size=4),
}
