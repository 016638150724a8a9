"""Every form of block does what it does in place: each runs under a plain manager, and lifted."""

from __future__ import annotations

import asyncio
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from tests.capture.fake_tracer import FakeTracer, load
from tracekit.capture import variables


class InPlace:
    """A context manager like any other, for comparison: it leaves the body where it is."""

    def __enter__(self) -> InPlace:
        return self

    def __exit__(self, *_: object) -> bool:
        return False


FORMS = {
    "a name bound in the block": """
        def run(trace):
            with trace():
                x = 1
            return x
    """,
    "the name after as": """
        def run(trace):
            with trace() as t:
                same = t
            return same is t
    """,
    "one line": """
        def run(trace):
            with trace(): x = 1; y = 2
            return x, y
    """,
    "one line that reads the name after as": """
        def run(trace):
            with trace() as t: x = t; y = 2
            return x is t, y
    """,
    "a body that begins with try": """
        def run(trace):
            with trace():
                try:
                    x = 1 / 0
                except ZeroDivisionError as error:
                    y = str(error)
                finally:
                    z = 3
            return y, z
    """,
    "a body that begins with try, and a name after as": """
        def run(trace):
            ran = []
            with trace() as t:
                try:
                    ran.append(1)
                except BaseException:
                    ran.append(2)
                finally:
                    ran.append(3)
            return ran, t is not None
    """,
    "a body that begins with try, and a global name after as": """
        def run(trace):
            global t
            with trace() as t:
                try:
                    x = t
                finally:
                    y = 2
            return x is t, y
    """,
    "a body without code": """
        def run(trace):
            with trace() as t:
                if False:
                    x = 1
            return t is not None
    """,
    "only a docstring": """
        def run(trace):
            with trace() as t:
                "nothing"
            return t is not None
    """,
    "raise alone in a handler of the block": """
        def run(trace):
            try:
                with trace():
                    try:
                        1 / 0
                    except ZeroDivisionError:
                        raise
            except ZeroDivisionError as error:
                return str(error)
    """,
    "a loop around the block": """
        def run(trace):
            total = 0
            for i in range(3):
                with trace():
                    total += i
                    for j in range(3):
                        if j == 1:
                            continue
                        if j == 2:
                            break
                    else:
                        total = -1
            return total, i, j
    """,
    "with first": """
        def run(trace):
            from contextlib import nullcontext
            with trace():
                with nullcontext(3) as three:
                    x = three
            return x
    """,
    "the last of several managers": """
        def run(trace):
            from contextlib import nullcontext
            with nullcontext(1) as one, trace() as t:
                x = one + 1
            with nullcontext(), nullcontext(2) as two, trace(): y = two
            return x, y
    """,
    "parentheses around several managers": """
        def run(trace):
            from contextlib import nullcontext
            with (
                nullcontext(1) as one,
                trace(
                ) as t,
            ):
                x = one + 1
            return x
    """,
    "two blocks a line apart": """
        def run(trace):
            with trace():
                x = 1
            with trace():
                x += 1
            return x
    """,
    "a block in a finally": """
        def run(trace):
            seen = []
            for fails in (False, True):
                try:
                    try:
                        if fails:
                            raise KeyError
                    finally:
                        from contextlib import nullcontext
                        with nullcontext(), trace():
                            seen.append(fails)
                except KeyError:
                    seen.append("caught")
            return seen
    """,
    "a block in a block in a block": """
        def run(trace):
            x = 1
            with trace():
                y = x + 1
                with trace() as inner:
                    x = y + 1
                    with trace():
                        z = x + y
                        y = 10
            return x, y, z
    """,
    "a block in a function defined in a block": """
        def run(trace):
            base = 1
            with trace():
                def inner(n):
                    nonlocal base
                    with trace():
                        n += base
                        base += 1
                    return n
                a = inner(1)
                b = inner(1)
            return a, b, base, inner.__qualname__
    """,
    "del of a name bound in the block": """
        def run(trace):
            with trace():
                x = 1
                y = x
                del x
            try:
                x
            except UnboundLocalError:
                return y
    """,
    "names that are unbound before": """
        def run(trace):
            try:
                with trace():
                    y = x
            except (NameError, UnboundLocalError) as error:
                seen = type(error).__name__ in ("NameError", "UnboundLocalError")
            x = 1
            return seen
    """,
    "what was bound before an error": """
        def run(trace):
            try:
                with trace():
                    x = 1
                    y = 1 / 0
                    z = 2
            except ZeroDivisionError:
                return x, sorted(name for name in ("y", "z") if name in locals())
    """,
    "a variable that another function changes during the block": """
        def run(trace):
            count = 0
            def bump():
                nonlocal count
                count += 1
            with trace():
                bump()
                bump()
                n = count
                count = 10
                bump()
            return n, count
    """,
    "nonlocal in the block": """
        def run(trace):
            n = 0
            def read():
                return n
            def inner():
                with trace():
                    nonlocal n
                    n += 1
                    seen = read()
                return seen
            return inner(), n
    """,
    "global in the block": """
        total = 0
        def run(trace):
            with trace():
                global total
                total += 1
            return total
    """,
    "global in the function": """
        total = 0
        def run(trace):
            global total
            with trace():
                total = total + 2
                def f():
                    return total
            total += 1
            return f(), total
    """,
    "closures that outlive the block": """
        def run(trace):
            k = 1
            with trace():
                y = 2
                def get():
                    return y + k
                fs = [lambda: y * i for i in range(3)]
            y = 100
            k = 1000
            return get(), [f() for f in fs]
    """,
    "an argument in a cell": """
        def run(trace, argument=1):
            def get():
                return argument
            with trace():
                argument += 1
                seen = get()
            return seen, argument
    """,
    "comprehensions": """
        def run(trace):
            xs = [1, 2]
            with trace():
                ys = [x + y for x in xs for y in xs if x != y]
                zs = {x: [x for _ in xs] for x in xs}
                gs = list(x for x in xs)
                ss = {last := x for x in xs}
                fs = [(lambda: x)() for x in xs]
            return ys, zs, gs, ss, last, fs
    """,
    "a global that a comprehension of the function shadows": """
        i = 77
        def run(trace):
            before = [i for i in range(3)]
            with trace():
                x = i
                inner = [i for i in range(2)]
                with trace():
                    x += i
            return before, x, inner
    """,
    "a global that comprehensions shadow, in a function defined in the block": """
        i = 77
        async def later(): [i async for i in ()]
        def outer(trace):
            def run():
                before = {i: i for i in range(3)}
                with trace():
                    def f():
                        return i
                    x = f(), {i for i in range(2)}
                return x, before
            return run()
        def run(trace):
            x = [j for j in range(2)]
            j = 5
            with trace():
                y = j, [j for j in range(3)]
                j += 1
            return x, y, j, outer(trace)
    """,
    "the forms of binding": """
        def run(trace):
            with trace():
                import os.path
                import os.path as p
                from os import sep as s
                (a, *b), c = [1, 2, 3], 4
                if (w := a + c):
                    pass
                for f in b:
                    pass
                v: int = 5
                u: int
                class K:
                    z = c
                def g(n=a):
                    return n
                match [1, 2, {"k": 3}]:
                    case [m, *rest] if m == 1:
                        pass
                xs = [0]
                xs[0]: int = 3
                a += 1
            return (os.path is p, s, a, b, c, w, f, v, K.z, K.__qualname__, g(), m, rest, xs)
    """,
    "decorators and star arguments": """
        def run(trace):
            def twice(f):
                return lambda *args, **options: f(*args, **options) * 2
            with trace():
                @twice
                def f(*args, **options):
                    return [*args, *options.values()]
                x = f(*[1, 2], **{"a": 3})
            return x
    """,
    "super and private names in a method": """
        class Base:
            def value(self):
                return 1
        class Derived(Base):
            def __init__(self):
                self.__private = 5
            def value(me, trace):
                __local = 2
                with trace():
                    x = super().value() + me.__private + __local
                    __local = 3
                    me.__private += 1
                    name = __class__.__name__
                return x, __local, me.__private, name
        def run(trace):
            return Derived().value(trace)
    """,
    "a class body": """
        def run(trace):
            class K:
                with trace():
                    x = 1
                    y: int = x + 1
                    def method(self):
                        return 5
                with trace() as t:
                    z = x
                del t
            return K.x, K.y, K.z, K().method(), sorted(K.__annotations__)
    """,
    "a generator": """
        def run(trace):
            def numbers():
                x = 0
                for _ in range(3):
                    with trace():
                        x += 1
                    yield x
            return list(numbers())
    """,
    "an async function": """
        def run(trace):
            async def work(n):
                with trace():
                    n += 1
                    async def later():
                        return n
                return n, await later()
            try:
                work(1).send(None)
            except StopIteration as stop:
                return stop.value
    """,
    "a function in a method of a local class": """
        def run(trace):
            class K:
                def method(self):
                    def inner():
                        with trace():
                            x = self.n
                        return x
                    self.n = 4
                    return inner()
            return K().method()
    """,
    "many locals": """
        def run(trace):
            """ + "; ".join(f"v{i} = {i}" for i in range(300)) + """
            with trace() as t:
                v299 = v298 + v3
                w = v299
            return w, v299, t is not None
    """,
    "a long body": """
        def run(trace):
            x = 0
            with trace() as t:
                """ + "; ".join(f"x += {i}" for i in range(400)) + """
            with trace():
                for i in range(2):
                    """ + "; ".join(f"x += {i}" for i in range(400)) + """
            return x
    """,
    "a backslash and comments": """
        def run(trace):
            with \\
                    trace() as t:  # a comment

                # another

                x = (1 +
                     2)
            return x
    """,
    "a decorated function": """
        def same(f):
            return f
        @same
        @same
        def run(trace):
            with trace():
                x = 1
            return x
    """,
    "future annotations": """
        from __future__ import annotations
        def run(trace):
            with trace():
                def f(a: Unknown) -> Unknown:
                    return a
            return f.__annotations__
    """,
    "what looks around in its frame": """
        def run(trace):
            hidden = 5
            def shared():
                return seen
            with trace():
                seen = eval("hidden"), locals()["hidden"]
            return shared()
    """,
    "text about which Python warns": """
        def run(trace):
            with trace():
                x = "\\d", 1 is 1
            return x
    """,
    "recursion in the block": """
        def run(trace, depth=3):
            with trace():
                result = depth if depth == 0 else depth + run(trace, depth - 1)
            return result
    """,
    "text that is wider than a byte per character": """
        def run(trace):
            with trace() as é: ü = "日本" if é else ""
            return ü
    """,
}  # fmt: skip


