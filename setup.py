"""What pyproject.toml cannot say: a wheel and an sdist carry the commit that they were built from."""

import subprocess
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

ROOT = Path(__file__).parent
COMMIT = Path("jvgen") / "commit.txt"


def write_commit(folder: Path) -> None:
    """Writes the commit of this checkout; of an sdist, which is none, the one that it carries."""
    carried = ROOT / COMMIT
    if (ROOT / ".git").exists():
        words = ["git", "-C", str(ROOT)]
        commit = subprocess.run([*words, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout
        changed = [*words, "status", "--porcelain", "--untracked-files=no"]
        commit = commit.strip() + "+" * bool(subprocess.run(changed, capture_output=True, check=True).stdout)
    else:
        commit = carried.read_text().strip() if carried.is_file() else ""
    (folder / COMMIT).write_text(commit + "\n")


class BuildWithCommit(build_py):
    """Adds the file to a wheel; an editable install asks git."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            write_commit(Path(self.build_lib))


class SdistWithCommit(sdist):
    """Adds the file to an sdist."""

    def make_release_tree(self, base_dir: str, files: list[str]) -> None:
        super().make_release_tree(base_dir, files)
        write_commit(Path(base_dir))


setup(cmdclass={"build_py": BuildWithCommit, "sdist": SdistWithCommit})
