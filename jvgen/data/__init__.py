"""From recordings on disk to batches of numpy arrays, for images, static multi-view clips, dynamic videos and robot
episodes. `builders` make data sets of media files or rendered `scenes`; `store` is their format on disk; `stream` reads
them as a deterministic, resumable stream of batches; `video_files` decodes and encodes. Imports go from builders to
stream and scenes, from those to store, and from store to video_files. Nothing here knows a model, a task or a device.
"""
