"""A model with its tokenizer: from text to tokens, in every run and when asked, and back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, cast

from torch import Tensor

from tracekit.capture import showing_own_lines, warn_user
from tracekit.errors import InputError
from tracekit.models import inputs as feeding
from tracekit.models import tokens as spelling
from tracekit.models.bos import puts_behind, puts_in_front, warn_of_an_end
from tracekit.models.chats import is_chat, told_chats
from tracekit.models.model import Model
from tracekit.models.padding import context_length


class Tokenized(Model):
    """Any model, and the tokenizer that says what it reads."""

    __slots__ = ("_padding_side", "_tokenizer")

    @property
    def tokenizer(self) -> Any:
        """The tokenizer; None for a live model that was given none."""
        return self._tokenizer

    # -- from text to tokens --------------------------------------------------------------------

    @showing_own_lines
    def to_tokens(
        self,
        input: Any,
        prepend_bos: bool | None = None,
        padding_side: str | None = None,
        move_to_device: bool = True,
        truncate: bool = True,
        *,
        append_eos: bool | None = None,
    ) -> Tensor:
        """The tokens that a trace of `input` feeds to the model: `[batch, pos]`.

        `truncate` leaves out what the model has no positions for, with a warning; a trace feeds
        it. `append_eos=False` takes away the end-of-sequence token that some tokenizers put behind
        a text.
        Of several texts the tokens alone don't say what is padding: trace the texts, or what
        `to_inputs` makes of them.
        """
        reading = _reading(prepend_bos, append_eos, padding_side)
        encoded = self._encoded(input, reading)
        ids = encoded.get("input_ids")
        if not isinstance(ids, Tensor):
            raise InputError(f"there are no input_ids in it; there are {', '.join(encoded)}.")
        if truncate:
            ids = self._shortened(input, reading, ids)
        return ids.to(feeding.device_of(self._tree.root)) if move_to_device else ids

    @showing_own_lines
    def to_inputs(
        self,
        input: Any,
        prepend_bos: bool | None = None,
        padding_side: str | None = None,
        *,
        append_eos: bool | None = None,
    ) -> dict[str, Tensor]:
        """The tokens of `input`, the mask that says what is padding, and all that belongs to them.

        What `trace`, `generate` and all others take in the place of `input`.
        """
        reading = _reading(prepend_bos, append_eos, padding_side)
        return self._read((input,), reading)

    @showing_own_lines
    def to_chat_tokens(
        self, messages: Sequence[Any], padding_side: str | None = None, **options: Any
    ) -> Tensor:
        """The tokens of a conversation, or of several: `[batch, pos]`.

        `messages` are `[{"role": "user", "content": "…"}, …]`, which every run takes as its input,
        too. The chat template alone says how they begin and end, so no token comes twice. The next
        message is begun where the last one is not the assistant's: `add_generation_prompt=` says
        otherwise, and other options (`tools=`, …) go to the template.
        """
        if not is_chat(list(messages)):
            raise InputError(
                "messages are a list of mappings with 'role' and 'content', or several such lists."
            )
        texts = told_chats(list(messages), self.tokenizer, feeding.Ends(), **options)
        ends = feeding.Ends(is_rest=True)
        side = partial(self._side, _reading(None, None, padding_side))
        ids = feeding.encode(texts, self.tokenizer, side, ends)["input_ids"]
        return ids.to(feeding.device_of(self._tree.root))

    @property
    def tokenizer_prepends_bos(self) -> bool:
        """Whether the tokenizer puts its beginning-of-sequence token in front of a text."""
        return puts_in_front(self._needed_tokenizer())

    @property
    def tokenizer_appends_eos(self) -> bool:
        """Whether the tokenizer puts its end-of-sequence token behind a text."""
        return puts_behind(self._needed_tokenizer())

    # -- from tokens to text --------------------------------------------------------------------

    @showing_own_lines
    def to_string(self, tokens: Any) -> str | list[str]:
        """The text of a token, or of a row of them; of rows (`[batch, pos]`, or a list of rows),
        a list."""
        return spelling.text_of(tokens, self._needed_tokenizer(), self._known_tokens())

    @showing_own_lines
    def to_str_tokens(
        self,
        input: Any,
        prepend_bos: bool | None = None,
        padding_side: str | None = None,
        *,
        append_eos: bool | None = None,
    ) -> list[str] | list[list[str]]:
        """The text of each token of `input`: a text, or tokens `[pos]` or `[1, pos]`.

        Of a list of inputs, or of tokens `[batch, pos]`, a list for each, without padding where
        they are texts. A space in front of a token stays, also with SentencePiece. A part of a
        character is "�", and a token of the model that the tokenizer does not have is "".
        """
        tokenizer, known = self._needed_tokenizer(), self._known_tokens()
        if isinstance(input, (list, tuple)) and not _is_row(cast("Sequence[Any]", input)):
            options: Any = _reading(prepend_bos, append_eos, padding_side)
            items = cast("Sequence[Any]", input)
            return [cast("list[str]", self.to_str_tokens(item, **options)) for item in items]
        if isinstance(input, str):
            reading = _reading(prepend_bos, append_eos, padding_side)
            input = self._encoded(input, reading)["input_ids"]
        if getattr(input, "ndim", 0) == 2 and len(input) != 1:
            return [spelling.strings_of(row, tokenizer, known) for row in input]
        return spelling.strings_of(spelling.row_of(input), tokenizer, known)

    @showing_own_lines
    def to_single_token(self, string: str) -> int:
        """The token that `string` is; TokenError, with the tokens, if it is several."""
        return spelling.single_token(string, self._needed_tokenizer())

    @showing_own_lines
    def to_single_str_token(self, int_token: int) -> str:
        """The text of one token."""
        tokenizer, known = self._needed_tokenizer(), self._known_tokens()
        row = spelling.row_of(int_token)
        if len(row) != 1:
            raise InputError(f"one token is wanted here, and {len(row)} were given.")
        return spelling.string_of(row[0], tokenizer, known)

    @showing_own_lines
    def get_token_position(
        self,
        single_token: Any,
        input: Any,
        mode: str = "first",
        prepend_bos: bool | None = None,
        padding_side: str | None = None,
        *,
        append_eos: bool | None = None,
    ) -> int:
        """Where `single_token`, a text or a token, stands in `input`: the position in its row.

        `input` is a text or one row of tokens; `mode` is "first" or "last". TokenError if it does
        not come.
        """
        if isinstance(input, str):
            reading = _reading(prepend_bos, append_eos, padding_side)
            row = self._encoded(input, reading)["input_ids"][0].tolist()
        else:
            row = spelling.row_of(input)
        if isinstance(single_token, str):
            token = self.to_single_token(single_token)
            return spelling.place_of(token, row, mode, repr(single_token))
        token = spelling.row_of(single_token)
        if len(token) != 1:
            raise InputError(f"one token is wanted here, and {len(token)} were given.")
        return spelling.place_of(token[0], row, mode, "this")

    # -- in every run ---------------------------------------------------------------------------

    def _read(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        is_rest: bool = False,
        is_prompt: bool = False,
    ) -> dict[str, Any]:
        """The inputs of a run; those that are a prompt are gone on from at their end."""
        reading, kwargs = feeding.reading_of(kwargs)
        encoded = self._encoded(args[0], reading, is_rest) if args else {}
        if args and "attention_mask" not in kwargs:
            feeding.warn_of_padding(args[0], self.tokenizer, self._side(reading))
        if is_prompt and not is_rest:
            self._warn_of_an_end(args[0] if args else None, reading)
        return feeding.on_device({**encoded, **kwargs}, feeding.device_of(self._tree.root))

    def _encoded(
        self, given: Any, reading: dict[str, Any], is_rest: bool = False
    ) -> dict[str, Any]:
        ends = feeding.ends_of(reading, is_rest)
        return feeding.encode(given, self.tokenizer, partial(self._side, reading), ends)

    def _side(self, reading: dict[str, Any]) -> str:
        side = reading.get("padding_side") or self._padding_side
        if side is not None:
            return side
        module: Any = self._tree.root
        is_decoder = callable(getattr(module, "can_generate", None)) and module.can_generate()
        return "left" if is_decoder and not module.config.is_encoder_decoder else "right"

    def _warn_of_an_end(self, given: Any, reading: dict[str, Any]) -> None:
        texts = feeding.texts_of(given) if reading.get("append_eos") is None else []
        config: Any = getattr(self._tree.root, "config", None)
        if texts and not getattr(config, "is_encoder_decoder", False):
            warn_of_an_end(texts, self.tokenizer)

    def _shortened(self, given: Any, reading: dict[str, Any], ids: Tensor) -> Tensor:
        limit = context_length(self._tree.root)
        if limit is None or ids.shape[1] <= limit:
            return ids
        warn_user(
            f"the model has positions for {limit} tokens, and the input has {ids.shape[1]}: those "
            f"behind are left out. truncate=False leaves them in."
        )
        if not feeding.texts_of(given):
            return ids[:, :limit]
        ends = replace(feeding.ends_of(reading), limit=limit)
        side = partial(self._side, reading)
        return feeding.encode(given, self.tokenizer, side, ends)["input_ids"]

    def _needed_tokenizer(self) -> Any:
        if self.tokenizer is None:
            raise InputError("text needs a tokenizer: LanguageModel(module, tokenizer=…).")
        return self.tokenizer

    @property
    def _tell(self) -> Callable[[Sequence[int]], Sequence[str]] | None:
        if self.tokenizer is None:
            return None
        known = self._known_tokens()
        return lambda ids: spelling.strings_of(list(ids), self.tokenizer, known)

    def _known_tokens(self) -> int:
        """How many tokens the model knows, which may be more than its tokenizer has."""
        config: Any = getattr(self._tree.root, "config", None)
        text = getattr(config, "get_text_config", lambda: config)()
        return getattr(text, "vocab_size", None) or 0


def _reading(prepend_bos: Any, append_eos: Any, padding_side: Any) -> dict[str, Any]:
    """What was said of how text becomes tokens, checked."""
    given = {"prepend_bos": prepend_bos, "append_eos": append_eos, "padding_side": padding_side}
    reading, _ = feeding.reading_of(given)
    return reading


def _is_row(items: Sequence[Any]) -> bool:
    """Whether a list is one row of tokens."""
    return bool(items) and all(spelling.is_tokens(item) and _is_one(item) for item in items)


def _is_one(item: Any) -> bool:
    return getattr(item, "ndim", 0) == 0
