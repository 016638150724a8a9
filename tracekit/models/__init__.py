"""Floor 4: models that can be traced, and how they are loaded, fed and made to generate."""
