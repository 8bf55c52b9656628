"""The libraries through which a remote store's objects are reached: one file for each, chosen in `registry`."""
