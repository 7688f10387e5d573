"""One self-contained HTML page from a list of sections: the only renderer of reports.

A page asks for nothing from outside and runs no script (its own policy forbids both), so it can be mailed, archived and
opened years later. It is good in light and dark and on paper. What callers hand over is text, never markup: it is escaped here.
"""

import base64
import html
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from pipeline.files import write_bytes
from pipeline.report.style import STYLE

Level = Literal["good", "note", "look", "problem"]
Cell = str | int | float | None
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
# C0 and C1 controls would vanish or end the document early; a tab and a line feed are text.
CONTROL_CHARACTERS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
NUMBER = re.compile(r"-?[\d.,]+(e[+-]?\d+)?( ?(%|[kMGT]?B))?|nan|-?inf")
IMAGE_KINDS = {b"\xff\xd8": "jpeg", b"\x89P": "png", b"RI": "webp", b"GI": "gif"}


class Block(Protocol):
    """Anything that a section can hold."""

    def to_html(self) -> str:
        """The block as markup."""


@dataclass(frozen=True)
class Text:
    """Paragraphs, one a string; `faint` for what explains a figure rather than being one."""

    paragraphs: Sequence[str]
    faint: bool = False

    def to_html(self) -> str:
        """The paragraphs as markup."""
        kind = ' class="faint"' if self.faint else ""
        return "".join(f"<p{kind}>{escape(paragraph)}</p>" for paragraph in self.paragraphs)


@dataclass(frozen=True)
class Finding:
    """One sentence that a reader should not miss, and how grave it is."""

    level: Level
    text: str


@dataclass(frozen=True)
class Findings:
    """A list of findings, each marked by its level in a word and a colour."""

    findings: Sequence[Finding]

    def to_html(self) -> str:
        """The list as markup."""
        items = (
            f'<li class="{finding.level}"><span class="level">{finding.level}</span> <span>{escape(finding.text)}</span></li>'
            for finding in self.findings
        )
        return f'<ul class="findings">{"".join(items)}</ul>'


@dataclass(frozen=True)
class KeyFigures:
    """A few large numbers, each over its name."""

    figures: Mapping[str, Cell]

    def to_html(self) -> str:
        """The figures as markup."""
        cells = (
            f'<div class="figure"><dd>{escape(format_cell(value))}</dd><dt>{escape(name)}</dt></div>'
            for name, value in self.figures.items()
        )
        return f'<dl class="figures">{"".join(cells)}</dl>'


