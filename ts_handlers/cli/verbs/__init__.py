"""One module for each verb; see `ts_handlers.cli`."""
