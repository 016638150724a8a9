"""The tiny models that read text with an encoder: with a decoder behind it, and alone."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from tests.matrix.spec import (
    BASE,
    BLOCK,
    HEADS,
    INNER,
    LAYERS,
    LLAMA,
    TWO_STACKS,
    VOCABULARY,
    WIDTH,
    Inputs,
    Spec,
    from_type,
    text,
    text_and_decoder_text,
)

BERT = dict(BASE, **BLOCK, max_position_embeddings=64, pad_token_id=0)
BART_LAYERS = ("model.encoder.layers", "model.decoder.layers")


def two_stacks(model_type: str, layers: tuple[str, ...], config: dict[str, Any]) -> Spec:
    """An entry for AutoModelForSeq2SeqLM."""

    def build(attn: str | None = None, **over: Any) -> tuple[torch.nn.Module, Inputs]:
        auto = transformers.AutoModelForSeq2SeqLM
        return from_type(auto, model_type, attn, **{**config, **over}), text_and_decoder_text()

    return Spec("encdec", build, True, layers, forward_only=("decoder_input_ids",))


def encoder(model_type: str, layers: str, base: dict[str, Any] = BERT, **config: Any) -> Spec:
    """An entry for AutoModelForMaskedLM; `config` overrides `base`."""

    def build(attn: str | None = None, **over: Any) -> tuple[torch.nn.Module, Inputs]:
        auto = transformers.AutoModelForMaskedLM
        return from_type(auto, model_type, attn, **{**base, **config, **over}), text()

    return Spec("encoder", build, layers=(layers,))


T5 = dict(
    vocab_size=VOCABULARY,
    d_model=WIDTH,
    d_kv=8,
    d_ff=INNER,
    num_layers=LAYERS,
    num_heads=HEADS,
    decoder_start_token_id=0,
    pad_token_id=0,
    eos_token_id=2,
)
T5GEMMA_STACK = dict(LLAMA, head_dim=8, sliding_window=4, query_pre_attn_scalar=8)
ONE_START = dict(TWO_STACKS, max_position_embeddings=64, forced_eos_token_id=None)

SPECS = {
    "t5": two_stacks("t5", ("encoder.block", "decoder.block"), T5),
    "bart": two_stacks("bart", BART_LAYERS, dict(ONE_START, decoder_start_token_id=1)),
    "marian": two_stacks("marian", BART_LAYERS, dict(ONE_START, decoder_start_token_id=0)),
    "t5gemma": two_stacks(
        "t5gemma",
        BART_LAYERS,
        dict(
            encoder=T5GEMMA_STACK,
            decoder=dict(T5GEMMA_STACK, cross_attention_hidden_size=WIDTH),
            vocab_size=VOCABULARY,
        ),
    ),
    "bert": encoder("bert", "bert.encoder.layer"),
    "roberta": encoder("roberta", "roberta.encoder.layer", pad_token_id=1),
    "electra": encoder("electra", "electra.encoder.layer", embedding_size=WIDTH),
    "albert": encoder("albert", "albert.encoder.albert_layer_groups", embedding_size=WIDTH),
    "distilbert": encoder(
        "distilbert",
        "distilbert.transformer.layer",
        dict(vocab_size=VOCABULARY, max_position_embeddings=64, pad_token_id=0),
        dim=WIDTH,
        n_layers=LAYERS,
        n_heads=HEADS,
        hidden_dim=INNER,
    ),
    "deberta-v2": encoder(
        "deberta-v2",
        "deberta.encoder.layer",
        relative_attention=True,
        pos_att_type=["p2c", "c2p"],
        position_buckets=8,
    ),
    "modernbert": encoder(
        "modernbert",
        "model.layers",
        local_attention=4,
        global_attn_every_n_layers=2,
        bos_token_id=1,
        eos_token_id=2,
        cls_token_id=1,
        sep_token_id=2,
    ),
}
