"""Standard names for the modules and values of any architecture, as data, and their proof."""

from tracekit.architectures.binding import Bound, Names
from tracekit.architectures.keys import Key, Keys, Named, Spelling
from tracekit.architectures.registry import family_of, known_families, names_of
from tracekit.architectures.schema import Lacks, Sharing
from tracekit.architectures.weights import Stacked, is_weight

__all__ = [
    "Bound",
    "Key",
    "Keys",
    "Lacks",
    "Named",
    "Names",
    "Sharing",
    "Spelling",
    "Stacked",
    "family_of",
    "is_weight",
    "known_families",
    "names_of",
]
