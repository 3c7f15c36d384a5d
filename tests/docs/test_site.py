"""The site: links of its pages lead somewhere, figures are as drawn, it builds, and it reads well in a browser."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from docs.figures import drawings
from docs.site import staging

ROOT = Path(__file__).parents[2]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PAGES = ("index.html", "search.html?q=epipolar", "api/geometry.html", "notebooks/multiview.html", "configs/data.html")


def test_links_lead_somewhere(tmp_path):
    assert not staging.stage(tmp_path)
    listed = (tmp_path / "configs" / "data.md").read_text()
    assert (
        "**`batch_size`**: `Count`" in listed
        and "{py:function} epipolar_lines(" in (tmp_path / "api" / "geometry.md").read_text()
    )


def test_links_that_lead_nowhere_are_named(tmp_path):
    for folder in ("docs", "jvgen/models", "notebooks", "configs"):
        (tmp_path / folder).mkdir(parents=True)
    page = "[there](other.md) [code](../configs/x.py) [gone](gone.md)\n![no](no.png)\n<!-- include no.py -->\n"
    (tmp_path / "docs" / "page.md").write_text(page + "```\n[code](is.left)\n```\n")
    (tmp_path / "docs" / "other.md").write_text("# Other\n")
    (tmp_path / "configs" / "x.py").write_text('"""A config."""\n')
    places = {"docs/page.md": "page.md", "docs/other.md": "other.md"}
    site = staging.Site(tmp_path, tmp_path / "out", places)
    text = site.markdown("docs/page.md")
    assert "[there](other.md) [code](source/configs.x.py.md) gone\n" in text and "[code](is.left)" in text
    assert [problem.split(": ")[1] for problem in site.problems] == [
        "links to gone.md, which does not exist",
        "shows docs/no.png, which is no picture in docs/",
        "includes no.py, which does not exist",
    ]


def test_a_page_that_no_menu_leads_to_is_named(tmp_path):
    (tmp_path / "more").mkdir()
    for name in ("index", "listed", "lost", "more/one"):
        (tmp_path / f"{name}.md").write_text(f"# {name}\n")
    (tmp_path / "index.md").write_text("# Start\n\n```{toctree}\n:glob:\n\nlisted\nmore/*\n```\n")
    (problem,) = staging.outside_of_menus(tmp_path)
    assert problem.startswith("lost.md: no menu leads there")


def test_figures_are_as_drawn():
    folder = ROOT / "docs" / "figures"
    for name, text in drawings.files().items():
        assert (folder / name).read_text() == text, "run python -m docs.figures and commit what it wrote"


@pytest.fixture(scope="module")
def html(tmp_path_factory) -> Path:
    if importlib.util.find_spec("sphinx") is None or importlib.util.find_spec("furo") is None:
        pytest.skip("Sphinx is not installed: pip install -e '.[docs]'")
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "docs.site", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out / "html"


@pytest.mark.slow
def test_the_site_builds_without_warnings(html):
    assert (html / "searchindex.js").is_file()
    assert "data:image/png;base64" in (html / "notebooks" / "repvideo.html").read_text() or list(
        (html / "_images").glob("*.png")
    )


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("playwright") is None or CHROMIUM is None,
    reason="needs Chromium and the package playwright: pip install -e '.[docs,browser]'",
)
def test_pages_in_a_browser(html, tmp_path):
    """Nothing is wider than the screen or loaded from elsewhere; pictures load; the search finds pages.

    JVGEN_SCREENSHOTS names a folder for a picture of each page, to be looked at.
    """
    from playwright.sync_api import sync_playwright

    shots = Path(os.environ.get("JVGEN_SCREENSHOTS", tmp_path))
    asked: list[str] = []
    with sync_playwright() as session:
        browser = session.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        for scheme in ("light", "dark"):
            for width, height in ((1280, 900), (390, 844)):
                context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
                for name in PAGES:
                    page = context.new_page()
                    page.on("request", lambda request: asked.append(request.url))
                    page.goto(f"file://{html}/{name}")
                    if name.startswith("search"):
                        page.wait_for_selector("#search-results li a", timeout=20_000)
                    wide = page.evaluate("document.documentElement.scrollWidth - window.innerWidth")
                    assert wide <= 0, f"{name} is {wide} pixels wider than a screen of {width}"
                    broken = "[...document.images].filter(i => i.complete && !i.naturalWidth).map(i => i.src)"
                    assert page.evaluate(broken) == [], name
                    stem = name.partition(".")[0].replace("/", "_")
                    page.screenshot(path=shots / f"{stem}_{width}_{scheme}.png")
                    page.close()
                context.close()
        browser.close()
    elsewhere = {url for url in asked if not url.startswith(("file:", "data:", "blob:"))}
    assert not elsewhere
