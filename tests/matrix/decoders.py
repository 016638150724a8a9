"""The tiny models with one stack of blocks and a language model's head."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from tests.matrix.spec import (
    BASE,
    BLOCK,
    GPT2,
    HEADS,
    INNER,
    LLAMA,
    SPECIAL_IDS,
    WIDTH,
    Inputs,
    Spec,
    from_type,
    text,
)

PLAIN = dict(BASE, **SPECIAL_IDS)
FULL = dict(PLAIN, **BLOCK)
SLIDING_THEN_FULL = ["sliding_attention", "full_attention"]
LINEAR_THEN_FULL = ["linear_attention", "full_attention"]
MAMBA2 = dict(mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8, mamba_n_groups=1)


def causal(
    family: str,
    model_type: str,
    layers: str = "model.layers",
    base: dict[str, Any] = LLAMA,
    batch: int = 2,
    **config: Any,
) -> Spec:
    """An entry for AutoModelForCausalLM; `config` overrides `base`."""

    def build(attn: str | None = None, **over: Any) -> tuple[torch.nn.Module, Inputs]:
        auto = transformers.AutoModelForCausalLM
        return from_type(auto, model_type, attn, **{**base, **config, **over}), text(batch)

    return Spec(family, build, generate=True, layers=(layers,))


DENSE = {
    "gpt2": causal("decoder", "gpt2", "transformer.h", GPT2),
    "gptj": causal("decoder", "gptj", "transformer.h", GPT2, rotary_dim=4),
    "gpt_neo": causal(
        "decoder",
        "gpt_neo",
        "transformer.h",
        dict(PLAIN, num_layers=2, num_heads=HEADS, max_position_embeddings=128, window_size=4),
        attention_types=[[["global", "local"], 1]],
    ),
    "gpt_neox": causal("decoder", "gpt_neox", "gpt_neox.layers", FULL, max_position_embeddings=128),
    "opt": causal(
        "decoder",
        "opt",
        "model.decoder.layers",
        dict(PLAIN, num_attention_heads=HEADS, max_position_embeddings=128),
        ffn_dim=INNER,
        word_embed_proj_dim=WIDTH,
    ),
    "bloom": causal("decoder", "bloom", "transformer.h", PLAIN, n_layer=2, n_head=HEADS),
    "falcon": causal(
        "decoder",
        "falcon",
        "transformer.h",
        dict(PLAIN, num_attention_heads=HEADS, max_position_embeddings=128),
    ),
    "llama": causal("decoder", "llama"),
    "mistral": causal("decoder", "mistral", sliding_window=4),
    "qwen2": causal("decoder", "qwen2"),
    "qwen3": causal("decoder", "qwen3", head_dim=8),
    "gemma": causal("decoder", "gemma", head_dim=8),
    "gemma2": causal("decoder", "gemma2", head_dim=8, sliding_window=4, query_pre_attn_scalar=8),
    "gemma3_text": causal(
        "decoder",
        "gemma3_text",
        head_dim=8,
        sliding_window=4,
        query_pre_attn_scalar=8,
        layer_types=SLIDING_THEN_FULL,
    ),
    "phi3": causal("decoder", "phi3"),
    "olmo2": causal("decoder", "olmo2"),
    "cohere2": causal("decoder", "cohere2", sliding_window=4, layer_types=SLIDING_THEN_FULL),
    "smollm3": causal("decoder", "smollm3"),
    "glm4": causal("decoder", "glm4", head_dim=8),
}

EXPERTS = {
    "mixtral": causal("moe", "mixtral", num_local_experts=4, num_experts_per_tok=2),
    "qwen3_moe": causal(
        "moe",
        "qwen3_moe",
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        head_dim=8,
    ),
    "olmoe": causal("moe", "olmoe", num_experts=4, num_experts_per_tok=2, intermediate_size=16),
    "gpt_oss": causal(
        "moe",
        "gpt_oss",
        num_local_experts=4,
        num_experts_per_tok=2,
        head_dim=8,
        sliding_window=4,
        intermediate_size=32,
        layer_types=SLIDING_THEN_FULL,
    ),
    "deepseek_v3": causal(
        "moe",
        "deepseek_v3",
        num_key_value_heads=HEADS,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        moe_intermediate_size=16,
        kv_lora_rank=8,
        q_lora_rank=16,
        qk_rope_head_dim=4,
        qk_nope_head_dim=4,
        v_head_dim=8,
        first_k_dense_replace=1,
    ),
    "llama4_text": causal(
        "moe",
        "llama4_text",
        num_local_experts=4,
        num_experts_per_tok=1,
        head_dim=8,
        intermediate_size=32,
        intermediate_size_mlp=INNER,
        attention_chunk_size=4,
    ),
}

RECURRENT = {
    "granitemoehybrid": causal(
        "hybrid",
        "granitemoehybrid",
        **MAMBA2,
        num_local_experts=2,
        num_experts_per_tok=1,
        shared_intermediate_size=32,
        mamba_expand=2,
        mamba_chunk_size=4,
        layer_types=LINEAR_THEN_FULL,
    ),
    "mamba": causal("ssm", "mamba", "backbone.layers", PLAIN, state_size=4),
    "mamba2": causal(
        "ssm",
        "mamba2",
        "backbone.layers",
        PLAIN,
        state_size=4,
        num_heads=4,
        head_dim=16,
        n_groups=1,
        chunk_size=4,
    ),
    # In transformers 5.23 a decoding step adds (rows, 1, width) to (rows, width): so one row.
    "rwkv": causal("ssm", "rwkv", "rwkv.blocks", PLAIN, batch=1, context_length=64),
    # Its head widths round up to 64, so that 128 is the smallest width with two heads.
    "xlstm": causal(
        "ssm", "xlstm", "backbone.blocks", PLAIN, hidden_size=128, num_heads=2, chunk_size=8
    ),
    "jamba": causal(
        "hybrid",
        "jamba",
        num_hidden_layers=4,
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        num_experts=2,
        num_experts_per_tok=1,
        mamba_d_state=4,
        mamba_dt_rank=4,
        use_mamba_kernels=False,
    ),
    "zamba2": causal(
        "hybrid",
        "zamba2",
        num_hidden_layers=3,
        layers_block_type=["mamba", "hybrid", "mamba"],
        mamba_d_state=4,
        n_mamba_heads=4,
        mamba_expand=2,
        chunk_size=4,
        num_key_value_heads=HEADS,
        use_mamba_kernels=False,
        attention_hidden_size=2 * WIDTH,
    ),
    "bamba": causal(
        "hybrid", "bamba", **MAMBA2, attn_layer_indices=[1], mamba_expand=2, mamba_chunk_size=4
    ),
    "falcon_h1": causal("hybrid", "falcon_h1", **MAMBA2, mamba_d_ssm=64, mamba_chunk_size=4),
    "recurrent_gemma": causal(
        "hybrid",
        "recurrent_gemma",
        base=FULL,
        num_hidden_layers=3,
        num_key_value_heads=1,
        lru_width=WIDTH,
        attention_window_size=8,
        block_types=["recurrent", "recurrent", "attention"],
    ),
    "lfm2": causal("hybrid", "lfm2", layer_types=["conv", "full_attention"], block_multiple_of=8),
    "qwen3_next": causal(
        "hybrid",
        "qwen3_next",
        head_dim=8,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        layer_types=LINEAR_THEN_FULL,
    ),
}

SPECS = {**DENSE, **EXPERTS, **RECURRENT}
