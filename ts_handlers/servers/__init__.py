"""The servers that models are served in, one folder each."""
