"""A run that is verified: what its edits claim, held against what plain hooks saw, as a report."""
