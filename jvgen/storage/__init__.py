"""Files on local disks and in buckets: paths, reads and writes with retries, local copies of remote files.

Local paths are `pathlib.Path`, those of buckets (`gs://`, `s3://`) `etils.epath.Path`; both have the methods that jvgen
uses. What a bucket does not have (rename, append, file descriptors, memory maps) has a function here.
"""

from jvgen.storage.cache import FileCache, default_cache
from jvgen.storage.errors import StorageError, StorageUnavailable
from jvgen.storage.file_kinds import (
    UnreadableFile,
    looks_like,
    read_json,
    read_json_object,
    read_utf8,
    reading,
    unreadable,
)
from jvgen.storage.files import (
    appending,
    check_checkpoint_folder,
    check_run_directory,
    copy_file,
    is_empty,
    local_copy,
    local_file,
    move_tree,
    read_bytes,
    read_text,
    remove_tree,
    size,
    stamp,
    upload_folder,
    write_bytes,
    write_text,
)
from jvgen.storage.mirror import Mirror
from jvgen.storage.partials import partial_folder, remove_dead_partials
from jvgen.storage.paths import Path, absolute, as_path, is_remote, recordings, resolved
from jvgen.storage.retries import Retries, count_of_retries

__all__ = [
    "FileCache",
    "Mirror",
    "Path",
    "Retries",
    "StorageError",
    "StorageUnavailable",
    "UnreadableFile",
    "absolute",
    "appending",
    "as_path",
    "check_checkpoint_folder",
    "check_run_directory",
    "copy_file",
    "count_of_retries",
    "default_cache",
    "is_empty",
    "is_remote",
    "local_copy",
    "local_file",
    "looks_like",
    "move_tree",
    "partial_folder",
    "read_bytes",
    "read_json",
    "read_json_object",
    "read_text",
    "read_utf8",
    "reading",
    "recordings",
    "remove_dead_partials",
    "remove_tree",
    "resolved",
    "size",
    "stamp",
    "unreadable",
    "upload_folder",
    "write_bytes",
    "write_text",
]
