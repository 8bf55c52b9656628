"""From settings to a model that is ready: look up, load or build, check, warm up, fall back."""
