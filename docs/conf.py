"""The documentation site: ``make docs``. Neither building nor reading it needs a network: pandoc
turns formulas into MathML, which browsers draw by themselves.
"""

from __future__ import annotations

import re

import pypandoc
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.writers.html5 import HTML5Translator

import ddc

project = "DDC"
author = "The DDC authors"
project_copyright = author
version = release = ddc.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
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
html_math_renderer = "mathml"
html_static_path = ["_static"]
html_css_files = ["page.css"]


def link_files_outside(app: Sphinx, page: str, source: list[str]) -> None:
    """Files outside of ``docs`` (tables in ``results``, scripts) are no pages of the site: link
    them as downloads.
    """
    source[0] = re.sub(r"(?<!!)\[([^]]+)\]\((\.\./[^)#]+)\)", download, source[0])


def download(link: re.Match[str]) -> str:
    """A link to a file as a download, and one to a folder as its name alone."""
    title, target = link.groups()
    return f"{{download}}`{title} <{target}>`" if "." in target.rpartition("/")[2] else title


def add_mathml(app: Sphinx, document: nodes.document, page: str) -> None:
    """Give each formula of a page its MathML.

    Raises:
        ValueError: a formula that pandoc cannot convert.
    """
    formulas = [*document.findall(nodes.math), *document.findall(nodes.math_block)]
    paragraphs = [tex(each) for each in formulas]
    if not formulas:
        return
    html = pypandoc.convert_text("\n\n".join(paragraphs), "html", "markdown", ["--mathml"])
    found = re.findall(r"<p>(<math.*?</math>)</p>", html, re.DOTALL)
    if len(found) != len(formulas):
        raise ValueError(f"{page}: pandoc has no MathML for one of its formulas: {html}")
    for formula, mathml in zip(formulas, found, strict=True):
        formula["mathml"] = re.sub(r"<annotation.*?</annotation>", "", mathml, flags=re.DOTALL)


def tex(formula: nodes.Node) -> str:
    """A formula as pandoc reads it; lines of a display are aligned."""
    text = re.sub(r"\s*\n\s*", " ", formula.astext().strip())
    if isinstance(formula, nodes.math):
        return f"${text}$"
    aligned = "\\\\" in text and r"\begin" not in text
    return rf"$$\begin{{aligned}}{text}\end{{aligned}}$$" if aligned else f"$${text}$$"


def write_inline(writer: HTML5Translator, formula: nodes.math) -> None:
    writer.body.append(formula["mathml"])
    raise nodes.SkipNode


def write_display(writer: HTML5Translator, formula: nodes.math_block) -> None:
    writer.body.append(f'<div class="math">{formula["mathml"]}</div>\n')
    raise nodes.SkipNode


def setup(app: Sphinx) -> None:
    app.connect("source-read", link_files_outside)
    app.connect("doctree-resolved", add_mathml)
    app.add_html_math_renderer("mathml", (write_inline, None), (write_display, None))
