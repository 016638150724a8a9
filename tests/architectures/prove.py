"""Prove the declared names of tiny models from the shell.

python -m tests.architectures.prove llama [gpt2 …] [--all]    # --all: every claim, not those alone
"""

from __future__ import annotations

import sys

from tests.architectures.readable import unreadable
from tests.architectures.stirred import stirred
from tests.tiny_models import NAMES, make
from tracekit.architectures import names_of
from tracekit.architectures.check import prove


def main(arguments: list[str]) -> int:
    """Print the proof of each; the number of models with a wrong claim is the exit status."""
    failed = 0
    chosen = [each for each in arguments if not each.startswith("--")]
    for name in chosen or NAMES:
        net, inputs = make(name)
        stirred(net)
        names = names_of(net)
        if names is None:
            print(f"{name}: no family declared")
            failed += name in chosen
            continue
        proof = prove(names, lambda net=net, inputs=inputs: net(**inputs))
        missing = unreadable(net, inputs)
        failed += not proof or bool(missing)
        print(f"{name}, family {proof!r}")
        if "--all" in arguments:
            print(proof.report)
        print(*(f"  declared, but not to be read: {each}\n" for each in missing), sep="", end="")
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
