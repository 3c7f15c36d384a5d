"""What a run says about itself: console, metrics file, TensorBoard, throughput.

Hooks are called by the loop and change nothing in it.
"""
