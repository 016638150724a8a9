"""Tiny models that are close to those of the matrix: only their standard names are tested."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import transformers

from tests.matrix.audio import SPECS as AUDIO
from tests.matrix.audio import listens, samples
from tests.matrix.decoder_relatives import XGLM
from tests.matrix.encoders import BART_LAYERS, BERT, ONE_START, T5, encoder, two_stacks
from tests.matrix.spec import (
    BLOCK,
    HEADS,
    IMAGE_TOKEN,
    LLAMA,
    VIT,
    WIDTH,
    Inputs,
    Spec,
    from_type,
    text,
)
from tests.matrix.vision import (
    LANGUAGE_AND_TOWER,
    LANGUAGE_AND_VISUAL,
    QWEN_TEXT,
    QWEN_TOKENS,
    SIGLIP_TOWER,
    TOWER_TEXT,
    idefics3_image_in_text,
    image,
    image_in_text,
    qwen_image_in_text,
    sees,
    tells,
)

STARTS = dict(ONE_START, decoder_start_token_id=1)
DINO = dict(
    hidden_size=WIDTH,
    num_hidden_layers=2,
    num_attention_heads=HEADS,
    image_size=16,
    patch_size=8,
    mlp_ratio=2,
    layerscale_value=0.5,
)
MOBILE = dict(embedding_size=8, intra_bottleneck_size=16, num_feedforward_networks=3)
T5_LAYERS = ("encoder.block", "decoder.block")
WAV2VEC2 = dict(
    BLOCK,
    vocab_size=32,
    hidden_size=WIDTH,
    num_hidden_layers=2,
    conv_dim=[16, 16, 16],
    conv_stride=[5, 2, 2],
    conv_kernel=[10, 3, 3],
    num_conv_pos_embeddings=16,
    num_conv_pos_embedding_groups=2,
)


def over(spec: Spec, **config: Any) -> Spec:
    """A model of the matrix with other sizes or switches."""

    def build(attn: str | None = None, **more: Any) -> tuple[torch.nn.Module, Inputs]:
        return spec.build(attn=attn, **{**config, **more})

    return replace(spec, build=build)


def attends_to_an_encoder(
    model_type: str, layers: str, config: dict[str, Any], **switches: Any
) -> Spec:
    """A decoder with cross-attention, and random states of an encoder for it to read."""

    def build(attn: str | None = None, **more: Any) -> tuple[torch.nn.Module, Inputs]:
        sizes = dict(config, add_cross_attention=True, **switches, **more)
        model = from_type(transformers.AutoModelForCausalLM, model_type, attn, **sizes)
        states = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(0))
        return model, {**text(), "encoder_hidden_states": states}

    return Spec("encoder", build, layers=(layers,))


def tower(model_type: str, **config: Any) -> Spec:
    return sees(transformers.AutoModel, model_type, ("encoder.layers",), image, dict(VIT, **config))


SPECS = {
    "camembert": encoder("camembert", "roberta.encoder.layer", pad_token_id=1),
    "xlm-roberta": encoder("xlm-roberta", "roberta.encoder.layer", pad_token_id=1),
    "bert_decoder": attends_to_an_encoder("bert", "bert.encoder.layer", BERT, is_decoder=True),
    "xglm_crossing": attends_to_an_encoder("xglm", "model.layers", XGLM),
    "electra_narrow": encoder("electra", "electra.encoder.layer", embedding_size=16),
    "mobilebert": encoder("mobilebert", "mobilebert.encoder.layer", **MOBILE),
    "albert_groups": encoder(
        "albert",
        "albert.encoder.albert_layer_groups",
        embedding_size=16,
        num_hidden_layers=4,
        num_hidden_groups=2,
        inner_group_num=2,
    ),
    "deberta": encoder(
        "deberta",
        "deberta.encoder.layer",
        relative_attention=True,
        pos_att_type=["p2c", "c2p"],
        max_relative_positions=16,
    ),
    "deberta-v2_conv": encoder(
        "deberta-v2",
        "deberta.encoder.layer",
        relative_attention=True,
        pos_att_type=["p2c", "c2p"],
        position_buckets=8,
        conv_kernel_size=3,
    ),
    "mt5": two_stacks("mt5", T5_LAYERS, T5),
    "umt5": two_stacks("umt5", T5_LAYERS, T5),
    "mbart": two_stacks("mbart", BART_LAYERS, STARTS),
    "pegasus": two_stacks("pegasus", BART_LAYERS, STARTS),
    "m2m_100": two_stacks("m2m_100", BART_LAYERS, STARTS),
    "plbart": two_stacks("plbart", BART_LAYERS, STARTS),
    "blenderbot": two_stacks("blenderbot", BART_LAYERS, STARTS),
    "blenderbot-small": two_stacks("blenderbot-small", BART_LAYERS, STARTS),
    "deit": sees(transformers.DeiTForImageClassification, "deit", ("deit.layers",), image, VIT),
    "dinov2_with_registers": sees(
        transformers.AutoModel, "dinov2_with_registers", ("encoder.layer",), image, DINO
    ),
    "dinov2_gated": sees(
        transformers.AutoModel, "dinov2", ("encoder.layer",), image, dict(DINO, use_swiglu_ffn=True)
    ),
    "clip_vision": tower("clip_vision_model", projection_dim=WIDTH),
    "siglip_vision": tower("siglip_vision_model", vision_use_head=False),
    "clip_text": sees(
        transformers.AutoModel,
        "clip_text_model",
        ("encoder.layers",),
        text,
        dict(TOWER_TEXT, projection_dim=WIDTH),
    ),
    "llava_qwen2": tells(
        "llava",
        LANGUAGE_AND_TOWER,
        image_in_text,
        dict(
            vision_config=SIGLIP_TOWER,
            text_config=dict(LLAMA, model_type="qwen2"),
            image_token_index=IMAGE_TOKEN,
            image_seq_length=4,
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
        ),
    ),
    "smolvlm": tells(
        "smolvlm",
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
    "qwen2_vl": tells(
        "qwen2_vl",
        LANGUAGE_AND_VISUAL,
        qwen_image_in_text,
        dict(
            QWEN_TOKENS,
            text_config=QWEN_TEXT,
            vision_config=dict(
                depth=2,
                embed_dim=WIDTH,
                hidden_size=WIDTH,
                num_heads=HEADS,
                mlp_ratio=2,
                patch_size=4,
                spatial_merge_size=2,
                temporal_patch_size=2,
            ),
        ),
    ),
    "wav2vec2_stable": over(
        AUDIO["wav2vec2"], do_stable_layer_norm=True, feat_extract_norm="layer"
    ),
    "hubert": listens(
        transformers.AutoModelForCTC, "hubert", ("hubert.encoder.layers",), samples, WAV2VEC2
    ),
}
