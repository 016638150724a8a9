"""`tracekit serve`: a model of this machine as a host, for blocks that are traced elsewhere."""

from __future__ import annotations

import os
from argparse import Namespace
from pathlib import Path
from typing import Any

from tracekit.cli.opening import quiet_transformers
from tracekit.cli.output import say
from tracekit.cli.status import FINE
from tracekit.distributed import Server, serve


def run(options: Namespace) -> int:
    """Serve until an interrupt, or for as long as was said; the key's file goes at the end."""
    given = Path(options.key_file) if options.key_file else None
    key = None if given is None else _key_of(given)
    with quiet_transformers():
        server = serve(
            options.model,
            (options.host, options.port),
            key=key,
            timeout=options.timeout,
            **_loading(options),
        )
    with server:
        path = _key_file(server) if given is None else given
        try:
            name = f"{server.address[0]}:{server.address[1]}"
            say(f"{options.model} is served at {name}; its key is in {path}")
            say("whoever has the key may run any code on this machine\n")
            say("  from pathlib import Path")
            say(f"  host = tracekit.connect({name!r}, Path({str(path)!r}))")
            say("  with host.trace(...) as tracer:")
            server.wait(options.seconds)
        finally:
            if given is None:
                path.unlink(missing_ok=True)
    return FINE


def _loading(options: Namespace) -> dict[str, Any]:
    given = {"dtype": options.dtype, "revision": options.revision, "device": options.device}
    flags = {"trust_remote_code": options.trust_remote_code, "local_files_only": options.offline}
    given |= {name: True for name, is_on in flags.items() if is_on}
    return {name: value for name, value in given.items() if value is not None}


def _key_of(path: Path) -> str:
    return path.read_text("utf-8").strip()


def _key_file(server: Server) -> Path:
    """A new file with the key, which nobody else may read."""
    folder = Path.home() / ".cache" / "tracekit"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"serve-{server.address[1]}.key"
    path.unlink(missing_ok=True)
    number = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(number, "w", encoding="utf-8") as file:
        file.write(server.key)
    return path
