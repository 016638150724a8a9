"""The tiny models that see: images alone, and images among text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers

from tests.matrix.spec import (
    BASE,
    BLOCK,
    HEADS,
    IMAGE_TOKEN,
    INNER,
    LAYERS,
    LLAMA,
    SPECIAL_IDS,
    VIT,
    WIDTH,
    Inputs,
    Spec,
    from_type,
    ids,
    pixels,
    seeded,
    text_around_placeholders,
)

AutoClass = Any


def sees(
    auto: AutoClass,
    model_type: str,
    layers: tuple[str, ...],
    inputs: Callable[[], Inputs],
    config: dict[str, Any],
) -> Spec:
    """An entry for a model that turns images into classes or vectors."""

    def build(attn: str | None = None, **over: Any) -> tuple[torch.nn.Module, Inputs]:
        return from_type(auto, model_type, attn, **{**config, **over}), inputs()

    return Spec("vision", build, layers=layers)


def tells(
    model_type: str,
    layers: tuple[str, ...],
    inputs: Callable[[], Inputs],
    config: dict[str, Any],
    zeros: str = "",
) -> Spec:
    """An entry for AutoModelForImageTextToText; `zeros` is a parameter that begins with zeros."""

    def build(attn: str | None = None, **over: Any) -> tuple[torch.nn.Module, Inputs]:
        auto = transformers.AutoModelForImageTextToText
        model = from_type(auto, model_type, attn, **{**config, **over})
        if zeros:  # through which no image would be seen
            torch.nn.init.normal_(model.get_parameter(zeros))
        return model, inputs()

    return Spec("vlm", build, generate=True, layers=layers)


def image() -> Inputs:
    return {"pixel_values": pixels()}


def large_image() -> Inputs:
    return {"pixel_values": pixels(32)}


def image_and_text() -> Inputs:
    return {"input_ids": ids(), "pixel_values": pixels()}


def image_and_ended_text() -> Inputs:
    """CLIP takes its text vector at the end-of-text token."""
    inputs = image_and_text()
    inputs["input_ids"][:, -1] = SPECIAL_IDS["eos_token_id"]
    return inputs


def image_in_text() -> Inputs:
    """One image, as four placeholders in one row of text."""
    return text_around_placeholders(4, pixel_values=pixels(batch=1))


def gemma3_image_in_text() -> Inputs:
    inputs = image_in_text()
    return {**inputs, "token_type_ids": (inputs["input_ids"] == IMAGE_TOKEN).long()}


def paligemma_image_in_text() -> Inputs:
    """Without token types its sdpa attention is bidirectional and its eager one causal."""
    inputs = image_in_text()
    return {**inputs, "token_type_ids": torch.zeros_like(inputs["input_ids"])}


def idefics3_image_in_text() -> Inputs:
    """With an axis for several images in a row."""
    return text_around_placeholders(4, pixel_values=pixels(batch=1)[:, None])


def qwen_image_in_text() -> Inputs:
    """4 × 4 patches, merged to four tokens between the start and the end of an image."""
    words = ids(batch=1, tokens=4)
    start, end = torch.tensor([[7]]), torch.tensor([[8]])
    placeholders = torch.full((1, 4), IMAGE_TOKEN)
    row = torch.cat([words[:, :1], start, placeholders, end, words[:, 1:]], 1)
    return {
        "input_ids": row,
        "attention_mask": torch.ones_like(row),
        "mm_token_type_ids": (row == IMAGE_TOKEN).int(),
        "pixel_values": torch.randn(16, 3 * 2 * 4 * 4, generator=seeded()),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),  # time, height, width, in patches
    }


TWO_TOWERS = ("text_model.encoder.layers", "vision_model.encoder.layers")
LANGUAGE_AND_TOWER = ("model.language_model.layers", "model.vision_tower.encoder.layers")
LANGUAGE_AND_VISUAL = ("model.language_model.layers", "model.visual.blocks")

TOWER_TEXT = dict(BASE, **BLOCK, max_position_embeddings=32, **SPECIAL_IDS)
SIGLIP_TOWER = dict(VIT, model_type="siglip_vision_model", vision_use_head=False)
QWEN_VISION = dict(
    depth=LAYERS,
    hidden_size=WIDTH,
    intermediate_size=INNER,
    num_heads=HEADS,
    patch_size=4,
    spatial_merge_size=2,
    temporal_patch_size=2,
    out_hidden_size=WIDTH,
)
QWEN_TEXT = dict(
    LLAMA,
    rope_parameters=dict(rope_type="default", rope_theta=10000.0, mrope_section=[1, 1, 2]),
)
QWEN_TOKENS = dict(
    image_token_id=IMAGE_TOKEN, video_token_id=6, vision_start_token_id=7, vision_end_token_id=8
)
OPT_TEXT = dict(
    TOWER_TEXT,
    model_type="opt",
    ffn_dim=INNER,
    max_position_embeddings=64,
    word_embed_proj_dim=WIDTH,
)

SEEING = {
    "vit": sees(transformers.AutoModelForImageClassification, "vit", ("vit.layers",), image, VIT),
    "dinov2": sees(
        transformers.AutoModel,
        "dinov2",
        ("encoder.layer",),
        image,
        dict(
            hidden_size=WIDTH,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            image_size=16,
            patch_size=8,
            mlp_ratio=2,
            layerscale_value=0.5,
        ),
    ),
    "clip": sees(
        transformers.AutoModel,
        "clip",
        TWO_TOWERS,
        image_and_ended_text,
        dict(text_config=TOWER_TEXT, vision_config=VIT, projection_dim=WIDTH),
    ),
    "siglip": sees(
        transformers.AutoModel,
        "siglip",
        TWO_TOWERS,
        image_and_text,
        dict(text_config=TOWER_TEXT, vision_config=VIT),
    ),
    "convnext": sees(
        transformers.AutoModelForImageClassification,
        "convnext",
        ("convnext.encoder.stages",),
        large_image,
        dict(hidden_sizes=[8, 16, 16, 16], depths=[1, 2, 1, 1], layer_scale_init_value=0.5),
    ),
    "swin": sees(
        transformers.AutoModelForImageClassification,
        "swin",
        ("swin.encoder.layers",),
        image,
        dict(
            image_size=16, patch_size=2, embed_dim=8, depths=[1, 2], num_heads=[2, 4], window_size=2
        ),
    ),
}

TELLING = {
    "llava": tells(
        "llava",
        LANGUAGE_AND_TOWER,
        image_in_text,
        dict(
            vision_config=dict(VIT, model_type="clip_vision_model", projection_dim=WIDTH),
            text_config=dict(LLAMA, model_type="llama"),
            image_token_index=IMAGE_TOKEN,
            image_seq_length=4,
            vision_feature_layer=-1,
        ),
    ),
    "qwen2_5_vl": tells(
        "qwen2_5_vl",
        LANGUAGE_AND_VISUAL,
        qwen_image_in_text,
        dict(
            QWEN_TOKENS,
            text_config=QWEN_TEXT,
            vision_config=dict(QWEN_VISION, window_size=16, fullatt_block_indexes=[1]),
        ),
    ),
    "qwen3_vl": tells(
        "qwen3_vl",
        LANGUAGE_AND_VISUAL,
        qwen_image_in_text,
        dict(
            QWEN_TOKENS,
            text_config=dict(QWEN_TEXT, head_dim=8),
            vision_config=dict(
                QWEN_VISION, num_position_embeddings=16, deepstack_visual_indexes=[0]
            ),
        ),
    ),
    "gemma3": tells(
        "gemma3",
        LANGUAGE_AND_TOWER,
        gemma3_image_in_text,
        dict(
            text_config=dict(
                LLAMA,
                head_dim=8,
                sliding_window=8,
                query_pre_attn_scalar=8,
                layer_types=["sliding_attention", "full_attention"],
            ),
            vision_config=SIGLIP_TOWER,
            mm_tokens_per_image=4,
            image_token_index=IMAGE_TOKEN,
            boi_token_index=6,
            eoi_token_index=7,
        ),
        zeros="model.multi_modal_projector.mm_input_projection_weight",
    ),
    "paligemma": tells(
        "paligemma",
        LANGUAGE_AND_TOWER,
        paligemma_image_in_text,
        dict(
            text_config=dict(LLAMA, model_type="gemma", head_dim=8),
            vision_config=SIGLIP_TOWER,
            image_token_index=IMAGE_TOKEN,
            projection_dim=WIDTH,
        ),
    ),
    "idefics3": tells(
        "idefics3",
        ("model.text_model.layers", "model.vision_model.encoder.layers"),
        idefics3_image_in_text,
        dict(
            text_config=dict(LLAMA, model_type="llama"),
            vision_config=VIT,
            image_token_id=IMAGE_TOKEN,
            scale_factor=1,
            pad_token_id=0,
        ),
    ),
    "blip_2": tells(
        "blip-2",
        (
            "language_model.model.decoder.layers",
            "vision_model.encoder.layers",
            "qformer.encoder.layer",
        ),
        image_in_text,
        dict(
            vision_config=dict(VIT, initializer_range=0.02),
            num_query_tokens=4,
            image_token_index=IMAGE_TOKEN,
            qformer_config=dict(BASE, **BLOCK, encoder_hidden_size=WIDTH),
            text_config=OPT_TEXT,
        ),
        zeros="query_tokens",
    ),
}

SPECS = {**SEEING, **TELLING}