@pytest.fixture(params=FORMS.values(), ids=FORMS.keys())
def form(request: pytest.FixtureRequest) -> str:
    return textwrap.dedent(request.param)


@pytest.mark.filterwarnings("ignore:.*(literal|invalid escape)")
def test_a_lifted_block_does_what_it_does_in_place(form: str, tmp_path: Path) -> None:
    expected = load(form, tmp_path / "in_place.py")["run"](InPlace)
    run = load(form, tmp_path / "lifted.py")["run"]
    assert run(FakeTracer) == expected
    assert run(FakeTracer) == expected or "total" in form  # warm


def test_a_lifted_block_really_runs_on_the_other_thread() -> None:
    from threading import get_ident

    with FakeTracer() as tracer:
        thread = get_ident()
    assert thread != tracer.thread


def test_a_block_at_the_top_of_a_module_binds_global_names(tmp_path: Path) -> None:
    text = """
        base = 1
        for i in range(2):
            with trace() as t:
                x = base + i
                y: int = 3
                def f():
                    return x
                squares = [n * base for n in range(3)]
                class K:
                    def method(self): ...
                del y
    """
    module = load(textwrap.dedent(text), tmp_path / "top.py", trace=FakeTracer)
    assert (module["x"], module["f"](), module["squares"]) == (2, 2, [0, 1, 2])
    assert (module["K"].__qualname__, module["K"].method.__qualname__) == ("K", "K.method")
    assert "y" not in module
    assert not [name for name in module if "tracekit" in name]


