"""Builders: from folders, tables and published data sets to the store.

Each module reads one kind of source; `build_loop` runs the work in processes, filters, splits and accounts for
refusals.
"""
