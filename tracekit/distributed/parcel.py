"""Objects as bytes for another process and back, such that each stays the object it is."""

# Plain pickling makes a copy, and what a block appends to a copied list is lost. Here every object
# that can change is an Item of its own: the other side makes it anew, notes its number, and says,
# when it answers, "your object 3" for it, and what is in it now. So:
#   - two names for one list are one list over there, and an answer that holds it holds the user's;
#   - lists, dicts, sets, tensors, arrays and plain instances are changed in place on this side.

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any, Final, Protocol, cast, final

import cloudpickle

from tracekit.distributed.kinds import CONTENT, EMPTY, REFILL, WHOLE, kind_of
from tracekit.distributed.sources import Written, fill, is_importable, made, written
from tracekit.errors import UnsendableError

PROTOCOL: Final = 5  # the one with buffers beside the bytes
_ATOMS: Final = frozenset(
    {type(None), bool, int, float, complex, str, bytes, type(...), type(NotImplemented), range}
)
_INLINE: Final = (tuple, frozenset, slice, ModuleType, BuiltinFunctionType, MethodType)

Piece = tuple[bytes, int, int]  # a pickle; the first of its buffers, and how many


@final
@dataclass(frozen=True)
class Item:
    """One object: its kind, what it is made of, and what is in it."""

    kind: str
    head: Piece | None
    body: Piece | None


@final
@dataclass
class Parcel:
    """Named values, the objects in them, and those of the other side that have changed."""

    names: dict[str, Piece] = field(default_factory=dict[str, Piece])
    items: list[Item] = field(default_factory=list[Item])
    changed: dict[int, Piece] = field(default_factory=dict[int, Piece])
    buffers: list[Any] = field(default_factory=list[Any])  # bytes-like, of tensors and arrays

    def index(self) -> bytes:
        """All of it but the buffers, as bytes."""
        return pickle.dumps((self.names, self.items, self.changed), PROTOCOL)

    @staticmethod
    def of(index: bytes, buffers: list[Any]) -> Parcel:
        """The parcel of these bytes and buffers."""
        names, items, changed = pickle.loads(index)
        return Parcel(names, items, changed, buffers)


class Directory(Protocol):
    """What both sides have, and need not send: the modules of the model, by path."""

    def name_of(self, value: object) -> tuple[Any, ...] | None:
        """How the other side finds it; None for what has to be sent."""
        ...

    def find(self, name: tuple[Any, ...]) -> object:
        """What the other side calls so."""
        ...

    def dump_tensor(self, value: object) -> tuple[Any, ...] | None:
        """A plain tensor as shape, dtype and bytes; None for all else."""
        ...

    def load_tensor(self, dumped: tuple[Any, ...]) -> object:
        """The tensor again."""
        ...

    def state_of(self, tensor: Any) -> object:
        """Differs once the tensor, or its gradient, was changed."""
        ...

    def change(self, tensor: Any, dumped: tuple[Any, ...]) -> None:
        """Give a tensor the numbers, and the gradient, that it has on the other side."""
        ...


@final
class Packer:
    """Makes one parcel. `known` are objects that came from the other side, by number."""

    def __init__(
        self, directory: Directory, known: Sequence[object] = (), may_send_code: bool = False
    ) -> None:
        self.parcel = Parcel()
        self.objects: list[object] = []  # by number
        self.may_send_code = may_send_code  # the other side runs the same Python
        self._directory = directory
        self._theirs = {id(value): number for number, value in enumerate(known)}
        self._ours: dict[int, int] = {}
        self._opaque: object = None  # what is pickled as a whole, right now

    def add(self, name: str, value: object) -> None:
        """Put one more value in; whatever pickle raises for what can't be sent."""
        self.parcel.names[name] = self.piece(value)

    def note_change(self, number: int, value: object) -> None:
        """Say what is in an object of the other side by now."""
        self.parcel.changed[number] = self._content(kind_of(value), value)

    def piece(self, value: object) -> Piece:
        """One pickle, with the objects in it by number."""
        first = len(self.parcel.buffers)
        own: list[Any] = []
        file = io.BytesIO()
        _Pickler(self, file, own.append).dump(value)
        # Objects inside have put their buffers in meanwhile, so these come behind them.
        first = len(self.parcel.buffers)
        self.parcel.buffers += [buffer.raw() for buffer in own]
        return file.getvalue(), first, len(own)

    def reference(self, value: object) -> tuple[Any, ...] | None:
        """What stands for an object in a pickle; None if it is pickled there."""
        if type(value) in _ATOMS or value is self._opaque:
            return None
        number = self._theirs.get(id(value))
        if number is not None:
            return ("yours", number)
        number = self._ours.get(id(value))
        if number is not None:
            return ("object", number)
        name = self._directory.name_of(value)
        if name is not None:
            return ("name", *name)
        kind = self._kind_here(value)
        return None if kind is None else ("object", self._put(kind, value))

    def _kind_here(self, value: object) -> str | None:
        if isinstance(value, _INLINE):
            return None
        if isinstance(value, (FunctionType, type)):
            return None if is_importable(value) else "source"
        return kind_of(value)

    def _put(self, kind: str, value: object) -> int:
        number = self._ours[id(value)] = len(self.objects)
        self.objects.append(value)
        self.parcel.items.append(Item(kind, None, None))  # its place: others may come before it
        self.parcel.items[number] = self._item(kind, value)
        return number

    def _item(self, kind: str, value: Any) -> Item:
        if kind == "source":
            return self._source(value)
        head: Piece | None = None
        if kind == "instance":
            head = self.piece(type(value))
        elif kind == "mapping":
            head = self.piece((type(value), getattr(value, "default_factory", None)))
        elif kind == "deque":
            head = self.piece(value.maxlen)
        return Item(kind, head, self._content(kind, value))

    def _content(self, kind: str, value: Any) -> Piece:
        if kind == "tensor":
            dumped = self._directory.dump_tensor(value)
            if dumped is not None:
                return self.piece(dumped)
        before, self._opaque = self._opaque, None
        try:
            if kind in ("opaque", "tensor", "array"):
                self._opaque = value
                return self.piece(value)
            return self.piece(CONTENT[kind](value))
        finally:
            self._opaque = before

    def _used(self, found: Written, value: Any) -> Piece:
        before, self._opaque = self._opaque, None
        try:
            return self.piece(found.used(value))
        finally:
            self._opaque = before

    def _source(self, value: Any) -> Item:
        try:
            found = written(value)
        except (OSError, TypeError, SyntaxError, LookupError):
            found = None
        if found is not None:
            return Item("source", self.piece((found, found.given(value))), self._used(found, value))
        if not self.may_send_code:
            raise UnsendableError(
                f"its source is not found, and the host runs another Python, which can't run the "
                f"code of this one; define {value.__qualname__} in a file or a notebook's cell"
            )
        return Item("opaque", None, self._content("opaque", value))


