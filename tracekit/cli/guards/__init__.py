"""Small experiments, one for each guarantee: is what tracekit promises true on this machine?"""

from tracekit.cli.guards.answers import ANSWERS
from tracekit.cli.guards.beside import BESIDE
from tracekit.cli.guards.experiment import Experiment, Fault, Finding, found_by
from tracekit.cli.guards.numbers import NUMBERS
from tracekit.cli.guards.traceless import TRACELESS
from tracekit.cli.guards.wrongness import WRONGNESS

# In the order of ARCHITECTURE.md's table of what must hold; what else is compared comes behind.
EXPERIMENTS = (
    *sorted((*BESIDE, *TRACELESS, *WRONGNESS), key=lambda each: each.guard),
    *NUMBERS,
    *ANSWERS,
)

__all__ = ["EXPERIMENTS", "Experiment", "Fault", "Finding", "found_by"]
