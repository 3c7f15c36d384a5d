"""A campaign of faults: runs that are killed and stopped, files that are damaged, and a table of what came of it."""
