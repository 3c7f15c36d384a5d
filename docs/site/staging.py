"""The repository's Markdown and notebooks as pages of the site: where each goes, and links that follow it there.

Links of a file are relative to the file, as GitHub shows them. A link to another page becomes one to its place in the
site, a link to any other file of the repository becomes one to a page with that file's text, and a link to nothing is
a problem. `<!-- include PATH -->` in a page is replaced by a file as code, `<!-- include PATH#Heading -->` by the
section of a Markdown file.
"""

import fnmatch
import json
import os
import re
import shutil
from pathlib import Path

from docs.site import reference

ROOT = Path(__file__).parents[2]
# Files outside docs/ that are pages, by their page.
ELSEWHERE = {
    "launch/README.md": "launch.md",
    "ARCHITECTURE.md": "architecture.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "tests/benchmarks/README.md": "benchmarks.md",
    "jvgen/control/README.md": "networks/control.md",
}
LANGUAGES = {".py": "python", ".sh": "bash", ".yaml": "yaml", ".sbatch": "bash", ".toml": "toml", ".cff": "yaml"}
PICTURES = {".png", ".gif", ".svg", ".webp", ".jpg"}

_FENCE = re.compile(r"(?ms)^(```+|~~~+).*?^\1\s*$|^(?: {4}|\t).*?$")
_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s]+)\)")
_INCLUDE = re.compile(r"(?m)^<!-- include (\S+?)(?:#([^>]+?))? -->$")


def pages(root: Path = ROOT) -> dict[str, str]:
    """Files of the repository that are pages, by their path, with their place in the site."""
    found = {name: place for name, place in ELSEWHERE.items()}
    for path in sorted((root / "docs").rglob("*.md")):
        found[str(path.relative_to(root))] = str(path.relative_to(root / "docs"))
    for path in sorted((root / "jvgen" / "models").glob("*/README.md")):
        found[str(path.relative_to(root))] = f"networks/{path.parent.name}.md"
    for path in sorted((root / "notebooks").glob("*.ipynb")):
        found[str(path.relative_to(root))] = f"notebooks/{path.name}"
    return found


def stage(out: Path, root: Path = ROOT) -> list[str]:
    """Writes the sources of the site to a folder, and returns what is wrong with their links."""
    site = Site(root, out, pages(root))
    for name, place in site.pages.items():
        site.write(place, site.notebook(name) if name.endswith(".ipynb") else site.markdown(name))
    for picture in sorted((root / "docs").rglob("*")):
        if picture.suffix in PICTURES:
            target = out / picture.relative_to(root / "docs")
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(picture, target)
    for place, text in reference.pages(root).items():
        site.write(place, text)
    site.write_sources()
    return [*site.problems, *outside_of_menus(out)]


def outside_of_menus(source: Path) -> list[str]:
    """A problem for every page below a staged folder that no `{toctree}` lists, so that no menu leads there."""
    listed = {"index"}
    places = [str(path.relative_to(source).with_suffix("")) for path in source.rglob("*") if path.is_file()]
    for page in source.rglob("*.md"):
        for menu in re.findall(r"(?ms)^```\{toctree\}\n(.*?)^```", page.read_text()):
            names = [line for line in menu.splitlines() if line and not line.startswith(":")]
            for name in names:
                pattern = os.path.normpath(page.parent.relative_to(source) / name)
                listed |= {place for place in places if fnmatch.fnmatch(place, pattern)}
    pages_there = {str(path.relative_to(source).with_suffix("")) for path in source.rglob("*.md")}
    lost = sorted(place for place in pages_there - listed if not place.startswith("source/"))
    return [f"{place}.md: no menu leads there; add it to a toctree, in docs/index.md for one" for place in lost]


