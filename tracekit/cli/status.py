"""What the exit status of the command says; argparse has 2 for a wrong command line, too."""

from __future__ import annotations

from typing import Final

FINE: Final = 0
CHECK_FAILED: Final = 1
USER_ERROR: Final = 2  # an unknown model, token, layer or option
BROKEN: Final = 3  # something else went wrong: a missing package, no memory, a fault of ours
INTERRUPTED: Final = 130  # 128 and the number of SIGINT, as shells say it
PIPE_CLOSED: Final = 141  # 128 and that of SIGPIPE
