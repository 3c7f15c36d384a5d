"""What lies on disk: records in ArrayRecord shards, the index over them, and readers by row.

Which rows a step reads is decided in `jvgen.data.stream`.
"""
