"""The documentation site: ``make docs``. Building needs no network; the browser fetches MathJax for
the formulas.
"""

from __future__ import annotations

import re

from sphinx.application import Sphinx

import ddc

project = "DDC"
author = "The DDC authors"
project_copyright = author
version = release = ddc.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax"]
exclude_patterns: list[str] = []
templates_path: list[str] = []

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
add_module_names = False

html_theme = "furo"
html_title = f"DDC {release}"


def link_files_outside(app: Sphinx, page: str, source: list[str]) -> None:
    """Markdown files outside of ``docs`` (tables in ``results``) are no pages of the site: link
    them as downloads.
    """
    source[0] = re.sub(r"(?<!!)\[([^]]+)\]\((\.\./[^)#]+\.md)\)", r"{download}`\1 <\2>`", source[0])


def setup(app: Sphinx) -> None:
    app.connect("source-read", link_files_outside)
