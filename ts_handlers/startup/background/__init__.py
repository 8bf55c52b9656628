"""Serve eagerly while a child process builds, then swap."""
