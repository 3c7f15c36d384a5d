"""T5's tokenizer from local files against transformers' and sentencepiece's own, on a vocabulary made here."""

import json
import struct
import subprocess
import sys

import numpy as np
import pytest

from jvgen.models.t5 import tokenizer
from jvgen.models.t5.sentencepiece_file import read_vocabulary

pytest.importorskip("tokenizers")

CAPTIONS = [
    "",
    "A red ball",
    "  two   spaces\there\n",
    "café naïve ﬁne ½ 　wide Ａ",  # marks apart, ligature, fraction, wide space and letter
    "zebra 日本 😀 q",
    "the </s> end <extra_id_3> <pad>x",
    "▁x a\u200bb \u00a0 c",
    "A red ball rolls slowly. " * 30,
]
CORPUS = [
    "A red ball rolls slowly to the left of the tall green tree.",
    "The panda, dressed in a small red jacket, plays guitar!",
    "two dogs run; (one) jumps over 3 fences -- café naïve",
    "video of sunset over the ocean with waves in 4K",
] * 20


LENGTHS = [40, 7, 1]
# In a process of its own: sentencepiece crashes the interpreter beside other compiled modules (see tests/conftest.py).
REFERENCE = """
import json, sys
import sentencepiece
import transformers

folder, corpus, captions, lengths = sys.argv[1], *map(json.loads, sys.argv[2:])
with open(f"{folder}/spiece.model", "wb") as written:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus), model_writer=written, vocab_size=60, model_type="unigram", minloglevel=2,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
    )
model = sentencepiece.SentencePieceProcessor(model_file=f"{folder}/spiece.model")
numbers = range(model.get_piece_size())
tokenizer = transformers.T5TokenizerFast.from_pretrained(folder)
tokenizer.save_pretrained(f"{folder}/of_transformers")
print(json.dumps({
    "ids": [model.encode(caption) for caption in captions],
    "pieces": [[model.id_to_piece(number), model.get_score(number)] for number in numbers],
    "transformers": {
        length: tokenizer(captions, padding="max_length", max_length=length, truncation=True).input_ids
        for length in lengths
    },
}))
"""


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """A folder with a `spiece.model` of 60 pieces that has T5's special tokens and its normalization of text; and what
    sentencepiece and transformers make of the captions with it."""
    path = tmp_path_factory.mktemp("tokenizer")
    command = [sys.executable, "-c", REFERENCE, str(path), *map(json.dumps, (CORPUS, CAPTIONS, LENGTHS))]
    found = subprocess.run(command, capture_output=True, text=True)
    if "ModuleNotFoundError" in found.stderr:
        pytest.skip("sentencepiece or transformers is not installed")
    assert found.returncode == 0, found.stderr
    return path, json.loads(found.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def folder(reference):
    return reference[0]


@pytest.mark.torch
@pytest.mark.parametrize("length", LENGTHS)
def test_token_ids_are_those_of_transformers(reference, length):
    folder, theirs = reference
    ours = tokenizer.load(folder)
    for caption, expected in zip(CAPTIONS, theirs["transformers"][str(length)], strict=True):
        assert ours(caption, length).tolist() == expected, caption


@pytest.mark.torch
def test_both_files_of_a_tokenizer_give_the_same(folder):
    written = folder / "of_transformers"
    assert (written / "tokenizer.json").is_file() and not (written / "spiece.model").exists()
    one, other = tokenizer.load(folder), tokenizer.load(written)
    for caption in CAPTIONS:
        np.testing.assert_array_equal(one(caption, 40), other(caption, 40))


def test_token_ids_are_those_of_sentencepiece(reference):
    folder, theirs = reference
    ours = tokenizer.load(folder)
    for caption, ids in zip(CAPTIONS, theirs["ids"], strict=True):
        if "</s>" not in caption:  # Plain text for sentencepiece.
            assert ours(caption, len(ids) + 1).tolist() == [*ids, 1], caption
    assert [list(piece) for piece in read_vocabulary(folder / "spiece.model").pieces] == theirs["pieces"]


def test_truncated_text(folder):
    ours = tokenizer.load(folder)
    caption = "A red ball rolls. Two dogs run."
    length = int(np.count_nonzero(ours(caption, 99)))
    assert ours.truncated_text(caption, length) == ""
    assert ours.truncated_text("", 1) == ""
    cut = ours.truncated_text(caption, length - 4)
    assert cut and caption.endswith(cut)
    kept = caption[: len(caption) - len(cut)]
    assert ours(caption, length - 4).tolist() == ours(kept, length - 4).tolist()


def _piece(text: str, score: float) -> bytes:
    body = b"\x0a" + bytes([len(text.encode())]) + text.encode() + b"\x15" + struct.pack("<f", score)
    return b"\x0a" + bytes([len(body)]) + body


PIECES = b"".join(_piece(text, -float(n)) for n, text in enumerate(["<pad>", "</s>", "<unk>", "▁", "▁a", "b"]))


def test_a_vocabulary_written_by_hand(tmp_path):
    # A field of each kind that is not read: a number, four and eight bytes.
    (tmp_path / "spiece.model").write_bytes(PIECES + b"\x78\x96\x01" + b"\x7d\x00\x00\x00\x00" + b"\x79" + bytes(8))
    tokenize = tokenizer.load(tmp_path)
    assert tokenize("a ab b", 8).tolist() == [4, 4, 5, 3, 5, 1, 0, 0]
    assert tokenize("ab", 2).tolist() == [4, 1]


@pytest.mark.parametrize(
    "content, said",
    [
        (b"", "has no pieces"),
        (PIECES[:-3], "truncated at byte"),
        (PIECES + b"\x0b", "a field of kind 3"),
        (PIECES + b"\x0a\x02\x15", "a corrupt sentencepiece file"),
        (PIECES + b"\xff" * 12, "a number without an end"),
        (PIECES + b"\x12\x02\x18\x02", "of type 2"),
        (_piece("a", 0.0), "has 1 pieces"),
        (b"<html>not found</html>", "a corrupt sentencepiece file"),
    ],
    ids=["empty", "short", "kind", "float", "endless", "model", "one", "html"],
)
def test_corrupt_vocabularies_are_refused(tmp_path, content, said):
    (tmp_path / "spiece.model").write_bytes(content)
    with pytest.raises(ValueError, match=said):
        tokenizer.load(tmp_path)


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    (tmp_path / "spiece.model").write_bytes(PIECES)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ValueError, match=r"pip install jvgen\[t5\]"):
        tokenizer.load(tmp_path)