@dataclass(frozen=True)
class Table:
    """Rows of text and numbers; columns of numbers, also with a unit, are set to the right."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    caption: str = ""

    def to_html(self) -> str:
        """The table as markup."""
        numeric = [_is_numeric([row[place] for row in self.rows]) for place in range(len(self.columns))]
        kinds = [' class="number"' if is_number else "" for is_number in numeric]
        head = "".join(f'<th scope="col"{kind}>{escape(name)}</th>' for name, kind in zip(self.columns, kinds, strict=True))
        body = "".join(f"<tr>{self._row(row, kinds)}</tr>" for row in self.rows)
        caption = f"<caption>{escape(self.caption)}</caption>" if self.caption else ""
        return f'<div class="wide"><table>{caption}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'

    def _row(self, row: Sequence[Cell], kinds: list[str]) -> str:
        cells = [f"<td{kind}>{escape(format_cell(cell))}</td>" for cell, kind in zip(row, kinds, strict=True)]
        return "".join(cells)


@dataclass(frozen=True)
class Picture:
    """An encoded image (JPEG, PNG, WebP, GIF) over its caption; without content, a box that says so."""

    content: bytes
    caption: Sequence[str] = ()
    missing: str = "no picture"

    def to_html(self) -> str:
        """The picture as markup, its bytes inside."""
        shown = f'<div class="missing">{escape(self.missing)}</div>'
        if self.content:
            kind = IMAGE_KINDS.get(self.content[:2], "png")
            source = f"data:image/{kind};base64,{base64.b64encode(self.content).decode()}"
            # Eager decoding of hundreds of pictures would hold up the first look at the page.
            alternative = escape(", ".join(self.caption))
            shown = f'<div class="frame"><img alt="{alternative}" loading="lazy" decoding="async" src="{source}"></div>'
        lines = "".join(f'<span title="{escape(line)}">{escape(line)}</span>' for line in self.caption)
        return f"<figure>{shown}<figcaption>{lines}</figcaption></figure>"


@dataclass(frozen=True)
class LargePicture:
    """A picture as wide as the text, or as it is where it is smaller."""

    picture: Picture

    def to_html(self) -> str:
        """The picture as markup."""
        return f'<div class="large">{self.picture.to_html()}</div>'


@dataclass(frozen=True)
class PictureGroup:
    """Pictures that belong together, below a title."""

    pictures: Sequence[Picture]
    title: str = ""

    def to_html(self) -> str:
        """The group as markup."""
        title = f"<h3>{escape(self.title)}</h3>" if self.title else ""
        return f'<div class="group">{title}<div class="pictures">{"".join(p.to_html() for p in self.pictures)}</div></div>'


@dataclass(frozen=True)
class Pictures:
    """Groups of pictures, no side longer than `side` pixels. `beside` sets small groups (pairs) next to each other."""

    groups: Sequence[PictureGroup]
    side: int = 96
    beside: bool = False

    def to_html(self) -> str:
        """The groups as markup."""
        kind = "groups beside" if self.beside else "groups"
        return f'<div class="{kind}" style="--side:{self.side}px">{"".join(group.to_html() for group in self.groups)}</div>'


@dataclass(frozen=True)
class Section:
    """A heading and what stands below it."""

    title: str
    blocks: Sequence[Block] = field(default_factory=list)


def render_page(title: str, sections: Sequence[Section], subtitle: str = "") -> str:
    """The whole document. The same sections give the same bytes: nothing here looks at a clock."""
    links = "".join(f'<a href="#s{number}">{escape(section.title)}</a>' for number, section in enumerate(sections, start=1))
    body = "".join(_section(number, section) for number, section in enumerate(sections, start=1))
    navigation = f'<nav aria-label="Sections">{links}</nav>' if len(sections) > 1 else ""
    below = f'<p class="faint">{escape(subtitle)}</p>' if subtitle else ""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" content="light dark">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n"
        f"<body><header><h1>{escape(title)}</h1>{below}</header>{navigation}<main>{body}</main></body></html>\n"
    )


def write_page(path: Path, title: str, sections: Sequence[Section], subtitle: str = "") -> None:
    """Render a page and write it, whole or not at all."""
    write_bytes(path, render_page(title, sections, subtitle).encode())


def _section(number: int, section: Section) -> str:
    blocks = "".join(block.to_html() for block in section.blocks)
    return f'\n<section id="s{number}"><h2>{escape(section.title)}</h2>{blocks}</section>'


def escape(text: str) -> str:
    """Any string as text of the page: markup, control characters and file names that are no text are made harmless."""
    printable = CONTROL_CHARACTERS.sub("\N{REPLACEMENT CHARACTER}", text)
    return html.escape(printable.encode(errors="backslashreplace").decode())


def format_cell(value: Cell) -> str:
    """A number as people read it: thousands apart, four digits of a fraction; a dash for none."""
    if value is None:
        return "\N{EN DASH}"
    if isinstance(value, float):
        return f"{value:,.0f}" if value.is_integer() or abs(value) >= 10_000 else f"{value:.4g}"
    return value if isinstance(value, str) else f"{value:,}"


def _is_numeric(cells: Sequence[Cell]) -> bool:
    present = [cell for cell in cells if cell is not None]
    return bool(present) and all(NUMBER.fullmatch(format_cell(cell)) for cell in present)