class Site:
    """Pages under way: the problems that were found, and files that need a page because one links to them."""

    def __init__(self, root: Path, out: Path, places: dict[str, str]) -> None:
        self.root, self.out, self.pages = root, out, places
        self.problems: list[str] = []
        self.sources: set[str] = {f"configs/{path.name}" for path in (root / "configs").glob("*.py")}

    def write(self, place: str, text: str) -> None:
        """Writes one page."""
        target = self.out / place
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)

    def markdown(self, name: str) -> str:
        """A Markdown file of the repository with included files and the site's links."""
        text = (self.root / name).read_text()
        text = self._relinked(text, name, self.pages[name])
        return _INCLUDE.sub(lambda match: self._included(match, name), text)

    def notebook(self, name: str) -> str:
        """A notebook with the site's links in its Markdown cells."""
        content = json.loads((self.root / name).read_text())
        content["nbformat_minor"] = 5  # which asks for an id per cell
        for number, cell in enumerate(content["cells"]):
            cell["id"] = f"cell-{number}"
            if cell["cell_type"] == "markdown":
                cell["source"] = [self._relinked("".join(cell["source"]), name, self.pages[name])]
        return json.dumps(content)

    def write_sources(self) -> None:
        """Pages with the text of the files that pages link to."""
        for name in sorted(self.sources):
            text = (self.root / name).read_text()
            language = LANGUAGES.get(Path(name).suffix, "text")
            self.write(_source_page(name), f"---\norphan: true\n---\n\n# {name}\n\n`````{language}\n{text}\n`````\n")

    def _included(self, match: re.Match, name: str) -> str:
        path = os.path.normpath(Path(name).parent / match[1])
        if not (self.root / path).is_file():
            self.problems.append(f"{name}: includes {match[1]}, which does not exist")
            return ""
        text = (self.root / path).read_text()
        if match[2] is None:
            return f"````{LANGUAGES.get(Path(path).suffix, 'text')}\n{text}````"
        found = re.search(rf"(?ms)^(#+) {re.escape(match[2])}\n(.*?)(?=^#{{1,3}} |\Z)", text)
        if not found:
            self.problems.append(f"{name}: includes {match[1]}#{match[2]}, which has no such heading")
            return ""
        return self._relinked(found[2].strip(), path, self.pages[name])

    def _relinked(self, text: str, name: str, place: str) -> str:
        """Text of the file `name` for the page at `place`: code is left as it is."""
        parts, last = [], 0
        for code in _FENCE.finditer(text):
            parts += [self._links_in(text[last : code.start()], name, place), code[0]]
            last = code.end()
        return "".join([*parts, self._links_in(text[last:], name, place)])

    def _links_in(self, text: str, name: str, place: str) -> str:
        return _LINK.sub(lambda match: self._link(match, name, place), text)

    def _link(self, match: re.Match, name: str, place: str) -> str:
        picture, label, target = match.groups()
        if re.match(r"[a-z]+:", target) or target.startswith("#"):
            return match[0]
        path, _, anchor = target.partition("#")
        path = os.path.normpath(Path(name).parent / path)
        if picture:
            return self._picture(label, path, name, place)
        if path == "README.md":
            page = "index.md"
        elif path in ("notebooks", "configs"):
            page = "notebooks.md" if path == "notebooks" else "configs.md"
        else:
            opening = [name for name in ("README.md", "__init__.py") if (self.root / path / name).is_file()]
            path = f"{path}/{opening[0]}" if opening else path
            page = self.pages.get(path)
        if page is None and path.startswith("docs/") and (self.root / path).suffix in PICTURES:
            page = path.removeprefix("docs/")
        if page is None and (self.root / path).is_file():
            self.sources.add(path)
            page = _source_page(path)
        if page is None:
            self.problems.append(f"{name}: links to {target}, which does not exist")
            return label
        return f"[{label}]({os.path.relpath(page, Path(place).parent)}{'#' + anchor if anchor else ''})"

    def _picture(self, label: str, path: str, name: str, place: str) -> str:
        if not (self.root / path).is_file() or not path.startswith("docs/"):
            self.problems.append(f"{name}: shows {path}, which is no picture in docs/")
            return label
        shown = os.path.relpath(path.removeprefix("docs/"), Path(place).parent)
        dark = Path(path).with_stem(f"{Path(path).stem}_dark")
        if not (self.root / dark).is_file():
            return f"![{label}]({shown})"
        dark_shown = os.path.relpath(str(dark).removeprefix("docs/"), Path(place).parent)
        return f"![{label}]({shown}){{.figure .only-light}}![{label}]({dark_shown}){{.figure .only-dark}}"


def _source_page(name: str) -> str:
    """Where the text of a file of the repository is in the site."""
    return f"source/{name.replace('/', '.')}.md"
