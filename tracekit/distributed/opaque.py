"""Objects that only pickle can tell of: whether a block has changed one, which can't come back."""

# Such an object can't be changed in place on the client. So the host compares its pickle before and
# after the block, and the client is told by which name it goes. What pickles anew each time would
# seem changed, so it is a warning; what can't be pickled on the host is not compared.

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import FunctionType
from typing import Any

from tracekit.distributed.kinds import CONTENT, kind_of
from tracekit.distributed.parcel import Directory, Packer


def digests(objects: Sequence[object], directory: Directory) -> dict[int, object]:
    """What each of the opaque `objects` pickles to, by number; it holds no object."""
    return {
        number: _digest(value, objects, directory)
        for number, value in enumerate(objects)
        if not isinstance(value, (FunctionType, type)) and kind_of(value) == "opaque"
    }


def _digest(value: object, objects: Sequence[object], directory: Directory) -> object:
    others = [None if each is value else each for each in objects]
    packer = Packer(directory, others, may_send_code=True)
    try:
        packer.add("it", value)
    except Exception:  # noqa: BLE001 - whatever the pickling of a user's object raises
        return None
    return packer.parcel.index(), tuple(bytes(each) for each in packer.parcel.buffers)


def changed_ones(
    before: Mapping[int, object], objects: Sequence[object], directory: Directory
) -> Iterator[object]:
    """Those of the opaque objects that pickle to something else than they did."""
    for number, digest in before.items():
        value = objects[number]
        if digest is not None and digest != _digest(value, objects, directory):
            yield value


def told(value: object, names: Mapping[str, object]) -> str | None:
    """An object by its class and the variable that has it: `'meter', a Meter`.

    None for the memory of a tensor or an array that was sent: these come back by themselves.
    """
    kind = type(value).__name__
    for name, held in names.items():
        if held is value:
            return f"{name!r}, a {kind}"
    for name, held in names.items():
        if _is_in(value, held, set()):
            return f"a {kind} in {name!r}"
    if isinstance(value, bytearray):
        return None
    return f"a {kind} in what it was given"


def _is_in(value: object, held: Any, seen: set[int]) -> bool:
    if held is value:
        return True
    kind = "list" if type(held) is tuple else kind_of(held)
    if kind not in CONTENT or id(held) in seen:
        return False
    seen.add(id(held))
    return any(_is_in(value, each, seen) for each in CONTENT[kind](held))
