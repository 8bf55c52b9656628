"""The backend `aot_inductor`: an exported program compiled ahead of time."""
