"""Sphinx's settings. Nothing is loaded from another site: equations are MathML, fonts are the reader's."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import jvgen

project = "jvgen"
author = "The jvgen authors"
copyright = "The jvgen authors, Apache-2.0"
version = release = jvgen.__version__
extensions = ["myst_nb", "sphinx_copybutton", "docs.site.mathml"]
root_doc = "index"

myst_enable_extensions = ["dollarmath", "attrs_inline", "colon_fence"]
myst_heading_anchors = 4
nb_execution_mode = "off"  # the pictures are those that are stored
nb_merge_streams = True
highlight_language = "bash"  # most blocks are commands
html_math_renderer = "mathml"
copybutton_prompt_text = "$ "
copybutton_exclude = ".linenos, .gp, .go"
python_maximum_signature_line_length = 88
add_module_names = False
toc_object_entries_show_parents = "hide"
nitpick_ignore_regex = [("py:.*", ".*")]  # annotations name classes of other libraries
linkcheck_timeout = 20

html_theme = "furo"
pygments_dark_style = "github-dark"
html_title = f"jvgen {release}"
html_static_path = ["static"]
html_css_files = ["style.css"]
html_show_sphinx = False
html_copy_source = False
html_theme_options = {
    "light_css_variables": {
        "color-brand-primary": "#0b6bcb",
        "color-brand-content": "#0b6bcb",
        "font-stack--monospace": "ui-monospace, SFMono-Regular, Menlo, Consolas, monospace",
    },
    "dark_css_variables": {"color-brand-primary": "#6cb6ff", "color-brand-content": "#6cb6ff"},
}
