"""Builds copies of data sets with the embeddings of their captions, so that training never runs the text encoder."""

import dataclasses
import functools
from typing import Any

import ml_dtypes
import numpy as np

from jvgen.data.builders.batches import BatchEncoder, ToEncode
from jvgen.data.builders.build_loop import (
    BuildJob,
    Execution,
    Made,
    Progress,
    Summary,
    available_cpus,
    build_dataset,
)
from jvgen.data.builders.units import records_per_unit
from jvgen.data.builders.up_to_date import existing, source_digests
from jvgen.data.store.empty_caption import packed
from jvgen.data.store.records import Record
from jvgen.data.store.sources import Source, bytes_of, find_dataset, open_source, read_metadata, splits
from jvgen.data.stream.source_checks import TEXT_FORMAT
from jvgen.finite import narrowed
from jvgen.storage import Path


class CaptionEncoder(BatchEncoder):
    """A `BatchEncoder` of captions: tokens `L`, int32, to embeddings `rows C`, bfloat16."""

    def tokenize(self, caption: str) -> np.ndarray:
        """The tokens of a caption; thread-safe."""
        raise NotImplementedError


def build_text_embeddings(
    source: str | Path,
    out: str | Path,
    encoder: CaptionEncoder,
    *,
    made_with: dict[str, Any],
    workers: int | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    execution: Execution | None = None,
) -> Summary:
    """Copy a data set, with the embedding of every caption beside it.

    The embedding of the empty caption, for dropped captions, is in `jvgen.json`.

    Args:
      source: folder of a data set, of pixels or latents; its splits are kept.
      out: folder of the new data set.
      encoder: of captions; called in this thread.
      made_with: what `jvgen.data.stream.source_checks.text_embeddings_of` returns, without the format.
      workers: threads that read and tokenize ahead of the encoder; by default one per CPU.
      overwrite, progress, execution: as in `jvgen.data.builders.build_loop.build_dataset`.

    Returns:
      The summary; of the data set at `out` if it has the embeddings already.

    Raises:
      ValueError: no data set at `source`, or a data set at `out` that was made of something else.
      NotFinite: embeddings with NaN or infinity.
    """
    execution = execution or Execution()
    folder = find_dataset(source)
    sources = {split: open_source(folder, split) for split in splits(folder)}
    before = read_metadata(folder)
    metadata = {
        # What the records had stays true: latents are copied.
        **{name: before[name] for name in ("latents",) if name in before},
        "origin": "text-embeddings",
        "options": {"source": str(folder)},
        "text_embeddings": {"format": TEXT_FORMAT, **made_with},
        "source_digests": source_digests(sources, out, execution),
    }
    there = existing(out, metadata, ("text_embeddings", "source_digests"), overwrite=overwrite, execution=execution)
    if there is not None:
        return there
    empty = encoder.end(encoder.begin([encoder.tokenize("")]))[0]
    metadata["empty_caption"] = packed(_checked("the empty caption", empty))
    if execution.jobs_per_unit is None:
        records = max(1, sum(map(len, sources.values())))
        stored = sum(bytes_of(folder, split) for split in sources) / records
        execution = dataclasses.replace(execution, jobs_per_unit=records_per_unit(stored + empty.nbytes))
    jobs = [BuildJob(split, str(s.index.id[row]), (s, row)) for split, s in sources.items() for row in range(len(s))]
    return build_dataset(
        out, jobs, functools.partial(_captions, tokenize=encoder.tokenize), encoder=encoder,
        description=f"{folder.name} with embeddings of its captions.", metadata=metadata,
        workers=available_cpus() if workers is None else workers, overwrite=overwrite, progress=progress,
        execution=execution,
    )  # fmt: skip


def _captions(payload: tuple[Source, int], tokenize: Any) -> Any:
    record = payload[0].read(payload[1])
    if not record.captions:
        return record
    # A caption that occurs twice is encoded once.
    distinct = list(dict.fromkeys(record.captions))
    places = [distinct.index(caption) for caption in record.captions]
    return ToEncode(tuple(map(tokenize, distinct)), functools.partial(_made, record, places))


def _made(record: Record, places: list[int], embeddings: list[np.ndarray]) -> Made:
    own = [_checked(f"record {record.id}: the embedding of a caption", embeddings[place]) for place in places]
    lengths = np.array([len(embedding) for embedding in own], np.int32)
    return Made((record.replace(text_embeddings=np.concatenate(own), text_lengths=lengths),))


def _checked(name: str, embedding: np.ndarray) -> np.ndarray:
    return narrowed(name, embedding, ml_dtypes.bfloat16)
