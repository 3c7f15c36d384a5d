"""Builds data sets from the image data sets of TFDS, without TensorFlow."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jvgen.data.builders.build_loop import (
    BuildJob,
    Execution,
    FilterConfig,
    Progress,
    Summary,
    available_cpus,
    build_dataset,
)
from jvgen.data.image_files import as_rgb, encode_image
from jvgen.data.store.records import Record


def build_tfds_images(
    name: str,
    out: str | Path,
    *,
    train_split: str = "train",
    validation_split: str | None = None,
    image_key: str = "image",
    caption_key: str | None = None,
    caption_template: str = "a photo of a {}",
    data_dir: str | Path | None = None,
    limit: int | None = None,
    filters: FilterConfig | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    execution: Execution | None = None,
) -> Summary:
    """Build a data set of png images from an image data set of TFDS, read through `tfds.data_source`.

    Args:
      name: registered name, or the folder of a prepared TFDS data set.
      out: folder of the data set.
      train_split, validation_split: TFDS splits, such as "train[:90%]"; no validation split by default.
      image_key: feature with the image.
      caption_key: feature with a caption or a class label; by default "caption", "captions" or "label", if present.
      caption_template: caption of a class label, with {} for its name.
      data_dir: directory of TFDS data sets.
      limit: maximum number of images per split.
      filters, overwrite, progress, execution: as in `build_videos`.

    Raises:
      ValueError: no such data set or feature, or one that must be prepared first, which needs TensorFlow.
    """
    wanted = {"train": train_split, **({"validation": validation_split} if validation_split else {})}
    sets = {
        split: open_images(name, tfds_split, image_key, caption_key, caption_template, data_dir)
        for split, tfds_split in wanted.items()
    }
    jobs = [
        BuildJob(split, images.id_of(row), (images, row))
        for split, images in sets.items()
        for row in range(min(len(images), limit if limit is not None else len(images)))
    ]

    def make(payload: tuple[Any, int]) -> Record:
        pixels, captions, id = payload[0].read(payload[1])
        return Record(
            id=id, kind="image", clips=(encode_image(pixels),), captions=captions,
            height=pixels.shape[0], width=pixels.shape[1],
        )  # fmt: skip

    options = {
        "name": str(name), **wanted, "limit": limit, "image_key": image_key, "caption_key": caption_key,
        "caption_template": caption_template,
    }  # fmt: skip
    return build_dataset(
        out, jobs, make,
        description=f"Images of the TFDS data set {name}.", metadata={"origin": "tfds", "options": options},
        filters=filters, workers=available_cpus(), overwrite=overwrite, progress=progress, execution=execution,
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class TfdsImages:
    """One split of an image data set.

    Attributes:
      name: prefix of the record ids.
      examples: the TFDS data source.
      image_key: feature with the image.
      caption_key: feature with captions or a class label, or None.
      label_names: class names, if it is a class label.
      template: caption of a class label, with {} for its name.
    """

    name: str
    examples: Sequence[dict[str, Any]]
    image_key: str
    caption_key: str | None
    label_names: tuple[str, ...]
    template: str

    def __len__(self) -> int:
        return len(self.examples)

    def read(self, row: int) -> tuple[np.ndarray, tuple[str, ...], str]:
        """Pixels uint8 (H, W, 3), captions, and an id.

        Raises:
          DecodeError: pixels that are not uint8 or uint16 with 1 to 4 channels.
        """
        example = self.examples[row]
        pixels = np.asarray(example[self.image_key])
        return as_rgb(pixels), self._captions(example), self.id_of(row)

    def id_of(self, row: int) -> str:
        """The id of the record of a row."""
        return f"{self.name}-{row:08d}"

    def _captions(self, example: dict[str, Any]) -> tuple[str, ...]:
        if self.caption_key is None:
            return ()
        value = example[self.caption_key]
        if self.label_names:
            return (self.template.format(self.label_names[int(value)].replace("_", " ")),)
        values = value if isinstance(value, (list, tuple, np.ndarray)) else [value]
        return tuple(v.decode() if isinstance(v, bytes) else str(v) for v in values)


def open_images(
    name: str | Path,
    split: str,
    image_key: str,
    caption_key: str | None,
    template: str,
    data_dir: str | Path | None,
) -> TfdsImages:
    """Open a split of a registered TFDS data set, or of a prepared one in a folder.

    Raises:
      ValueError: no such data set, split or feature; or one that must be prepared with TensorFlow first.
    """
    builder = _builder(str(name), data_dir)
    features = builder.info.features
    if image_key not in features:
        raise ValueError(f"image_key = {image_key!r}: {name} has the features {', '.join(sorted(features))}.")
    if caption_key is None:
        caption_key = next((key for key in ("caption", "captions", "label") if key in features), None)
    elif caption_key not in features:
        raise ValueError(f"caption_key = {caption_key!r}: {name} has the features {', '.join(sorted(features))}.")
    labels = getattr(features[caption_key], "names", None) if caption_key is not None else None
    if split.split("[")[0] not in builder.info.splits:
        raise ValueError(f"{name} has no split {split!r}. Its splits: {', '.join(builder.info.splits) or 'none'}.")
    examples = builder.as_data_source(split)
    prefix = f"{builder.info.name}-{split.split('[')[0]}"
    return TfdsImages(prefix, examples, image_key, caption_key, tuple(labels or ()), template)


def _builder(name: str, data_dir: str | Path | None) -> Any:
    import tensorflow_datasets as tfds

    if (Path(name) / "dataset_info.json").is_file():
        return tfds.builder_from_directory(name)
    try:
        builder = tfds.builder(name, data_dir=str(data_dir) if data_dir else None, file_format="array_record")
    except tfds.core.DatasetNotFoundError as error:
        raise ValueError(
            f"{name!r} is neither a data set known to TFDS nor a folder with dataset_info.json."
        ) from error
    if not builder.info.splits:
        try:
            builder.download_and_prepare()
        except ImportError as error:
            raise ValueError(
                f"{name} is not prepared in {builder.data_dir}, and preparing it needs TensorFlow ({error}). "
                f"With TensorFlow installed, run: tfds build {name} --file_format=array_record, then use its folder."
            ) from error
    return builder
