"""What a run reports: hooks of the loop (console, files, TensorBoard, Weights & Biases), throughput and memory.

Hooks observe the run and change nothing in it; nothing here is saved in checkpoints.
"""
