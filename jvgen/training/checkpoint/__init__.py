"""Checkpoints: saving with Orbax, a checksum per array, choosing the latest valid one, restoring, and whether a run
may resume from it.
"""
