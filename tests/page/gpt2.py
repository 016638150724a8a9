"""A random GPT-2 of twelve blocks; its tokenizer splits the page's prompts as GPT-2's own does."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

# As GPT-2's own tokenizer splits "The Eiffel Tower is in the city of": ten pieces.
PIECES = ["The", " E", "iff", "el", " Tower", " is", " in", " the", " city", " of"]
VOCABULARY = 50257
END = "<|endoftext|>"


def save(folder: Path) -> None:
    """Write model and tokenizer to `folder`, such that `from_pretrained` finds both."""
    _tokenizer().save_pretrained(folder)
    _model().save_pretrained(folder)


def _tokenizer() -> PreTrainedTokenizerFast:
    words = [*PIECES, *(f" w{number}" for number in range(len(PIECES), VOCABULARY - 1)), END]
    inner = Tokenizer(
        models.WordLevel({word: number for number, word in enumerate(words)}, unk_token=END)
    )
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("|".join(PIECES)), "isolated")
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        eos_token=END,
        bos_token=END,
        # transformers 4 gives token types too unless told, and GPT-2 embeds them with its words.
        model_input_names=["input_ids", "attention_mask"],
    )


def _model() -> GPT2LMHeadModel:
    # The printed shapes need this width and vocabulary; what no line of the page prints is small.
    config = GPT2Config(n_positions=32, n_inner=64, vocab_size=VOCABULARY)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return GPT2LMHeadModel(config)
