"""Builds the site: python -m docs.site --out build/site, with --external also tries every link that leaves it."""

import argparse
import shutil
import sys
from pathlib import Path

from docs.site import staging

HERE = Path(__file__).parent


def main() -> int:
    """Stages the pages, builds HTML with warnings as errors, and prints where it is."""
    parser = argparse.ArgumentParser(prog="python -m docs.site", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("build/site"), help="folder of the site")
    parser.add_argument("--external", action="store_true", help="also list links to other sites that do not answer")
    given = parser.parse_args()
    try:
        from sphinx.cmd.build import build_main
    except ImportError:
        print("docs.site: Sphinx is not installed: pip install -e '.[docs]' -c constraints.txt", file=sys.stderr)
        return 2
    source, html = given.out / "source", given.out / "html"
    for folder in (source, html):
        shutil.rmtree(folder, ignore_errors=True)
    problems = staging.stage(source)
    for problem in problems:
        print(f"docs.site: {problem}", file=sys.stderr)
    if problems:
        return 1
    words = ["-q", "-W", "--keep-going", "-n", "-c", str(HERE), "-d", str(given.out / "doctrees"), str(source)]
    status = build_main(["-b", "html", *words, str(html)])
    if status == 0:
        print(f"{html / 'index.html'}: {len(list(html.rglob('*.html')))} pages")
    if status == 0 and given.external:
        status = build_main(["-b", "linkcheck", *[word for word in words if word != "-q"], str(given.out / "links")])
    return status


if __name__ == "__main__":
    sys.exit(main())
