"""Where the packaged model `tracekit/tiny` lies: a Hugging Face directory beside this file."""

from pathlib import Path

WEIGHTS: Path = Path(__file__).parent / "weights"
