"""Conversations as the text that the tokenizer's chat template makes of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from tracekit.errors import InputError
from tracekit.models.bos import Ends


def is_chat(items: list[Any]) -> bool:
    """Whether this is a conversation, that is a list of messages, or a list of conversations."""
    first = items[0] if items else None
    if isinstance(first, Sequence) and not isinstance(first, str):
        return is_chat(list(cast("Sequence[Any]", first)))
    return isinstance(first, Mapping) and {"role", "content"} <= set(cast("Any", first))


def told_chats(items: list[Any], tokenizer: Any, ends: Ends, **options: Any) -> list[str]:
    """The text of each conversation, with its beginning and its end as the template has them.

    Unless `add_generation_prompt=` is given, the next message is begun where the last one is not
    the assistant's. All options go to the template.
    """
    if ends.is_rest:
        raise InputError(
            "a conversation has a beginning of its own, and behind a prefix is its rest: give the "
            "rest as text."
        )
    if tokenizer is None or not getattr(tokenizer, "chat_template", None):
        kind = "no tokenizer" if tokenizer is None else f"a {type(tokenizer).__name__} without one"
        raise InputError(
            f"messages need a tokenizer with a chat_template, and the model has {kind}: set "
            f"tokenizer.chat_template, or give the whole text."
        )
    chats = [items] if isinstance(items[0], Mapping) else items
    return [_told(list(chat), tokenizer, options) for chat in chats]


def _told(messages: list[Any], tokenizer: Any, options: dict[str, Any]) -> str:
    for message in messages:
        if not isinstance(message, Mapping) or "role" not in message:
            raise InputError(
                f"a message is a mapping with 'role' and 'content', not {type(message).__name__}."
            )
    goes_on = options.get("continue_final_message", False)
    is_open = not goes_on and messages[-1]["role"] != "assistant"
    given = {"add_generation_prompt": is_open, **options}
    return tokenizer.apply_chat_template(messages, tokenize=False, **given)
