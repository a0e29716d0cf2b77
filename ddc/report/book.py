"""The report: sections in Markdown, and from them LaTeX tables and one HTML page, by pandoc."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
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
        leading: of each claim, the figure that stands beside the main table, and not here.
    """

    title: str
    claims: tuple[str, ...]
    command: str
    document: str
    figures: Figures
    leading: Mapping[str, Path] = field(default_factory=dict)


#: Characters of our tables that pdflatex's fonts lack.
MATHEMATICS = {
    "×": r"\times", "±": r"\pm", "≤": r"\le", "≥": r"\ge",
    "²": "^2", "⁺": "^+", "√": r"\surd", "·": r"\cdot",
    "β": r"\beta", "γ": r"\gamma", "λ": r"\lambda", "ρ": r"\rho", "σ": r"\sigma", "τ": r"\tau",
    "Σ": r"\Sigma", "…": r"\dots",
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


def page(sections: Sequence[Section], table: str, notes: str, root: Path) -> str:
    """The report as one Markdown document; figures by their paths from ``root``: the main table and
    a figure a claim, what is to be known of them, then the sections.

    Args:
        sections: in the order of the paper.
        table: the main table, with its heading.
        notes: what is said of it.
        root: folder that paths of figures are relative to.
    """
    leading = {claim: (s, path) for s in sections for claim, path in s.leading.items()}
    parts = [table]
    for claim in sorted(leading):
        section, path = leading[claim]
        parts.append(picture(path, f"**{claim}.** {section.figures[path]}", root))
    parts.append(notes)
    for section in sections:
        answers = f" Answers {', '.join(section.claims)}." if section.claims else ""
        shown = {path: claim for claim, path in section.leading.items()}
        above = (
            f" Figure of {' and '.join(shown.values())}: beside the main table." if shown else ""
        )
        parts.append(f"# {section.title}")
        parts.append(f"Records made by `{section.command}`.{answers}{above}")
        parts += [picture(f, text, root) for f, text in section.figures.items() if f not in shown]
        parts.append(section.document.rstrip("\n"))
    return "\n\n".join(parts) + "\n"


def picture(path: Path, caption: str, root: Path) -> str:
    """A figure in Markdown."""
    return f"![{caption}]({path.relative_to(root).as_posix()})"


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
