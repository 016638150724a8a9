"""A tokenizer with one token for each word of the corpus, as an ordinary Hugging Face object."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

BEGIN = "<bos>"
PAD = "<pad>"
UNKNOWN = "<unk>"
SPECIAL: tuple[str, ...] = (BEGIN, PAD, UNKNOWN)


def build(vocabulary: list[str], longest: int) -> PreTrainedTokenizerFast:
    """Splits at spaces and punctuation, puts BEGIN first, decodes with natural spacing.

    `longest` is the number of tokens the model can read, BEGIN included.
    """
    return PreTrainedTokenizerFast(
        tokenizer_object=_word_level([*SPECIAL, *vocabulary]),
        bos_token=BEGIN,
        pad_token=PAD,
        unk_token=UNKNOWN,
        padding_side="left",
        model_max_length=longest,
        model_input_names=["input_ids", "attention_mask"],  # GPT-2 would add token_type_ids up
        clean_up_tokenization_spaces=False,
    )


def _word_level(tokens: list[str]) -> Tokenizer:
    ids = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=UNKNOWN))
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A",
        pair=f"{BEGIN} $A $B",
        special_tokens=[(BEGIN, ids[BEGIN])],
    )
    # No token begins with "##" here; wanted is only its spacing: "in Paris." not "in Paris ."
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    return tokenizer


def save(tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    """Writes `tokenizer` so that transformers 4 and 5 both read it.

    transformers 5 would name its class "TokenizersBackend", which version 4 does not know, and
    leaves out which inputs the model takes, for which version 4 has another default.
    """
    tokenizer.backend_tokenizer.no_padding()  # it keeps, and would store, the last call's padding
    tokenizer.save_pretrained(directory)
    path = directory / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    config["model_input_names"] = tokenizer.model_input_names
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
