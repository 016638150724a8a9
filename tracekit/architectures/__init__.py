"""Standard names for the modules and values of any architecture, as data, and their proof."""

from tracekit.architectures.binding import Bound, Names
from tracekit.architectures.keys import Key, Keys, Named, Spelling
from tracekit.architectures.registry import family_of, known_families, names_of
from tracekit.architectures.schema import Sharing

__all__ = [
    "Bound",
    "Key",
    "Keys",
    "Named",
    "Names",
    "Sharing",
    "Spelling",
    "family_of",
    "known_families",
    "names_of",
]
