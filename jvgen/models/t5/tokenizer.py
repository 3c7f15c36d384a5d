"""T5's tokenizer, read from a local `tokenizer.json` or `spiece.model` by the optional package `tokenizers`."""

import types

import numpy as np

from jvgen.models.t5.sentencepiece_file import read_vocabulary
from jvgen.storage import Path, as_path, local_copy, read_json_object, reading

PAD, END, UNKNOWN = 0, 1, 2
FILES = ("tokenizer.json", "spiece.model")
# Tokens for masked spans, after the pieces of the file, starting with <extra_id_99>.
SENTINELS = 100


class T5Tokenizer:
    """Captions to token ids.

    Args:
      tokenizer: a `tokenizers.Tokenizer` that ends every caption with the end token.
    """

    def __init__(self, tokenizer):
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self._tokenizer = tokenizer

    def __call__(self, caption: str, length: int) -> np.ndarray:
        """Token ids, int32 `[length]`: truncated to `length` tokens including the end token, or padded with zeros."""
        ids = self._tokenizer.encode(caption).ids
        if len(ids) > length:
            ids = [*ids[: length - 1], ids[-1]]
        return np.array(ids + [PAD] * (length - len(ids)), dtype=np.int32)

    def truncated_text(self, caption: str, length: int) -> str:
        """The text that is truncated if a caption has more than `length` tokens, including the end token; or ""."""
        encoded = self._tokenizer.encode(caption)
        if len(encoded.ids) <= length:
            return ""
        return caption[encoded.offsets[length - 1][0] :].strip()


def load(folder: str | Path) -> T5Tokenizer:
    """The tokenizer in a folder.

    Args:
      folder: contains `tokenizer.json` or `spiece.model`, for example the folder `tokenizer` of a CogVideoX pipeline.

    Raises:
      ValueError: no such file, a file that is not a tokenizer, or the package `tokenizers` is not installed.
    """
    paths = [local_copy(as_path(folder) / name) for name in FILES]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        raise ValueError(f"no tokenizer at {str(folder)!r}: give a local folder with tokenizer.json or spiece.model.")
    try:
        import tokenizers
    except ModuleNotFoundError as error:
        raise ValueError(
            f"reading {str(path)!r} needs the package 'tokenizers': install it with `pip install jvgen[t5]`."
        ) from error
    read = _read_json if path.suffix == ".json" else _read_sentencepiece
    return T5Tokenizer(read(path, tokenizers))


def _read_json(path: Path, tokenizers: types.ModuleType):
    if "model" not in read_json_object(path):
        raise ValueError(f"{str(path)!r} is not a tokenizer: it describes no model.")
    with reading(path, "is not a tokenizer"):
        return tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))


def _read_sentencepiece(path: Path, tokenizers: types.ModuleType):
    """The tokenizer that transformers builds from the file: marks before words for spaces, and an end token."""
    vocabulary = read_vocabulary(path)
    names = [piece for piece, _ in vocabulary.pieces[: UNKNOWN + 1]]
    if len(names) <= UNKNOWN:
        raise ValueError(f"{str(path)!r} has {len(names)} pieces; T5 files start with padding, end and unknown.")
    sentinels = [f"<extra_id_{number}>" for number in range(SENTINELS)]
    pieces = [*vocabulary.pieces, *((name, 0.0) for name in reversed(sentinels))]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, unk_id=UNKNOWN, byte_fallback=False))
    if vocabulary.character_map:
        tokenizer.normalizer = tokenizers.normalizers.Precompiled(vocabulary.character_map)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [tokenizers.pre_tokenizers.WhitespaceSplit(), tokenizers.pre_tokenizers.Metaspace(prepend_scheme="always")]
    )
    tokenizer.add_special_tokens([*names, *sentinels])
    end = names[END]
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=["$A", end], pair=["$A", end, "$B", end], special_tokens=[(end, END)]
    )
    return tokenizer
