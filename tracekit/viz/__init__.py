"""Pictures of what tracekit hands out: HTML for notebooks, text for terminals, files."""

from tracekit.viz.picture import Picture
from tracekit.viz.show import show

__all__ = ["Picture", "show"]
