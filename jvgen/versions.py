"""Which versions are running: installed packages and the git commit of the checkout; imports none of them."""

import subprocess
from importlib import metadata
from pathlib import Path

PACKAGES = ("jvgen", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def package_versions() -> dict[str, str]:
    """Installed versions by package."""
    return {name: metadata.version(name) for name in PACKAGES}


def git_commit() -> str:
    """Commit of the checkout that jvgen is imported from, "+" appended if it has changes; "" outside of a checkout."""
    try:
        commit = _git("rev-parse", "HEAD")
        return commit + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return ""


def _git(*arguments: str) -> str:
    folder = Path(__file__).parent
    done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=20, check=True)
    return done.stdout.strip()
