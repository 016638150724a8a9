"""Put what a module gave in many forwards together: one value for each token of the sequences."""

# Guarantees:
#   - each position comes from the forward that came to it first; what was rejected is left out;
#   - a row follows its own beam back to the prompt;
#   - what does not run over the tokens, or not over all of them, is refused, not guessed.

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from tracekit.core.annex import axis_of_positions
from tracekit.core.nest import describe, first_tensor
from tracekit.errors import CacheError
from tracekit.tracing.entries import Entry
from tracekit.tracing.timeline import PADDING, Pass, Timeline, Transcript, by_rows, fits


@final
class TokenSequence(Tensor):
    """`[batch, positions, ...]`: what a module gave for each token; a tensor in all else.

    `.tokens`: `[batch, positions]`, the token that each value belongs to (-1: it was given as an
    embedding). `.positions`: the same shape, the token's place in its own row, from 0 (-1: it is
    padding). `.valid`: the same shape, False for padding and behind the end of a row: what is
    there belongs to no token. `.columns`: which columns of the batch it has. What is computed
    from it is a plain tensor.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore - as torch.nn.Parameter has it

    tokens: Tensor
    positions: Tensor
    valid: Tensor
    columns: list[int]

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        plain = self.as_subclass(Tensor)
        return f"TokenSequence({int(self.valid.sum())} valid tokens, {describe(plain)})\n{plain}"


class Piece(NamedTuple):
    """What one forward gave: for the positions from `start` to `stop` of the sequences."""

    value: Tensor
    length: int  # the value is of the last so many positions of the forward
    one: Pass
    start: int
    stop: int


def calls_in_forwards(entries: Sequence[Entry], call: int) -> list[Entry]:
    """Of each forward, the `call`-th entry of a module that runs several times in it."""
    found: list[Entry] = []
    count, last = 0, None
    for entry in entries:
        count = count + 1 if entry.during is last else 0
        last = entry.during
        if count == call:
            found.append(entry)
    if not found:
        raise CacheError(f"{entries[0].path} has no call={call} in any forward; count from 0.")
    return found


def stitch(
    entries: Sequence[Entry],
    values: list[Any],
    timeline: Timeline,
    *,
    is_partial: bool = False,
    is_flat: bool = False,
) -> TokenSequence:
    """The sequence that `values`, of the `entries` of one module, make.

    CacheError for what is no sequence, for a part of one unless `is_partial`, and for values with
    rows and positions in one axis unless `is_flat` says that they are in it row by row.
    """
    path = entries[0].path
    transcript = timeline.transcript
    if transcript is None:
        raise CacheError(
            f"{path}: the tokens of this run are not known, so there is no sequence of them: it "
            f"was stopped before its first step was over, or is no generation of transformers."
        )
    laid = lay_out(path, _tensors(entries, values), timeline, transcript, is_flat)
    if not is_partial and len(laid.columns) != laid.whole:
        raise _not_whole(path, laid.columns, timeline)
    return _labelled(laid.value, transcript, laid.columns)


class Laid(NamedTuple):
    """Values of a site by position: `[rows, columns, ...]`, of these columns."""

    value: Tensor
    columns: list[int]
    whole: int  # how many columns the run went over
    axis: int  # where the positions are in the site's own values; 0: in one with the rows


def lay_out(
    path: str,
    tensors: Iterable[tuple[Pass, Tensor]],
    timeline: Timeline,
    transcript: Transcript,
    is_flat: bool = False,
) -> Laid:
    """What a site gave in these forwards, by position; CacheError for what is no such thing."""
    spans = timeline.spans()
    pieces = _pieces(path, tensors, spans)
    columns = [column for piece in pieces for column in range(piece.start, piece.stop)]
    shapes = list({(piece.value.shape, piece.length): piece for piece in pieces}.values())
    axis = _axis(path, shapes, _rows(transcript), is_flat)
    sizes = {_size_without(axis, piece.value.shape) for piece in shapes}
    if len(sizes) > 1:
        raise CacheError(
            f"{path} gave values of other sizes in each forward, {describe(pieces[0].value)} and "
            f"{describe(pieces[-1].value)}; read its entries."
        )
    whole = sum(stop - start for start, stop in spans)
    return Laid(_joined(pieces, axis, transcript), columns, whole, axis)


def _tensors(entries: Sequence[Entry], values: list[Any]) -> Iterator[tuple[Pass, Tensor]]:
    for entry, value in zip(entries, values, strict=True):
        if entry.during is None:
            continue
        tensor = value if isinstance(value, Tensor) else first_tensor(value)
        if tensor is None:
            raise CacheError(f"{entry.path} gave {describe(value)}, with no tensor.")
        yield entry.during, tensor


def _pieces(
    path: str, tensors: Iterable[tuple[Pass, Tensor]], spans: list[tuple[int, int]]
) -> list[Piece]:
    """Of each forward, the positions that no earlier one has, in order."""
    pieces: list[Piece] = []
    for one, tensor in tensors:
        start, stop = spans[one.place]
        count = _count(tensor, one)
        start = max(start, one.stop - count)
        if start >= stop:
            continue
        if pieces and pieces[-1].one is one:
            raise CacheError(
                f"{path} ran several times in one forward (step {one.step}), so it has several "
                f"sequences: name one, as in cache.sequence(path, call=0)."
            )
        pieces.append(Piece(tensor, count, one, start, stop))
    if not pieces:
        raise CacheError(
            f"{path} ran outside the decoder's forwards (an encoder, for one), so it has no value "
            f"for each token; read its entries."
        )
    return pieces


def _count(tensor: Tensor, one: Pass) -> int:
    """How many positions the value has: those that have logits, or all."""
    is_kept = 0 < one.kept < one.length and tensor.shape[1:2] == (one.kept,)
    is_kept = is_kept and not (tensor.dim() > 3 and tensor.shape[2] == one.length)  # one head
    return one.kept if is_kept else one.length


def _not_whole(path: str, columns: list[int], timeline: Timeline) -> CacheError:
    total = timeline.total - timeline.first
    missing = sorted(set(range(timeline.first, timeline.total)) - set(columns))
    told = f"{missing[0]} to {missing[-1]}" if len(missing) > 1 else f"{missing[0]}"
    return CacheError(
        f"{path} has no value for {len(missing)} of {total} positions ({told}): it did not run for "
        f"them, as a head does not for a prompt but its last token. Write "
        f"cache.sequence(path, partial=True) for those it has; .positions tells which."
    )


# -- axes -----------------------------------------------------------------------------------------


def _joined(pieces: list[Piece], axis: int, transcript: Transcript) -> Tensor:
    """`[rows, positions, ...]` of all pieces, each copied once."""
    rows = _rows(transcript)
    parts = [_part(piece, axis, rows) for piece in pieces]
    if transcript.lineage is None:
        return torch.cat(parts, 1)
    lineage = transcript.lineage.clamp(min=0).to(parts[0].device)
    size = (len(lineage), sum(part.shape[1] for part in parts), *parts[0].shape[2:])
    joined, first = parts[0].new_empty(size), 0
    for part, piece in zip(parts, pieces, strict=True):
        place = joined.narrow(1, first, part.shape[1])
        torch.index_select(part, 0, lineage[:, piece.start], out=place)
        first += part.shape[1]
    return joined


def _rows(transcript: Transcript) -> int:
    """How many rows the forwards had: not those of the result, where beams were left behind."""
    return transcript.tokens.shape[0] if transcript.lineage is None else transcript.batch


def _is_of_pairs(pieces: list[Piece]) -> bool:
    """Whether the first two axes grow with the positions, so that neither has the rows."""
    lengths = {piece.length for piece in pieces}
    return len(lengths) > 1 and all(
        piece.value.shape[:2] == (piece.length, piece.length) for piece in pieces
    )


def _axis(path: str, pieces: list[Piece], rows: int, is_flat: bool) -> int:
    """Where the positions are in every piece: axis 1 or 2, or 0 with rows and positions in one."""
    known = axis_of_positions(path, pieces[0].value.dim())
    found = [
        axis
        for axis in ((1, 2, 0) if known is None else (known,))
        if all(fits(piece.value, axis, piece.length, rows) for piece in pieces)
    ]
    if (
        found[:2] == [1, 2]
        and pieces[0].value.dim() > 3
        and any(each.length > 1 for each in pieces)
    ):
        raise CacheError(
            f"{path} gave {describe(pieces[0].value)}, and two of its axes may be the positions; "
            f"run it on another number of tokens, or read its entries."
        )
    if _is_of_pairs(pieces):
        raise CacheError(
            f"{path} gave {describe(pieces[-1].value)} in a forward over {pieces[-1].length} "
            f"positions, and less in those before: it has a value for each pair of positions; read "
            f"its entries."
        )
    if found == [0] and not is_flat:
        raise CacheError(
            f"{path} gave {describe(pieces[0].value)}, with rows and positions in one axis, in an "
            f"order that is not known: experts sort tokens, routers do not. If it is row by row, "
            f"write cache.sequence(path, flat=True)."
        )
    if not found:
        piece = pieces[0]
        raise CacheError(
            f"{path} gave {describe(piece.value)} in step {piece.one.step}, with no axis of "
            f"{piece.length} positions for {rows} rows; read its entries."
        )
    return found[0]


def _size_without(axis: int, shape: torch.Size) -> tuple[int, ...]:
    """The sizes of all axes but rows and positions."""
    return (*shape[1:axis], *shape[axis + 1 :])


def _part(piece: Piece, axis: int, rows: int) -> Tensor:
    """`[rows, positions, ...]`: what of a piece is in the result."""
    value, length = piece.value, piece.length
    if axis != 1:
        value = by_rows(value, axis, rows, length)
    if value.shape[0] != rows:
        value = value.expand(rows, *value.shape[1:])
    taken = piece.stop - piece.start
    first = length - piece.one.stop + piece.start
    return value if taken == length else value.narrow(1, first, taken)


def _labelled(joined: Tensor, transcript: Transcript, columns: list[int]) -> TokenSequence:
    first = columns[0]
    is_all = columns == list(range(first, first + len(columns)))
    chosen: Any = slice(first, first + len(columns)) if is_all else columns
    made = joined.as_subclass(TokenSequence)
    made.tokens = transcript.tokens[:, chosen]
    made.positions = transcript.own_positions()[:, chosen]
    valid = transcript.is_real
    if transcript.lineage is not None:
        valid = valid & (transcript.lineage != PADDING)
    made.valid = valid[:, chosen]
    made.columns = columns
    return made
