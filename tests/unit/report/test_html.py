import io
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from pipeline.report.charts import BarChart, CurveChart, Histogram
from pipeline.report.html import (
    Block,
    Cell,
    Finding,
    Findings,
    KeyFigures,
    LargePicture,
    Picture,
    PictureGroup,
    Pictures,
    Section,
    Table,
    Text,
    escape,
    format_cell,
    render_page,
    write_page,
)

HOSTILE = "<script>alert(1)</script> \"quoted\" & 'single' \x00\x1b \udcff \u202e"
VOID = {"meta", "img"}


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (2, 2), "red").save(buffer, "PNG")
    return buffer.getvalue()


def every_block(text: str) -> list[Block]:
    return [
        Text([text, text]),
        Findings([Finding("problem", text), Finding("good", text)]),
        KeyFigures({text: text, "number": 3}),
        Table([text, "n"], [[text, 1], [text, None]], caption=text),
        BarChart([text], [text, "other"], [[1, 2]], whole=10),
        Histogram([0, 1, 2], [text], [[1, 3]], title=text, show_edge=lambda edge: f"{edge} {text}"),
        CurveChart(text, text, 2, {text: [(0, 1), (2, 3)]}, {text: 2}),
        LargePicture(Picture(png(), [text])),
        Pictures([PictureGroup([Picture(png(), [text]), Picture(b"", [text], missing=text)], title=text)], beside=True),
    ]


class Reader(HTMLParser):
    """Notes every element and its attributes and complains about elements that are not closed in their order."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def read(page: str) -> Reader:
    reader = Reader()
    reader.feed(page)
    reader.close()
    assert reader.open == []
    return reader


def test_a_page_is_well_formed_whatever_it_is_given() -> None:
    page = render_page(HOSTILE, [Section(HOSTILE, every_block(HOSTILE)), Section("two")], subtitle=HOSTILE)
    reader = read(page)
    tags = {tag for tag, _ in reader.elements}
    assert {"h1", "h2", "table", "svg", "img", "figure", "nav"} <= tags
    page.encode()  # raises for surrogates


def test_everything_handed_over_is_text_and_never_markup() -> None:
    reader = read(render_page(HOSTILE, [Section(HOSTILE, every_block(HOSTILE))], subtitle=HOSTILE))
    assert not {"script", "iframe", "object", "link", "base", "form"} & {tag for tag, _ in reader.elements}
    assert reader.text.count("<script>alert(1)</script>") >= 15
    for _, attributes in reader.elements:
        assert not any(name.startswith("on") for name in attributes)


def test_a_page_asks_for_nothing_from_outside() -> None:
    page = render_page("title", [Section("one", every_block("see https://example.org")), Section("two")])
    reader = read(page)
    for tag, attributes in reader.elements:
        for name in ("src", "href", "srcset", "data", "action", "poster", "background", "xlink:href"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:image/", "#")), (tag, name, value)
    assert "@import" not in page
    assert not re.search(r"url\s*\(", page)
    policy = [attributes["content"] for tag, attributes in reader.elements if "http-equiv" in attributes]
    assert policy == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]


def test_every_link_of_the_navigation_has_its_section() -> None:
    reader = read(render_page("title", [Section("one"), Section("two"), Section("three")]))
    links = [attributes["href"] for tag, attributes in reader.elements if tag == "a"]
    sections = [attributes["id"] for tag, attributes in reader.elements if tag == "section"]
    assert links == [f"#{name}" for name in sections] == ["#s1", "#s2", "#s3"]


def test_the_same_sections_give_the_same_page() -> None:
    pages = {render_page("title", [Section("one", every_block("text"))]) for _ in range(2)}
    assert len(pages) == 1


def test_a_page_has_both_palettes_and_prints_the_light_one() -> None:
    page = render_page("title", [])
    dark = re.search(r"@media \(prefers-color-scheme:dark\)\{:root\{--page:(#\w+)", page)
    paper = re.search(r"@media print\{:root\{--page:(#\w+)", page)
    assert dark is not None and paper is not None
    assert paper[1] == "#fff" != dark[1]
    assert page.index(dark[0]) < page.index(paper[0])  # the later rule wins where both apply


def test_a_page_is_written_whole(tmp_path: Path) -> None:
    write_page(tmp_path / "page.html", "Ärger", [Section("one")])
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == render_page("Ärger", [Section("one")])
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("a < b & c", "a &lt; b &amp; c"),
        ('"', "&quot;"),
        ("a\x00b\x1bc\x85d", "a\N{REPLACEMENT CHARACTER}b\N{REPLACEMENT CHARACTER}c\N{REPLACEMENT CHARACTER}d"),
        ("caf\udce9", r"caf\udce9"),
        ("line\nbreak\ttab", "line\nbreak\ttab"),
        ("日本 😀", "日本 😀"),
    ],
)
def test_text_is_escaped(text: str, escaped: str) -> None:
    assert escape(text) == escaped


@pytest.mark.parametrize(
    ("cell", "text"),
    [(1234567, "1,234,567"), (0.123456, "0.1235"), (3.0, "3"), (12345.6, "12,346"), (None, "\N{EN DASH}"), ("7 kB", "7 kB")],
)
def test_numbers_are_written_for_people(cell: Cell, text: str) -> None:
    assert format_cell(cell) == text


def test_columns_of_numbers_are_set_to_the_right_with_or_without_a_unit() -> None:
    rows: list[list[Cell]] = [["a", 1, "1.5 MB", "2%", "3 x 4", None], ["b", None, "12 B", "10.5 %", "5 x 6", None]]
    reader = read(Table(["name", "count", "size", "share", "shape", "nothing"], rows).to_html())
    kinds = [attributes.get("class") for tag, attributes in reader.elements if tag == "th"]
    assert kinds == [None, "number", "number", "number", None, None]


def test_a_picture_says_what_kind_of_image_it_holds() -> None:
    for content, kind in ((png(), "png"), (b"\xff\xd8\xff", "jpeg"), (b"RIFF....WEBP", "webp"), (b"GIF89a", "gif")):
        assert f'src="data:image/{kind};base64,' in Picture(content).to_html()


def test_a_picture_without_content_says_why() -> None:
    shown = Picture(b"", ["key"], missing="cut short").to_html()
    assert "<img" not in shown
    assert "cut short" in shown
