"""Content hashes of weight files: whether a run resumes with the frozen weights that it started with."""

import hashlib
from pathlib import Path

CHUNK = 1 << 24


def content_digest(path: str | Path) -> str:
    """SHA-256 of a file, or of a folder's .json and .safetensors files by name.

    Raises:
      ValueError: no such path.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"weights {str(path)!r}: no such file or folder.")
    files = [path] if path.is_file() else sorted(p for p in path.iterdir() if p.suffix in (".json", ".safetensors"))
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name} {file.stat().st_size}\n".encode())
        with file.open("rb") as stream:
            while block := stream.read(CHUNK):
                digest.update(block)
    return digest.hexdigest()
