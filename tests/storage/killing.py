"""A process that forks harvests, kills them, and finishes what they left: `killing.py FOLDER`.

Prints JSON: for each kill where it was, how many shards were there, what else was, and whether the
files are those of a harvest that nobody killed once it has been run again.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import torch

from tracekit import Harvest, LanguageModel
from tracekit.core import files

TEXTS = [f"The Eiffel Tower is in {'the city of ' * (number % 5)}" for number in range(24)]
POINTS = 20


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    model = LanguageModel("tracekit/tiny")

    def harvest(out: Path) -> None:
        made = Harvest(model, TEXTS, ["resid_post", "z"], out, shard_documents=4, batch_size=2)
        made.run(progress=False)

    harvest(folder / "whole")
    whole = content(folder / "whole")
    calls = calls_of(lambda: harvest(folder / "counted"))
    draw = random.Random(0)
    kills: dict[str, Callable[[], None]] = {
        f"call {call} of {calls}": lambda call=call: kill_at_call(call)  # type: ignore[misc]
        for call in sorted(draw.randrange(int(0.97 * calls)) for _ in range(POINTS))
    }
    kills |= {
        "half of a file written": lambda: kill_in(files, "save_file", halve),
        "before the file is flushed": lambda: kill_in(os, "fsync", at=3),
        "before it has its name": lambda: kill_in(Path, "replace"),
        "before the directory is flushed": lambda: kill_in(os, "fsync"),
    }
    print(json.dumps([told(folder / f"{n}", harvest, name, kills[name], whole)
                      for n, name in enumerate(kills)]))  # fmt: skip


def told(
    out: Path,
    harvest: Callable[[Path], None],
    name: str,
    arm: Callable[[], None],
    whole: dict[str, bytes],
) -> dict[str, Any]:
    signalled = killed_by(lambda: (arm(), harvest(out)))
    left = content(out) if out.exists() else {}
    harvest(out)
    return {
        "kill": name,
        "signal": signalled,
        "shards": sum(each in whole for each in left),
        "are whole": all(whole[each] == left[each] for each in left if each in whole),
        "parts": sum(each not in whole for each in left),
        "is the same": content(out) == whole,
    }


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: b"" if path.is_dir() else path.read_bytes() for path in folder.iterdir()}


def killed_by(run: Callable[[], object]) -> int:
    """Run this in a child; the number of the signal that ended it, 0 if none did."""
    child = os.fork()
    if child == 0:
        try:
            run()
            os._exit(0)
        except BaseException as error:
            print(f"in a child: {error!r}", file=sys.stderr)
            os._exit(1)
    _, status = os.waitpid(child, 0)
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


# -- where -----------------------------------------------------------------------------------------


def calls_of(run: Callable[[], None]) -> int:
    """How many calls of Python and of C are made, on all threads."""
    seen = count()
    watch(lambda: next(seen))
    run()
    watch(None)
    return next(seen)


def kill_at_call(number: int) -> None:
    """Kill this process at its call of that number."""
    numbers: Iterator[int] = count()

    def seen() -> None:
        if next(numbers) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    watch(seen)


def watch(seen: Callable[[], object] | None) -> None:
    def profile(_frame: object, event: str, _: object) -> None:
        if seen is not None and event in ("call", "c_call"):
            seen()

    threading.setprofile(profile if seen else None)
    sys.setprofile(profile if seen else None)


def kill_in(owner: Any, name: str, first: Callable[..., object] | None = None, at: int = 2) -> None:
    """Kill this process when `owner.name` is called for the time `at`, after `first`."""
    original, numbers = getattr(owner, name), count(1)

    def replaced(*args: Any, **kwargs: Any) -> Any:
        if next(numbers) != at:
            return original(*args, **kwargs)
        if first is not None:
            original(*args, **kwargs)
            first(*args)
        return os.kill(os.getpid(), signal.SIGKILL)

    setattr(owner, name, replaced)


def halve(_: object, path: Path, *__: object) -> None:
    os.truncate(path, path.stat().st_size // 2)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
