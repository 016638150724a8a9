"""The tiny models that listen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers

from tests.matrix.spec import (
    BLOCK,
    HEADS,
    IMAGE_TOKEN,
    INNER,
    LAYERS,
    LLAMA,
    TWO_STACKS,
    WIDTH,
    Inputs,
    Spec,
    from_type,
    ids,
    seeded,
    text_around_placeholders,
)


def listens(
    auto: Any,
    model_type: str,
    layers: tuple[str, ...],
    inputs: Callable[[], Inputs],
    config: dict[str, Any],
    *,
    generate: bool = False,
) -> Spec:
    """An entry for a model that hears samples or a spectrogram."""

    def build(attn: str | None = None, **over: Any) -> tuple[torch.nn.Module, Inputs]:
        return from_type(auto, model_type, attn, **{**config, **over}), inputs()

    return Spec("audio", build, generate, layers, forward_only=("decoder_input_ids",))


def spectrogram(batch: int = 2) -> torch.Tensor:
    """Random features, `(batch, mel bins, frames)`."""
    return torch.randn(batch, 8, 32, generator=seeded())


def spectrogram_and_decoder_text() -> Inputs:
    return {"input_features": spectrogram(), "decoder_input_ids": ids(tokens=4, seed=1)}


def samples() -> Inputs:
    return {"input_values": torch.randn(2, 800, generator=seeded())}


def spectrogram_as_image() -> Inputs:
    return {"input_values": torch.randn(2, 32, 16, generator=seeded())}


def spectrogram_in_text() -> Inputs:
    """32 frames become 16, and are pooled to eight placeholders in one row of text."""
    return text_around_placeholders(
        8,
        input_features=spectrogram(batch=1),
        feature_attention_mask=torch.ones(1, 32, dtype=torch.long),
    )


SPECS = {
    "whisper": listens(
        transformers.AutoModelForSpeechSeq2Seq,
        "whisper",
        ("model.encoder.layers", "model.decoder.layers"),
        spectrogram_and_decoder_text,
        dict(
            TWO_STACKS,
            num_mel_bins=8,
            max_source_positions=16,
            max_target_positions=32,
            decoder_start_token_id=3,
            begin_suppress_tokens=None,
            suppress_tokens=None,
        ),
        generate=True,
    ),
    "wav2vec2": listens(
        transformers.AutoModelForCTC,
        "wav2vec2",
        ("wav2vec2.encoder.layers",),
        samples,
        dict(
            BLOCK,
            vocab_size=32,
            hidden_size=WIDTH,
            num_hidden_layers=LAYERS,
            conv_dim=[16, 16, 16],
            conv_stride=[5, 2, 2],
            conv_kernel=[10, 3, 3],
            num_conv_pos_embeddings=16,
            num_conv_pos_embedding_groups=2,
        ),
    ),
    "ast": listens(
        transformers.AutoModelForAudioClassification,
        "audio-spectrogram-transformer",
        ("audio_spectrogram_transformer.layers",),
        spectrogram_as_image,
        dict(
            BLOCK,
            hidden_size=WIDTH,
            num_hidden_layers=LAYERS,
            patch_size=8,
            frequency_stride=8,
            time_stride=8,
            max_length=32,
            num_mel_bins=16,
        ),
    ),
    "qwen2_audio": listens(
        transformers.Qwen2AudioForConditionalGeneration,
        "qwen2_audio",
        ("model.language_model.layers", "model.audio_tower.layers"),
        spectrogram_in_text,
        dict(
            text_config=dict(LLAMA, model_type="qwen2"),
            audio_token_index=IMAGE_TOKEN,
            audio_config=dict(
                num_mel_bins=8,
                d_model=WIDTH,
                encoder_layers=LAYERS,
                encoder_attention_heads=HEADS,
                encoder_ffn_dim=INNER,
                max_source_positions=16,
            ),
        ),
        generate=True,
    ),
}
