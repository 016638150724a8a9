"""What can be written behind `tracekit`: commands, options, and their help with examples."""

# Imports no torch. The examples in the help are run by tests/cli/test_help.py.

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable
from typing import Any, Final

TINY: Final = "tracekit/tiny"  # packaged: needs no network
DTYPES: Final = ("auto", "float64", "float32", "float16", "bfloat16")
_STATUS: Final = """\
exit status: 0 fine, 1 a check failed, 2 a wrong command line or input, 3 something else broke,
130 interrupted. NO_COLOR and HF_HUB_OFFLINE are respected; TRACEKIT_DEBUG=1 is --traceback."""
_Add = Callable[..., argparse.ArgumentParser]


def parser() -> argparse.ArgumentParser:
    """The parser of the whole command line; `module` of what it returns has the command's `run`."""
    found = argparse.ArgumentParser(
        prog="tracekit",
        description="See and change what happens inside PyTorch models.",
        epilog=f"examples:\n  tracekit demo\n  tracekit tree --depth 2\n\n{_STATUS}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    # The package's __init__ is above this floor, so it is looked up and not imported from.
    version = importlib.import_module("tracekit").__version__
    found.add_argument("--version", action="version", version=f"tracekit {version}")
    commands = found.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, does: str, *examples: str) -> argparse.ArgumentParser:
        lines = "\n".join(f"  tracekit {name} {example}".rstrip() for example in examples)
        command: argparse.ArgumentParser = commands.add_parser(
            name,
            help=does,
            description=f"{does[0].upper()}{does[1:]}.",
            epilog=f"examples:\n{lines}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_argument(
            "--traceback", action="store_true", help="show where in the code an error came from"
        )
        command.set_defaults(module=f"tracekit.cli.{name}")
        return command

    for each in (_demo, _lens, _patch, _tree, _harvest, _activations, _serve, _doctor):
        each(add)
    return found


def _demo(add: _Add) -> None:
    add("demo", "what the packaged model thinks, layer by layer, and an edit", "")


def _lens(add: _Add) -> None:
    text = '"The Eiffel Tower is in the city of"'
    command = add(
        "lens",
        "the logit lens: what each layer would say of a text, were it the last",
        f"tracekit/tiny {text}",
        f"tracekit/tiny {text} --token Paris --top 3",
        f"tracekit/tiny {text} --position all",
        f"tracekit/tiny {text} --json --html lens.html",
    )
    _model(command)
    command.add_argument("text", metavar="TEXT", help="what the model is given")
    command.add_argument(
        "--top", type=_positive, default=5, metavar="N", help="likeliest tokens shown (default: 5)"
    )
    command.add_argument(
        "--position",
        default="-1",
        metavar="N",
        help="number of a token, or all (default: -1)",
    )
    command.add_argument(
        "--token", metavar="TEXT", help="follow this one (default: what the model says in the end)"
    )
    command.add_argument(
        "--activation",
        default="resid_post",
        metavar="NAME",
        help="or resid_mid, resid_pre",
    )
    _json(command)
    _html(command)


def _patch(add: _Add) -> None:
    pair = (
        '--clean "The Eiffel Tower is in the city of" --corrupted "The Big Ben is in the city of"'
    )
    command = add(
        "patch",
        "which places carry what two prompts differ in: an exact sweep of patches",
        f"tracekit/tiny {pair}",
        f"tracekit/tiny {pair} --right Paris --wrong London --over layer,head --activation z",
        f"tracekit/tiny {pair} --direction noise --json --html patch.html",
    )
    _model(command)
    command.add_argument("--clean", required=True, metavar="TEXT", help="a prompt")
    command.add_argument("--corrupted", required=True, metavar="TEXT", help="one as long in tokens")
    command.add_argument(
        "--right", metavar="TOKEN", help="answer to the clean prompt (default: what the model says)"
    )
    command.add_argument(
        "--wrong", metavar="TOKEN", help="answer to the corrupted one (default: what it says)"
    )
    command.add_argument(
        "--over", default="layer,position", metavar="AXES", help="of layer, position and head"
    )
    command.add_argument(
        "--activation",
        default="resid_pre",
        metavar="NAME",
        help="see tracekit tree --names",
    )
    command.add_argument(
        "--direction",
        choices=("denoise", "noise"),
        default="denoise",
        help="clean values into the corrupted run (default), or the other way round",
    )
    _json(command)
    _html(command)


def _tree(add: _Add) -> None:
    command = add(
        "tree",
        "the modules of a model, their weights and their standard names",
        "",
        "tracekit/tiny --depth 2",
        'tracekit/tiny --input "The Eiffel Tower is in"',
        "tracekit/tiny --names",
    )
    _model(command, is_optional=True)
    command.add_argument("--depth", type=_count, metavar="N", help="show N levels below the model")
    command.add_argument("--input", metavar="TEXT", help="run this, and show what modules gave")
    command.add_argument(
        "--names", action="store_true", help="list the standard names, and where each is"
    )
    command.add_argument("--full", action="store_true", help="show equal layers each on its own")
    _json(command)