def test_a_block_under_exec_with_separate_locals_binds_them(tmp_path: Path) -> None:
    path = tmp_path / "separate.py"
    path.write_text("with trace():\n    x = base + 1\n    ys = [n for n in range(x)]\n")
    names: dict[str, Any] = {"base": 1}
    exec(compile(path.read_text(), str(path), "exec"), {"trace": FakeTracer}, names)
    assert names == {"base": 1, "x": 2, "ys": [0, 1]}


def test_names_after_as_in_a_tuple_are_bound(tmp_path: Path) -> None:
    text = """
        def run(pair):
            with pair() as (a, (b, *c)):
                d = a + b
            return a, b, c, d
    """
    run = load(textwrap.dedent(text), tmp_path / "pair.py")["run"]
    assert run(lambda: FakeTracer(entered=(1, (2, 3)))) == (1, 2, [3], 3)


def test_a_target_that_is_not_a_name_is_bound(tmp_path: Path) -> None:
    text = """
        def run(trace, box):
            with trace() as box["t"]:
                x = box["t"]
            return x
    """
    assert isinstance(
        load(textwrap.dedent(text), tmp_path / "box.py")["run"](FakeTracer, {}), FakeTracer
    )


def test_save_becomes_the_helper_and_only_without_arguments() -> None:
    class Box:
        def save(self, path: str) -> str:
            return path

    with FakeTracer():
        x = (1).save()  # type: ignore[attr-defined]
        y = Box().save("here")
        z = [n.save() for n in (1, 2)]  # type: ignore[attr-defined]
        chained = (3).save()[1].save()  # type: ignore[attr-defined]
    assert (x, y) == (("saved", 1), "here")
    assert z == [("saved", 1), ("saved", 2)]
    assert chained == ("saved", 3)