@final
class _Pickler(cloudpickle.Pickler):
    """Pickles one value, with a number for each object that is an Item."""

    def __init__(
        self, packer: Packer, file: io.BytesIO, keep: Callable[[pickle.PickleBuffer], Any]
    ) -> None:
        super().__init__(file, protocol=PROTOCOL, buffer_callback=lambda it: bool(keep(it)))
        self._packer = packer

    def persistent_id(self, obj: Any) -> tuple[Any, ...] | None:
        return self._packer.reference(obj)


@final
class Unpacker:
    """Makes the objects of a parcel. `own` are those of this side, which the other names."""

    def __init__(self, parcel: Parcel, directory: Directory, own: Sequence[object] = ()) -> None:
        self._parcel = parcel
        self._directory = directory
        self._own = own
        self.objects: list[object] = [None] * len(parcel.items)
        self._has: list[bool] = [False] * len(parcel.items)
        self._making: set[int] = set()
        self._modules: dict[str, dict[str, Any]] = {}

    def value(self, name: str) -> Any:
        """One of the named values."""
        return self.load(self._parcel.names[name])

    def namespace(self, module: str) -> dict[str, Any]:
        """The names of a module as its functions here see them."""
        known = self._modules.get(module)
        if known is None:
            known = self._modules[module] = {"__name__": module}
        return known

    def take_changes(self) -> None:
        """Change this side's objects as the other side's were."""
        for number, piece in self._parcel.changed.items():
            mine: Any = self._own[number]
            content = self.load(piece)
            kind = kind_of(mine)
            if kind == "tensor":
                self._directory.change(mine, content)
            else:
                REFILL[kind](mine, content)

    def load(self, piece: Piece) -> Any:
        """What was pickled, with the objects that it names."""
        data, first, count = piece
        buffers = self._parcel.buffers[first : first + count]
        return _Unpickler(self, io.BytesIO(data), buffers).load()

    def found(self, reference: tuple[Any, ...]) -> object:
        """What stands behind a reference."""
        kind, *rest = reference
        if kind == "yours":
            return self._own[rest[0]]
        if kind == "name":
            return self._directory.find(tuple(rest))
        number: int = rest[0]
        if not self._has[number]:
            self._make(number)
        return self.objects[number]

    def _make(self, number: int) -> None:
        if number in self._making:
            raise UnsendableError("an object in it is made of itself, which can't be sent")
        self._making.add(number)
        item = self._parcel.items[number]
        assert item.body is not None
        if item.kind in WHOLE:
            content = self.load(item.body)
            if item.kind == "tensor" and type(content) is tuple:
                content = self._directory.load_tensor(content)
            self.objects[number], self._has[number] = content, True
            return
        head = self.load(item.head) if item.head is not None else None
        if item.kind == "source":
            found, given = cast("tuple[Written, dict[str, Any]]", head)
            namespace = self.namespace(found.module)
            self.objects[number] = made(found, given, namespace)
            self._has[number] = True
            fill(self.objects[number], self.load(item.body), namespace)
            return
        empty = self.objects[number] = EMPTY[item.kind](head)
        self._has[number] = True
        REFILL[item.kind](empty, self.load(item.body))


@final
class _Unpickler(pickle.Unpickler):
    def __init__(self, unpacker: Unpacker, file: io.BytesIO, buffers: list[Any]) -> None:
        super().__init__(file, buffers=buffers)
        self._unpacker = unpacker

    def persistent_load(self, pid: Any) -> object:
        return self._unpacker.found(pid)
