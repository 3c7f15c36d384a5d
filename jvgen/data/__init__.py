"""From recordings on disk to batches of numpy arrays, for images, static multi-view clips, dynamic videos and robot
episodes. `builders` make data sets of media files or rendered `scenes`; `store` is their format on disk; `stream` reads
them as a deterministic, resumable stream of batches; `video_files` decodes and encodes. Imports go from builders to
stream and scenes, from those to store, and from store to video_files. Nothing here knows a model, a task or a device.

The names below are usable as `jvgen.data.NAME`; each is imported when it is first used.
"""

import importlib
from typing import Any

_MODULES = {
    "BucketConfig": "stream.config",
    "captions_of": "scenes.labels",
    "ClipSpec": "stream.plan",
    "COLORS": "scenes.labels",
    "DataConfig": "stream.config",
    "decode_window": "video_files",
    "encode_video": "video_files",
    "folded": "stream.pairs",
    "HomographyConfig": "stream.pairs",
    "Labels": "scenes.labels",
    "labels_of": "scenes.labels",
    "load_example": "stream.transforms",
    "Loader": "stream.loader",
    "open_source": "store.sources",
    "Record": "store.records",
    "render_scene": "scenes.scenes",
    "Scene": "scenes.scenes",
    "SceneConfig": "scenes.scenes",
    "Source": "store.sources",
    "SourceConfig": "stream.config",
    "warped_pair": "stream.pairs",
    "Writer": "store.writer",
}

__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'jvgen.data' has no attribute {name!r}")
    return getattr(importlib.import_module(f"jvgen.data.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