def _harvest(add: _Add) -> None:
    command = add(
        "harvest",
        "write the activations of a data set to disk; run again, it makes what is missing",
        "tracekit/tiny texts.txt --sites resid_post --out acts",
        "tracekit/tiny texts.txt --sites layers.2.resid_post layers.3.z --out acts --pack",
        "tracekit/tiny texts.txt --sites resid_post --out acts --positions last --save-as float16",
        "tracekit/tiny texts.txt --sites resid_post --out acts --shard-documents 1 --shards 2/3",
        "tracekit/tiny texts.txt --sites resid_post --out acts --plan --json",
    )
    _model(command)
    command.add_argument(
        "dataset",
        metavar="DATASET",
        nargs="+",
        help="files (.txt, .jsonl: a document in each line), a data set of the Hub, or a directory",
    )
    command.add_argument(
        "--sites",
        required=True,
        nargs="+",
        metavar="NAME",
        help="see tracekit tree --names",
    )
    command.add_argument("--out", required=True, metavar="DIR", help="where to write the shards")
    _contents(command)
    _shards(command)
    command.add_argument("--plan", action="store_true", help="say what there is to do, and end")
    _json(command)


def _contents(command: argparse.ArgumentParser) -> None:
    """What the model reads, and what is kept of it."""
    command.add_argument(
        "--context-size",
        type=_positive,
        metavar="N",
        help="tokens read at once, at most",
    )
    command.add_argument(
        "--pack", action="store_true", help="fill contexts, with documents one behind the other"
    )
    command.add_argument(
        "--prepend-bos",
        action=argparse.BooleanOptionalAction,
        help="default: as the tokenizer does",
    )
    command.add_argument(
        "--positions",
        default="all",
        metavar="WHICH",
        help="of each context: all (default), last, a number, 2:10, or 0,5",
    )
    command.add_argument(
        "--skip-special", action="store_true", help="leave out the tokenizer's special tokens"
    )
    command.add_argument(
        "--save-as",
        choices=DTYPES[1:],
        help="dtype on the disk (default: as the model computes, which loses nothing)",
    )
    command.add_argument(
        "--batch-size",
        type=_positive,
        default=16,
        metavar="N",
        help="contexts at once (default: 16)",
    )
    command.add_argument("--limit", type=_positive, metavar="N", help="the first N documents alone")
    command.add_argument("--column", metavar="NAME", help="of the data set (default: text)")
    command.add_argument("--config", metavar="NAME", help="of a data set of the Hub")
    command.add_argument(
        "--split", default="train", metavar="NAME", help="of the data set (default: train)"
    )
    command.add_argument("--note", default="", metavar="TEXT", help="kept with the activations")


def _shards(command: argparse.ArgumentParser) -> None:
    """Who makes which."""
    command.add_argument(
        "--shard-documents", type=_positive, metavar="N", help="default: for files of about 64 MB"
    )
    command.add_argument(
        "--shards", metavar="I/N", help="make the I-th of N parts, as of an array job: 1/8 to 8/8"
    )
    command.add_argument("--on", choices=("ray",), help="make them on the workers of a Ray cluster")
    command.add_argument("--workers", type=_positive, metavar="N", help="of Ray")
    command.add_argument(
        "--repair", action="store_true", help="make damaged shards, and those of others, again"
    )


def _activations(add: _Add) -> None:
    command = add(
        "activations",
        "what a harvest has written, and whether it is sound",
        "acts",
        "acts --check --json",
    )
    command.add_argument("directory", metavar="DIR", help="where the harvest has written")
    command.add_argument(
        "--check", action="store_true", help="read and prove every value; exit status 1 for damage"
    )
    command.add_argument(
        "--partial", action="store_true", help="of a harvest that is not finished, what there is"
    )
    _json(command)


def _serve(add: _Add) -> None:
    command = add(
        "serve",
        "let blocks that are traced elsewhere run on a model of this machine",
        "tracekit/tiny --for 1",
    )
    _model(command)
    command.add_argument(
        "--host", metavar="NAME", default="127.0.0.1", help="listen there (default: 127.0.0.1)"
    )
    command.add_argument(
        "--port", type=_count, default=0, metavar="N", help="default: 0, one that is free"
    )
    command.add_argument(
        "--key-file", metavar="FILE", help="has the key (default: a new key, in a new file)"
    )
    command.add_argument(
        "--timeout", type=float, metavar="SECONDS", help="the most that a block may take"
    )
    command.add_argument(
        "--for", type=float, dest="seconds", metavar="SECONDS", help="end after that long"
    )


def _doctor(add: _Add) -> None:
    command = add(
        "doctor",
        "check this installation: versions, devices, and every guarantee by an experiment",
        "",
        "--json",
    )
    command.add_argument(
        "--device", metavar="DEVICE", default="cpu", help="where to run the experiments: cuda, mps"
    )
    _json(command)


def _model(command: argparse.ArgumentParser, is_optional: bool = False) -> None:
    """The model, and how it is loaded."""
    text = "a Hub id, a directory, or tracekit/tiny, which is packaged"
    many: dict[str, Any] = {"nargs": "?", "default": TINY} if is_optional else {}
    command.add_argument("model", metavar="MODEL", help=text, **many)
    command.add_argument("--device", metavar="DEVICE", help="cpu (default), cuda, cuda:1, mps")
    command.add_argument("--dtype", choices=DTYPES, help="default: as the checkpoint has it")
    command.add_argument("--revision", metavar="NAME", help="branch, tag or commit on the Hub")
    command.add_argument(
        "--trust-remote-code", action="store_true", help="run code that comes with the model"
    )
    command.add_argument(
        "--offline", action="store_true", help="use only files that are here already"
    )


def _json(command: argparse.ArgumentParser) -> None:
    command.add_argument("--json", action="store_true", help="print JSON, and nothing else")


def _html(command: argparse.ArgumentParser) -> None:
    command.add_argument("--html", metavar="FILE", help="write a page with the picture, too")


def _positive(text: str) -> int:
    found = int(text)
    if found < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return found


def _count(text: str) -> int:
    found = int(text)
    if found < 0:
        raise argparse.ArgumentTypeError(f"{text} is less than 0")
    return found
