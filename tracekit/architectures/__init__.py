"""Standard names for the modules and values of any architecture, as data, and their proof."""

from tracekit.architectures.binding import Bound, Names
from tracekit.architectures.registry import family_of, known_families, names_of
from tracekit.architectures.schema import Lacks, Sharing
from tracekit.architectures.weights import Stacked, is_weight

__all__ = [
    "Bound",
    "Lacks",
    "Names",
    "Sharing",
    "Stacked",
    "family_of",
    "is_weight",
    "known_families",
    "names_of",
]
