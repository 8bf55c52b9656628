"""Listing, verifying, evicting and tidying what a local store holds."""
