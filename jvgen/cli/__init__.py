"""The `jvgen` command: one module per family of sub-commands, each of which reads arguments, calls one function of a
lower package and prints what it returns. No logic that a library user would miss belongs here. Handlers import late:
`import jvgen.cli` loads no JAX.
"""
