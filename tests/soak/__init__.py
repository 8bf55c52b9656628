"""Soak and fuzz: the store and whole starts beside killed processes, damaged bytes, fuzzed files and failing disks.

``python benchmarks/soak.py`` runs it; `test_soak.py` runs a short version of each part.
"""
