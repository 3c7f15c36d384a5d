"""From recordings on disk to batches of numpy arrays, for images, static multi-view clips, dynamic videos and robot
episodes. Nothing here knows a network, a task or a device.
"""
