"""Which versions are running: installed packages and the git commit of the checkout; imports none of them."""

import subprocess
from importlib import metadata
from pathlib import Path

PACKAGES = ("jvgen", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
_PACKAGE = Path(__file__).parent


def package_versions() -> dict[str, str]:
    """Installed versions by package."""
    return {name: metadata.version(name) for name in PACKAGES}


def git_commit() -> str:
    """Commit of the checkout that jvgen is imported from, "+" appended if it has changes; of an installed wheel the
    commit that it was built from; "" if neither is known."""
    if not (_PACKAGE.parent / ".git").exists():  # of another repository, say one that has a virtual environment in it
        carried = _PACKAGE / "commit.txt"
        return carried.read_text().strip() if carried.is_file() else ""
    try:
        commit = _git("rev-parse", "HEAD")
        return commit + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return ""


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=_PACKAGE, capture_output=True, text=True, timeout=20, check=True)
    return done.stdout.strip()
