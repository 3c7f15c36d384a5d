"""A server of buckets on this machine: `python -m tests.bucket_server PORT`. `gs://bucket` exists and is empty.

It is gcp-storage-emulator with what TensorStore needs added: generations of objects in answers, and requests that hold
for one generation only.
"""

import sys
import threading
from http import HTTPStatus
from typing import Any

from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.handlers import objects
from gcp_storage_emulator.server import create_server

BUCKET = "bucket"
_lock = threading.RLock()
_download, _upload = objects.download, objects._media_upload


def environment(port: int) -> dict[str, str]:
    """Variables with which gcsfs, google-cloud-storage and TensorStore talk to the server, without credentials."""
    url = f"http://127.0.0.1:{port}"
    return {
        "STORAGE_EMULATOR_HOST": url,
        "TENSORSTORE_GCS_HTTP_URL": url,
        # No look-up of the metadata server of a cloud, and none of the bucket's kind, which needs gRPC.
        "NO_GCE_CHECK": "true",
        "GCE_METADATA_HOST": "127.0.0.1:1",
        "GCE_METADATA_ROOT": "127.0.0.1:1",
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
    }


def download(request: Any, response: Any, storage: Any, *arguments: Any, **options: Any) -> None:
    """Content of an object, with its generation."""
    with _lock:
        _download(request, response, storage)
        if response.status in (HTTPStatus.OK, HTTPStatus.PARTIAL_CONTENT):
            generation = _generation(storage, request.params["bucket_name"], request.params["object_id"])
            response["x-goog-generation"] = generation
            if request.query.get("ifGenerationNotMatch") == [generation]:
                response.status = HTTPStatus.NOT_MODIFIED
                response.write_file(b"")


def upload(request: Any, response: Any, storage: Any) -> None:
    """Create or replace an object, if it still has the expected generation (0: does not exist)."""
    with _lock:
        expected = request.query.get("ifGenerationMatch")
        if expected and expected != [_generation(storage, request.params["bucket_name"], request.query["name"][0])]:
            _ = request.data  # The body has to be read before the next request of the connection.
            response.status = HTTPStatus.PRECONDITION_FAILED
            return
        _upload(request, response, storage)


def _generation(storage: Any, bucket: str, name: str) -> str:
    try:
        return storage.get_file_obj(bucket, name)["generation"]
    except NotFound:
        return "0"


def main() -> None:
    """Serve until the process is ended."""
    objects.download, objects._media_upload = download, upload
    server = create_server("127.0.0.1", int(sys.argv[1]), in_memory=True, default_bucket=BUCKET)
    server.start()
    print("ready", flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main()
