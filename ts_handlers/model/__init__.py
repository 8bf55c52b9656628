"""Where a model comes from, what it takes and what it returns."""
