"""TFDS's own description of a data set, `dataset_info.json`: read without TFDS, which takes seconds to import."""

from typing import Any, NamedTuple

from jvgen.data.store.index import ShardInfo
from jvgen.storage import Path, as_path, read_json_object

NAME = "dataset_info.json"
VERSION = "1.0.0"  # required by TFDS
MODULE = "jvgen.data.writer"  # recorded by TFDS; constant, so that moving a file of jvgen does not change data sets
DESCRIPTION = "description"
# Without the number of shards, so that a data set can grow without renaming files.
TEMPLATE = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_INDEX}"
_TEMPLATE_0_1_0 = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"


class Split(NamedTuple):
    """A split: its files, in order, and the bytes of its records."""

    shards: tuple[ShardInfo, ...]
    bytes: int

    @property
    def records(self) -> int:
        """Number of records."""
        return sum(shard.records for shard in self.shards)


def read(folder: str | Path) -> dict[str, Split]:
    """The splits of a data set by name.

    Raises:
      ValueError: `dataset_info.json` is missing, damaged, or of a data set in another format.
    """
    path = as_path(folder) / NAME
    try:
        content = read_json_object(path)
        dataset, file_format = content["name"], content.get("fileFormat", "array_record")
        if file_format != "array_record":
            raise ValueError(f"its files are in the format {file_format}, not array_record")
        return {split["name"]: _split(dataset, file_format, split) for split in content.get("splits", ())}
    except (FileNotFoundError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder}: {NAME} cannot be read as TFDS metadata ({error}).") from error


def description(folder: str | Path) -> str:
    """The line that describes the data set."""
    return str(read_json_object(as_path(folder) / NAME).get(DESCRIPTION, ""))


def shard_name(dataset: str, split: str, number: int, template: str = TEMPLATE, count: int = 0) -> str:
    """File name of a shard; `count` is needed for templates that contain the number of shards."""
    return template.format(
        DATASET=dataset,
        SPLIT=split,
        FILEFORMAT="array_record",
        SHARD_INDEX=f"{number:05d}",
        NUM_SHARDS=f"{count:05d}",
        SHARD_X_OF_Y=f"{number:05d}-of-{count:05d}",
    )


def identifier(name: str) -> str:
    """A TFDS data set name: lower-case words joined by underscores, starting with a letter."""
    text = "".join(c.lower() if c.isascii() and c.isalnum() else "_" for c in name).strip("_") or "dataset"
    return text if text[0].isalpha() else f"dataset_{text}"


def write(folder: Path, dataset: str, text: str, splits: dict[str, Split]) -> None:
    """Write `dataset_info.json` and `features.json`, by which TFDS reads the data set.

    Args:
      dataset: TFDS name of the data set.
      text: one line that describes it.
    """
    import tensorflow_datasets as tfds

    from jvgen.data.store import records

    infos = []
    for name, split in splits.items():
        template = tfds.core.ShardedFileTemplate(
            data_dir=folder, template=TEMPLATE, dataset_name=dataset, split=name, filetype_suffix="array_record"
        )
        lengths = [shard.records for shard in split.shards]
        infos.append(
            tfds.core.SplitInfo(name=name, shard_lengths=lengths, num_bytes=split.bytes, filename_template=template)
        )
    identity = tfds.core.dataset_info.DatasetIdentity(
        name=dataset, version=tfds.core.Version(VERSION), data_dir=str(folder), module_name=MODULE
    )
    info = tfds.core.DatasetInfo(
        builder=identity, description=text, features=records.features(), disable_shuffling=True
    )
    info.set_file_format("array_record")
    info.set_splits(tfds.core.SplitDict(infos))
    info.write_to_directory(folder)


def _split(dataset: str, file_format: str, split: dict[str, Any]) -> Split:
    lengths = [int(length) for length in split["shardLengths"]]
    template = split.get("filepathTemplate", _TEMPLATE_0_1_0)
    files = [shard_name(dataset, split["name"], n, template, len(lengths)) for n in range(len(lengths))]
    shards = tuple(ShardInfo(file, length, 0, "") for file, length in zip(files, lengths, strict=True))
    return Split(shards, int(split.get("numBytes", 0)))
