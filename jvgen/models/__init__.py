"""Networks as single-device code, one folder per network with the same files: `config`, `model`, `flops`,
`torch_map`, README. No model knows a task, an optimizer, a file or a mesh axis.
"""
