"""Checks of a run's data sets: that cached latents match its VAE, and that pixels are there if it needs them."""

from typing import Any

from jvgen.data.store.sources import bytes_of, find_dataset, open_source, read_metadata
from jvgen.data.stream.config import DataConfig, SourceConfig
from jvgen.storage import Path, is_remote
from jvgen.storage.cache import GIB, SIZE_VARIABLE

LATENTS_FORMAT = 1  # incremented when the preprocessing of the encoder's input changes
TEXT_FORMAT = 1  # of cached embeddings of captions


def check_latents(folder: str | Path, encoder_digest: str | None) -> dict[str, Any]:
    """Check that the cached latents of a data set were made by the encoder of a run.

    Args:
      folder: of the data set.
      encoder_digest: of the weights of the run's encoder; None if the run names none, so that any will do.

    Returns:
      Metadata of the latents: "encoder", "height", "width", "frames", "stride", "format".

    Raises:
      ValueError: a data set without latents, or with latents of another encoder or another format.
    """
    folder = find_dataset(folder)
    made_with = read_metadata(folder).get("latents")
    if made_with is None:
        raise ValueError(
            f"{folder} has no cached latents; make them with `jvgen data build latents`, or set "
            "task.latents = 'pixels'."
        )
    if made_with["format"] != LATENTS_FORMAT:
        raise ValueError(
            f"{folder}: its latents have format {made_with['format']}, this version of jvgen needs {LATENTS_FORMAT}. "
            "Build them again."
        )
    if encoder_digest is not None and made_with["encoder"] != encoder_digest:
        raise ValueError(
            f"{folder}: its latents come from encoder {made_with['encoder'][:12]}, "
            f"the run has {encoder_digest[:12]}. Build them again with the run's VAE, "
            "or use the VAE that made them."
        )
    return made_with


def check_one_encoder(data: DataConfig, encoder_digest: str | None) -> None:
    """Raise `ValueError` unless all data sets of a run have latents of one encoder: `encoder_digest` if it is given."""
    encoders: dict[str, str] = {}
    for path in sorted({source.path for source in (*data.sources, *data.evaluation_sources)}):
        encoders.setdefault(check_latents(path, encoder_digest)["encoder"], path)
    if len(encoders) > 1:
        listed = ", ".join(f"{path} by {encoder[:12]}" for encoder, path in encoders.items())
        raise ValueError(
            f"data.sources: the latents were made by different encoders ({listed}); build them with one VAE."
        )


def check_reachable_encoders(data: DataConfig, encoder_digest: str) -> list[str]:
    """Check that the latents of a run's data sets, as far as these are still there, were made by one encoder.

    Args:
      data: of the run.
      encoder_digest: of the encoder's weights.

    Returns:
      Paths of data sets that could not be read.

    Raises:
      ValueError: latents of another encoder.
    """
    unread = []
    for path in sorted({source.path for source in (*data.sources, *data.evaluation_sources)}):
        try:
            folder = find_dataset(path)
            read_metadata(folder)
        except (ValueError, OSError):
            unread.append(path)
            continue
        check_latents(folder, encoder_digest)
    return unread


def text_embeddings_of(folder: str | Path) -> dict[str, Any]:
    """What the cached embeddings of a data set's captions were made with.

    Returns:
      "format", "encoder" and "tokenizer" (digests), "length", "padding", "width", "compute_dtype".

    Raises:
      ValueError: a data set without embeddings, or with those of another format.
    """
    folder = find_dataset(folder)
    made_with = read_metadata(folder).get("text_embeddings")
    if made_with is None:
        raise ValueError(
            f"{folder} has no embeddings of its captions; make them with `jvgen data build text-embeddings`, or set "
            "task.text.embeddings = none."
        )
    if made_with["format"] != TEXT_FORMAT:
        raise ValueError(
            f"{folder}: its embeddings of captions have format {made_with['format']}, this version of jvgen needs "
            f"{TEXT_FORMAT}. Build them again."
        )
    return made_with


def check_text_embeddings(data: DataConfig, expected: dict[str, Any]) -> None:
    """Check that all data sets of a run have embeddings of captions that were made with the same.

    Args:
      data: of the run.
      expected: some of what `text_embeddings_of` returns.

    Raises:
      ValueError: names the data set and what differs, or the option that changes captions.
    """
    for path in sorted({source.path for source in (*data.sources, *data.evaluation_sources)}):
        made_with = text_embeddings_of(path)
        wrong = [
            f"{name} {str(made_with[name])[:12]}, the run has {str(value)[:12]}"
            for name, value in expected.items()
            if made_with[name] != value
        ]
        if wrong:
            raise ValueError(
                f"{path}: its embeddings of captions were made with {'; '.join(wrong)}. Build them again "
                "(`jvgen data build text-embeddings`), or change task.text."
            )
    captions = data.captions
    if captions is not None and (captions.first_sentence or captions.sentence_dropout):
        raise ValueError(
            f"data.captions.first_sentence = {captions.first_sentence}, sentence_dropout = "
            f"{captions.sentence_dropout}: embeddings are of whole captions; set both to 0, store short captions "
            "beside long ones (data.captions.weights), or set task.text.embeddings = none."
        )


def check_pixels(source: SourceConfig) -> None:
    """Raise `ValueError` if a data set has cached latents and no pixels; reads its first record."""
    opened = open_source(source.path, source.split)
    if len(opened) and not opened.read(0).clips:
        made_from = opened.metadata.get("options", {}).get("source", "the one they were made from")
        raise ValueError(
            f"{source.path} [{source.split}] has cached latents but no pixels, which this run needs; use the data set "
            f"with the clips ({made_from}), or build one that has both: `jvgen data build latents --keep-clips`."
        )


def check_cache(config: DataConfig) -> None:
    """Raise `ValueError` if data sets in buckets do not fit the cache: most reads would then download a shard again."""
    remote = {source.path: source for source in config.sources if is_remote(source.path)}
    needed, cache = sum(bytes_of(source.path, source.split) for source in remote.values()), config.cache()
    if needed > cache.limit:
        raise ValueError(
            f"{', '.join(remote)}: {needed / GIB:.2f} GiB of records, more than the cache of {cache.limit / GIB:.2f} "
            f"GiB in {cache.folder}; raise data.cache_gib or {SIZE_VARIABLE}, or mount the bucket and name the mounted "
            "folder."
        )
