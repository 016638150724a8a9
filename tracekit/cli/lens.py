"""`tracekit lens`: what each layer of a model would say of a text, were it the last."""

from __future__ import annotations

from argparse import Namespace

from tracekit.analysis import Lens, logit_lens
from tracekit.cli.opening import open_decoder, quiet_transformers
from tracekit.cli.output import clipped, save, say, say_json, shown, styled, table, width
from tracekit.cli.status import FINE
from tracekit.errors import InputError
from tracekit.models.language import LanguageModel


def run(options: Namespace) -> int:
    """Print the lens, as a table of one position or of all."""
    with quiet_transformers():
        model = open_decoder(options)
        if options.text == "":
            raise InputError("the text is empty: there is no position to read.")
        position, lens = _lens_of(model, options)
    if options.html:
        save(lens, options.html)
    if options.json:
        told = {"model": options.model, "text": options.text, "position": position}
        say_json({**told, **lens.to_json()})
    elif position is None:
        say(repr(lens))
    else:
        _tell(options, lens, position)
    return FINE


def _lens_of(model: LanguageModel, options: Namespace) -> tuple[int | None, Lens]:
    """The position that is asked for (None: all), and the lens, which follows one token."""

    def lens(token: str | int | None) -> Lens:
        return logit_lens(
            model, options.text, token, activation=options.activation, top=options.top
        )

    found = lens(options.token)
    position = _position(options.position, found.tokens)
    is_last = position in (None, len(found.tokens) - 1)
    if options.token is None and not is_last:  # follow what the model says there
        found = lens(int(found.ids[-1, position, 0]))
    return position, found


def _position(given: str, tokens: tuple[str, ...]) -> int | None:
    if given == "all":
        return None
    try:
        place = int(given)
    except ValueError:
        raise InputError(f"--position {given}: give a number, or all.") from None
    if not -len(tokens) <= place < len(tokens):
        every = " ".join(f"{index} {shown(token)}" for index, token in enumerate(tokens))
        raise InputError(f"--position {given}: the text has {len(tokens)} tokens: {every}.")
    return place % len(tokens)


def _tell(options: Namespace, lens: Lens, position: int) -> None:
    token = lens.chosen[position]
    place = f"position {position}, {shown(lens.tokens[position])}, of {len(lens.tokens)} tokens"
    say(f"{options.model}: what each layer ({lens.activation}) would say behind {place}\n")
    head = ["layer", f"probability of {shown(token)}", "rank", "entropy", "says"]
    rows = [head, *(_row(lens, number, position) for number in range(len(lens.layers)))]
    first, *lines = (clipped(line, width()) for line in table(rows, right=[1, 2, 3]))
    say(styled(first, "bold"))
    say("\n".join(lines))


def _row(lens: Lens, layer: int, position: int) -> list[str]:
    words = lens.words[layer][position]
    chances = lens.top.values[layer, position].tolist()
    says = (f"{shown(word)} {chance:.3f}" for word, chance in zip(words, chances, strict=True))
    place = (layer, position)
    return [
        lens.layers[layer],
        f"{lens.probability.values[place].item():.3f}",
        str(int(lens.rank.values[place].item())),
        f"{lens.entropy.values[place].item():.2f}",
        "  ".join(says),
    ]
