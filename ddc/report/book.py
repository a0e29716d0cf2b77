"""The report: sections in Markdown, and from them LaTeX tables and one HTML page, by pandoc."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ddc.report.figures import Figures

PANDOC_FORMAT = "gfm"


@dataclass(frozen=True)
class Section:
    """A part of the report.

    Attributes:
        title: of the section.
        claims: ids of the claims that it answers; may be empty.
        command: that makes its records.
        document: its tables as Markdown, with headings from level 2 on.
        figures: PNG files with captions.
    """

    title: str
    claims: tuple[str, ...]
    command: str
    document: str
    figures: Figures


#: Characters of our tables that pdflatex's fonts lack.
MATHEMATICS = {
    "×": r"\times", "±": r"\pm", "≥": r"\ge", "²": "^2", "⁺": "^+", "√": r"\surd", "·": r"\cdot",
    "β": r"\beta", "γ": r"\gamma", "λ": r"\lambda", "ρ": r"\rho", "σ": r"\sigma", "τ": r"\tau",
}  # fmt: skip


def latex(markdown: str) -> str:
    r"""Markdown as LaTeX, in ASCII; for ``\usepackage{array,booktabs,calc,longtable}``.

    Raises:
        ValueError: a character for which there is no LaTeX here.
    """
    import pypandoc

    text = str(pypandoc.convert_text(markdown, "latex", format=PANDOC_FORMAT))
    for character, command in MATHEMATICS.items():
        text = text.replace(character, rf"\({command}\)")
    if not text.isascii():
        raise ValueError(
            f"no LaTeX for {', '.join(sorted({c for c in text if not c.isascii()}))}: add to"
            " MATHEMATICS"
        )
    return text


def page(sections: Iterable[Section], summary: str, root: Path) -> str:
    """The report as one Markdown document; figures by their paths from ``root``.

    Args:
        sections: in the order of the paper.
        summary: the main table, with what is said before it.
        root: folder that paths of figures are relative to.
    """
    parts = [summary]
    for section in sections:
        answers = f" Answers {', '.join(section.claims)}." if section.claims else ""
        parts.append(f"# {section.title}")
        parts.append(f"Records made by `{section.command}`.{answers}")
        for path, caption in section.figures.items():
            parts.append(f"![{caption}]({path.relative_to(root).as_posix()})")
        parts.append(section.document.rstrip("\n"))
    return "\n\n".join(parts) + "\n"


def html(markdown: str, title: str, root: Path, style: Path) -> str:
    """A Markdown document as one HTML file with everything in it: it is viewed without a
    network.
    """
    import pypandoc

    return str(
        pypandoc.convert_text(
            markdown,
            "html5",
            format=f"{PANDOC_FORMAT}+implicit_figures",
            extra_args=[
                "--standalone", "--embed-resources", "--toc", "--toc-depth=2", "--columns=10000",
                f"--resource-path={root}", f"--css={style}",
                "--metadata", f"title={title}", "--metadata", "lang=en",
            ],
        )
    )  # fmt: skip