def test_save_is_left_alone_where_no_helper_is_given(tmp_path: Path) -> None:
    class Box:
        def save(self) -> int:
            return 7

    text = "def run(trace, box):\n    with trace():\n        x = box.save()\n    return x\n"
    run = load(text, tmp_path / "unsaved.py")["run"]
    assert run(lambda: FakeTracer(helpers={}), Box()) == 7
    assert run(FakeTracer, Box())[0] == "saved"


class Loss:
    """Something with a `backward` that no `with` can enter, as torch's."""

    def backward(self, *args: Any, **kwargs: Any) -> None:
        self.called = args, kwargs


@contextmanager
def opened(owner: object, *args: Any, **kwargs: Any) -> Iterator[Any]:
    yield owner, args, kwargs


def test_backward_becomes_the_helper_where_a_with_enters_it() -> None:
    loss = Loss()

    def open_loss(number: int) -> Any:
        with loss.backward(number) as entered:  # type: ignore[attr-defined]
            return entered

    with FakeTracer(helpers={"backward": opened}):
        with loss.backward() as first:  # type: ignore[attr-defined]
            inside = 1
        with opened(2) as other, loss.backward(3, key=inside) as second:  # type: ignore[attr-defined]
            pass

        def nested() -> Any:
            with loss.backward(4) as entered:  # type: ignore[attr-defined]
                return entered

        third = nested()
        with FakeTracer(helpers={"backward": opened}):
            with loss.backward(5) as fourth:  # type: ignore[attr-defined]
                pass
        plain = loss.backward(6)  # not a `with`
    assert first == (loss, (), {})
    assert other[0] == 2
    assert second == (loss, (3,), {"key": 1})
    assert third == (loss, (4,), {})
    assert fourth == (loss, (5,), {})
    assert plain is None
    assert loss.called == ((6,), {})
    with pytest.raises((TypeError, AttributeError)):  # functions around the block are as written
        open_loss(7)


def test_one_place_serves_many_frames_at_once() -> None:
    def nested(depth: int, seen: list[int]) -> None:
        with FakeTracer():
            here = depth
            if depth:
                nested(depth - 1, seen)
            seen.append(here)
        assert here == depth

    seen: list[int] = []
    nested(5, seen)
    assert seen == [0, 1, 2, 3, 4, 5]


