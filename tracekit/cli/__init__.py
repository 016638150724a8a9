"""The command `tracekit`: answers in a terminal for people, and as JSON for programs."""

from tracekit.cli.entry import main

__all__ = ["main"]
