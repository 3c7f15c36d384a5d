"""From recordings on disk to batches of numpy arrays, for images, static multi-view clips, dynamic videos and robot
episodes. `builders` make data sets of media files or rendered `scenes`; `store` is their format on disk; `stream` reads
them as a deterministic, resumable stream of batches; `video_files` decodes and encodes. Imports go from builders to
stream and scenes, from those to store, and from store to video_files. Nothing here knows a model, a task or a device.

The names below are usable as `jvgen.data.NAME`; each is imported when it is first used.
"""

from jvgen.lazy_names import lazy_names

_MODULES = {
    "aspect_buckets": "data.stream.aspect_buckets",
    "BucketConfig": "data.stream.config",
    "captions_of": "data.scenes.labels",
    "ClipSpec": "data.stream.plan",
    "COLORS": "data.scenes.labels",
    "DataConfig": "data.stream.config",
    "decode_window": "data.video_files",
    "encode_video": "data.video_files",
    "folded": "data.stream.pairs",
    "HomographyConfig": "data.stream.pairs",
    "Labels": "data.scenes.labels",
    "labels_of": "data.scenes.labels",
    "load_example": "data.stream.transforms",
    "Loader": "data.stream.loader",
    "open_source": "data.store.sources",
    "Record": "data.store.records",
    "render_scene": "data.scenes.scenes",
    "Scene": "data.scenes.scenes",
    "SceneConfig": "data.scenes.scenes",
    "Source": "data.store.sources",
    "SourceConfig": "data.stream.config",
    "warped_pair": "data.stream.pairs",
    "Writer": "data.store.writer",
}

__all__ = list(_MODULES)
__getattr__, __dir__ = lazy_names(__name__, _MODULES)