def test_threads_that_enter_the_same_block_do_not_disturb_each_other() -> None:
    from threading import Barrier, Thread

    results: list[int] = []
    start = Barrier(8)

    def work(n: int) -> None:
        start.wait()
        for i in range(50):
            with FakeTracer(run=run_here):
                x = n * 1000 + i
            results.append(x)

    threads = [Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == sorted(n * 1000 + i for n in range(8) for i in range(50))


def run_here(body: Callable[[], None]) -> None:
    body()


def test_a_block_is_compiled_once_per_place() -> None:
    blocks = []
    for _ in range(2):
        with FakeTracer() as tracer:
            x = 1
        blocks.append(tracer.block)
    with FakeTracer() as other:
        x = 2
    assert x == 2
    assert blocks[0] is blocks[1]
    assert other.block is not blocks[0]


def test_a_block_says_what_it_is() -> None:
    numbers = count(1)
    with FakeTracer() as tracer:
        # a comment
        x = next(numbers)
        y = (x +
             1)  # fmt: skip
    assert y == 2
    block = tracer.block
    assert block is not None
    assert block.source == "x = next(numbers)\ny = (x +\n     1)  # fmt: skip\n"
    assert (block.target, block.is_empty) == ("tracer", False)
    assert block.filename == __file__
    assert block.function_name == "test_a_block_says_what_it_is"
    assert block.last_line - block.first_line == 4
    assert "next(numbers)" in block.explain()


def test_a_frame_whose_memory_is_not_known_gets_copies_that_are_handed_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(variables, "_layout", None)
    n = 1

    def read() -> int:
        return n

    with FakeTracer():
        n += 1
        get = lambda: n + 1  # noqa: E731
        seen = get()
    assert (n, read(), seen, get()) == (2, 2, 3, 3)


def test_a_frame_whose_memory_does_not_look_as_expected_is_left_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert variables._layout is not None, "this Python needs its row in the table"
    other = replace(variables._layout, global_names=variables._layout.code)
    n = 1
    slots = variables.names_of(sys._getframe().f_code, 0).slots
    assert variables.shared_cells(sys._getframe(), slots)["n"].cell_contents == n
    monkeypatch.setattr(variables, "_layout", other)
    assert variables.shared_cells(sys._getframe(), slots) == {}
    assert [get() for get in [lambda: n]] == [1]


@pytest.mark.skipif(sys.version_info < (3, 12), reason="type parameters came in 3.12")
def test_type_parameters_around_and_in_a_block(tmp_path: Path) -> None:
    text = """
        i = 5
        def outer[T](trace, value: T):
            ys = [i for i in range(2)]
            with trace():
                def inner[S](s: S) -> tuple[S, T]:
                    return s, value, i
                type Alias = list[T]
                x = inner(1), Alias.__value__
            return x
        class K[T]:
            def method(self, trace):
                zs = [i for i in range(2)]
                with trace():
                    y = i, zs
                return y
    """
    module = load(textwrap.dedent(text), tmp_path / "parameters.py")
    assert module["outer"](FakeTracer, 2)[0] == (1, 2, 5)
    assert module["K"]().method(FakeTracer) == (5, [0, 1])


def test_coroutines_that_take_turns_each_have_their_block() -> None:
    async def work(n: int) -> int:
        total = 0
        for i in range(3):
            with FakeTracer():
                total += n * i
            await asyncio.sleep(0)
        return total

    async def main() -> list[int]:
        return await asyncio.gather(*(work(n) for n in range(4)))

    assert asyncio.run(main()) == [0, 3, 6, 9]


def test_what_another_thread_writes_meanwhile_is_not_overwritten() -> None:
    """Handing back writes the block's names only, not what it saw of the others."""
    shared = 0

    def bump(body: Callable[[], None]) -> None:
        nonlocal shared
        body()
        shared += 1

    for _ in range(3):
        with FakeTracer(run=bump):
            mine = 1
    assert (shared, mine) == (3, 1)
