"""One error for files that a reader cannot read: it names the file, what is wrong with it, and what it looks like."""

import contextlib
import json
from collections.abc import Iterator
from typing import Any

from jvgen import exit_codes
from jvgen.storage.files import read_bytes
from jvgen.storage.paths import Path, is_remote

_HEAD_BYTES = 1024
_REASON_CHARACTERS = 300
# What files start with; the first that fits counts.
_STARTS: tuple[tuple[bytes, str], ...] = (
    (
        b"version https://git-lfs",
        "a git-lfs pointer, in place of the file itself: run `git lfs pull` where it was cloned",
    ),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file (.h5)"),
    (b"GGUF", "a GGUF file, which holds quantized weights"),
    (b"\x93NUMPY", "a NumPy array (.npy)"),
    (b"\x1f\x8b", "a gzip archive (.gz, .tar.gz)"),
    (b"\x28\xb5\x2f\xfd", "a zstd archive"),
    (b"\xfd7zXZ", "an xz archive"),
    (b"BZh", "a bzip2 archive"),
    (b"7z\xbc\xaf", "a 7z archive"),
    (b"Rar!", "a rar archive"),
)
_MARKUP = ("<!doctype", "<html", "<?xml", "<head", "<error")


class UnreadableFile(ValueError):
    """A file that is not what it is read as; the message names it and says what it looks like."""

    exit_code = exit_codes.USER_ERROR


@contextlib.contextmanager
def reading(path: Path, problem: str, fix: str = "Get the file again.") -> Iterator[None]:
    """Everything that a reader raises in this context becomes one `UnreadableFile`.

    Errors of the system pass: a missing file, permissions, a full disk, a bucket.

    Args:
      path: file that is read.
      problem: what the message says of it: "is not a valid safetensors file".
      fix: what to do.

    Raises:
      UnreadableFile: see above.
    """
    try:
        yield
    except UnreadableFile:
        raise
    except Exception as error:
        # Archives report damage as OSError without a number.
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise unreadable(path, problem, _reason(error), fix) from error


def unreadable(path: Path, problem: str, reason: str, fix: str = "Get the file again.") -> UnreadableFile:
    """The error for a file: `path`, `problem` as in `reading`, the reason, what the file looks like, and the fix."""
    kind = looks_like(path)
    seen = f" It looks like {kind}." if kind else ""
    return UnreadableFile(f"{path} {problem}: {reason.rstrip('.')}.{seen} {fix}")


def read_utf8(path: Path) -> str:
    """The text of a UTF-8 file, without a byte-order mark.

    Raises:
      UnreadableFile: it is not UTF-8; the message has the line.
    """
    content = read_bytes(path)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        reason = f"line {line} has the byte 0x{content[error.start]:02x}"
        raise unreadable(path, "is not UTF-8 text", reason, "Save it as UTF-8.") from error


def read_json(path: Path) -> Any:
    """The value in a JSON file.

    Raises:
      UnreadableFile: it is not JSON; the message has the line.
    """
    text = read_utf8(path)
    with reading(path, "is not JSON", "Get the file again, or correct it."):
        return json.loads(text)


def read_json_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
      UnreadableFile: it is not JSON, or not an object.
    """
    value = read_json(path)
    if not isinstance(value, dict):
        raise UnreadableFile(f"{path} is not a JSON object but a {type(value).__name__}. Get the file again.")
    return value


def looks_like(path: Path) -> str | None:
    """What kind of file this is, judged by its first bytes, in words; None if that cannot be told."""
    if is_remote(path) or not path.is_file():
        return None
    size = path.stat().st_size
    with path.open("rb") as stream:
        head = stream.read(_HEAD_BYTES)
    if not head:
        return "an empty file: a download or a copy that did not finish"
    for start, kind in _STARTS:
        if head.startswith(start):
            return kind
    if head.startswith(b"PK\x03\x04"):
        return "a file of torch.save (.pt, .bin)" if b".pkl" in head else "a zip archive"
    if head[257:262] == b"ustar":
        return "a tar archive"
    if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return "a pickle (.pt, .ckpt, .pkl)"
    if not head.strip(b"\0"):
        return "zeros: a download or a copy that did not finish"
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= size - 8:
        return "a safetensors file"
    return _text_kind(head)


def _text_kind(head: bytes) -> str | None:
    try:
        # The last character may be cut.
        text = head[:-3].decode() if len(head) == _HEAD_BYTES else head.decode()
    except UnicodeDecodeError:
        return None
    if not all(character.isprintable() or character.isspace() for character in text):
        return None
    start = text.lstrip("\ufeff").lstrip()
    if start.lower().startswith(_MARKUP):
        return "a web page, which a download gives that needs a login or a confirmation"
    if start.startswith(("{", "[")):
        return "JSON"
    return f"text: {start[:40]!r}"


def _reason(error: BaseException) -> str:
    if isinstance(error, MemoryError):
        return "it asks for more memory than there is"
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    lines = str(error).strip().splitlines()
    name = type(error).__name__
    if not lines:
        return name
    # A KeyError's text is the key alone.
    text = f"{name}: {lines[0]}" if isinstance(error, (KeyError, IndexError, AttributeError, TypeError)) else lines[0]
    # NumPy goes on to say how to run what a pickle holds.
    return text.partition(" If you trust the file")[0][:_REASON_CHARACTERS]
