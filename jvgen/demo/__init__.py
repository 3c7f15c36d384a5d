"""The demo: the whole path at a small scale on the embedded scenes, and its report.

It runs the `jvgen` command as a user would.
"""
