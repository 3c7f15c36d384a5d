"""What went wrong in a bucket, in one sentence that says what to do."""

from jvgen import exit_codes
from jvgen.storage.paths import Path

_CREDENTIALS = {
    "gs": "run `gcloud auth application-default login`, or set GOOGLE_APPLICATION_CREDENTIALS to a key file; on a "
    "cloud VM or in GKE, give its service account access to the bucket",
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE; on a cloud VM, give its role access to "
    "the bucket",
}
# Names of exceptions of google.auth, gcsfs and botocore, which need not be installed.
_NO_CREDENTIALS = {
    "DefaultCredentialsError", "RefreshError", "NoCredentialsError", "PartialCredentialsError",
    "CredentialRetrievalError", "NoAuthTokenError", "UnauthorizedSSOTokenError",
}  # fmt: skip
_PERMANENT = (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError)


class StorageError(OSError):
    """A bucket cannot be read or written, and trying again does not help; the message says what to do."""

    @property
    def exit_code(self) -> int:
        """Exit code of the process if this ends it (`jvgen.exit_codes`)."""
        return exit_codes.USER_ERROR


class StorageUnavailable(StorageError):
    """A bucket that still could not be read or written after retries; it may pass."""

    @property
    def exit_code(self) -> int:
        """As in `StorageError`."""
        return exit_codes.restart_code()


def is_transient(error: BaseException) -> bool:
    """Whether trying again can help: throttling (429), server errors (5xx), lost connections, timeouts."""
    if isinstance(error, _PERMANENT) or type(error).__name__ in _NO_CREDENTIALS or exit_codes.is_full(error):
        return False
    code = _status(error)
    if code is not None:
        return code in (408, 429) or code >= 500
    module = type(error).__module__
    return isinstance(error, (OSError, TimeoutError, EOFError)) or module.startswith(("aiohttp", "google.auth"))


def explain(error: BaseException, path: Path, action: str, attempts: int = 1) -> OSError:
    """The error to raise for a failure: `FileNotFoundError` and full disks as they are, else a `StorageError`."""
    if exit_codes.is_full(error):
        return error
    scheme = str(path).partition("://")[0]
    code = _status(error)
    if type(error).__name__ in _NO_CREDENTIALS or code == 401:
        return StorageError(f"cannot {action} {path}: no valid credentials ({_short(error)}); {_CREDENTIALS[scheme]}.")
    if isinstance(error, PermissionError) or code == 403:
        return StorageError(f"cannot {action} {path}: access denied ({_short(error)}); {_CREDENTIALS[scheme]}.")
    if isinstance(error, FileNotFoundError) or code == 404:
        if not bucket_exists(path):
            bucket = "://".join((scheme, str(path).removeprefix(f"{scheme}://").split("/")[0]))
            return StorageError(
                f"cannot {action} {path}: the bucket {bucket} does not exist; create it, or correct the path."
            )
        return FileNotFoundError(f"{path} does not exist")
    again = f" after {attempts} attempts" if attempts > 1 else ""
    kind = StorageUnavailable if is_transient(error) else StorageError
    return kind(f"cannot {action} {path}{again}: {_short(error)}.")


def bucket_exists(path: Path) -> bool:
    """Whether the bucket of a path exists; True if that cannot be told, for lack of a permission."""
    import fsspec

    fs, key = fsspec.core.url_to_fs(str(path))
    try:
        fs.info(key.strip("/").split("/")[0])
    except FileNotFoundError:
        return False
    except Exception:
        return True
    return True


def _status(error: BaseException) -> int | None:
    """HTTP status of an error of gcsfs, aiohttp or botocore."""
    code = getattr(error, "code", getattr(error, "status", None))
    response = getattr(error, "response", None)
    if code is None and isinstance(response, dict):
        code = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    try:
        return int(code)
    except (TypeError, ValueError):
        return None


def _short(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else repr(error)
