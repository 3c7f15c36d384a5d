"""What can be known before a device is touched: checks of config, data, disk and mesh, and compilation of the
training step for a described pod.
"""
