"""Answers that are kept for equal requests: exact matches only, bounded in bytes and in time."""
