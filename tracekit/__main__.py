"""`python -m tracekit`, which is the command `tracekit`."""

import sys

from tracekit.cli.entry import main

if __name__ == "__main__":
    sys.exit(main())
