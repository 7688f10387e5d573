import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from pipeline.data.sources import ImageSource
from pipeline.errors import DataError
from tests.unit.data.test_sources import images_at, opened

ROWS: list[dict[str, Any]] = [
    {"path": "a.jpg", "label": "dog", "split": "train"},
    {"path": "sub/b.jpg", "label": "cat", "split": "valid"},
    {"path": "ü c.jpg", "label": "dog", "split": "test"},
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the images that the tables name."""
    return images_at(tmp_path, "a.jpg", "sub/b.jpg", "ü c.jpg")


def write_table(folder: Path, kind: str, rows: list[dict[str, Any]]) -> Path:
    """A table of `kind` beside the images; lists are joined by | in CSV."""
    path = folder / f"table.{kind}"
    if kind == "parquet":
        parquet.write_table(pa.Table.from_pylist(rows), path)
    elif kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        lines = [",".join(rows[0])]
        for row in rows:
            lines.append(",".join("|".join(map(str, cell)) if isinstance(cell, list) else str(cell) for cell in row.values()))
        path.write_text("\n".join(lines))
    return path


def found_in(source: ImageSource) -> list[tuple[str, list[str], str | None]]:
    return [(image.name, [source.class_names[label] for label in image.labels], image.split) for image in source.images()]


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_a_table_gives_path_label_and_split(kind: str, folder: Path) -> None:
    source = opened(write_table(folder, kind, ROWS))
    assert (source.kind, source.task, source.class_names) == ("table", "single", ["cat", "dog"])
    assert found_in(source) == [("a.jpg", ["dog"], "train"), ("sub/b.jpg", ["cat"], "val"), ("ü c.jpg", ["dog"], "test")]
    assert source.read("sub/b.jpg") == b"x"


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_without_a_column_for_it_no_split_is_named(kind: str, folder: Path) -> None:
    source = opened(write_table(folder, kind, [{"path": row["path"], "label": row["label"]} for row in ROWS]))
    assert {split for _, _, split in found_in(source)} == {None}


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_several_labels_make_it_a_table_of_several_labels(kind: str, folder: Path) -> None:
    rows = [
        {"path": "a.jpg", "label": ["dog", "cat", "dog"]},
        {"path": "sub/b.jpg", "label": ["cat"]},
        {"path": "ü c.jpg", "label": []},
    ]
    source = opened(write_table(folder, kind, rows))
    assert (source.task, source.class_names) == ("multi", ["cat", "dog"])
    assert found_in(source) == [("a.jpg", ["dog", "cat"], None), ("sub/b.jpg", ["cat"], None), ("ü c.jpg", [], None)]


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_whole_numbers_are_class_numbers(kind: str, folder: Path) -> None:
    rows = [{"path": "a.jpg", "label": 2}, {"path": "sub/b.jpg", "label": 0}]
    path = write_table(folder, kind, rows)
    assert opened(path).class_names == ["0", "1", "2"]
    assert found_in(opened(path)) == [("a.jpg", ["2"], None), ("sub/b.jpg", ["0"], None)]
    (folder / "classes.txt").write_text("cat\ndog\nbird\nfish\n")
    assert opened(path).class_names == ["cat", "dog", "bird", "fish"]
    assert found_in(opened(path)) == [("a.jpg", ["bird"], None), ("sub/b.jpg", ["cat"], None)]


def test_a_list_of_classes_fixes_their_order(folder: Path) -> None:
    (folder / "classes.txt").write_text("dog\ncat\n")
    source = opened(write_table(folder, "csv", ROWS))
    assert source.class_names == ["dog", "cat"]
    assert next(source.images()).labels == (0,)


def test_a_table_of_a_spreadsheet_is_read(folder: Path) -> None:
    path = folder / "table.csv"
    path.write_bytes(b'\xef\xbb\xbfPath,Label\r\n"a.jpg",dog\r\nsub/b.jpg,"cat"\r\n')
    assert found_in(opened(path)) == [("a.jpg", ["dog"], None), ("sub/b.jpg", ["cat"], None)]
    (folder / "table.tsv").write_text("path\tlabel\na.jpg\tdog, large\nsub/b.jpg\tcat\n")
    assert opened(folder / "table.tsv").class_names == ["cat", "dog, large"]


def test_a_path_may_be_absolute(folder: Path, tmp_path: Path) -> None:
    table = tmp_path / "elsewhere" / "table.csv"
    table.parent.mkdir()
    table.write_text(f"path,label\n{folder}/a.jpg,dog\n{folder}/sub/b.jpg,cat\n")
    source = opened(table)
    assert source.read(next(source.images()).name) == b"x"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no column `path`"),
        ("file,label\na.jpg,dog\n", r"has no column `path` \(found: file, label\)"),
        ("path,class\na.jpg,dog\n", "has no column `label`"),
        ("path,label\n", "has 0 classes"),
        ("path,label\na.jpg,dog\n", r"has 1 classes \(dog\); at least 2 are needed"),
        ("path,label\na.jpg,dog\nsub/b.jpg,\n", r"line 3 \(sub/b.jpg\) has no label"),
        ("path,label\na.jpg,dog\n,cat\n", "line 3 has no path"),
        ("path,label\na.jpg,dog\nsub/b.jpg\n", "line 3 has not 2 cells"),
        ("path,label\na.jpg,dog\nsub/b.jpg,cat,x\n", "line 3 has not 2 cells"),
        ('path,label\n"a.jpg,dog\n', "is not valid CSV"),
    ],
)
def test_a_table_that_cannot_work_is_refused_with_its_line(text: str, message: str, folder: Path) -> None:
    (folder / "table.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        opened(folder / "table.csv")


def test_a_split_that_is_none_is_refused_when_it_is_listed(folder: Path) -> None:
    (folder / "table.csv").write_text("path,label,split\na.jpg,dog,train\nsub/b.jpg,cat,vall\n")
    with pytest.raises(DataError, match=r"line 3: 'vall' is no split\. Did you mean 'val'"):
        list(opened(folder / "table.csv").images())


@pytest.mark.parametrize("name", ["nowhere.jpg", "sub"])
def test_a_file_that_is_none_is_listed_and_fails_when_it_is_read(name: str, folder: Path) -> None:
    (folder / "table.csv").write_text(f"path,label,split\na.jpg,dog,train\n{name},cat,val\n")
    source = opened(folder / "table.csv")
    assert [image.name for image in source.images()] == ["a.jpg", name]
    with pytest.raises(OSError, match=f"{name}"):
        source.read(name)


def test_numbers_that_are_listed_as_names_are_names(folder: Path) -> None:
    (folder / "classes.txt").write_text("1\n2\n3\n")
    (folder / "table.csv").write_text("path,label\na.jpg,1\nsub/b.jpg,3\n")
    source = opened(folder / "table.csv")
    assert [source.class_names[image.labels[0]] for image in source.images()] == ["1", "3"]


def test_a_number_that_is_no_class_is_refused(folder: Path) -> None:
    (folder / "classes.txt").write_text("cat\ndog\n")
    (folder / "table.csv").write_text("path,label\na.jpg,1\nsub/b.jpg,2\n")
    with pytest.raises(DataError, match=r"line 3 \(sub/b.jpg\) has the label '2', which is no class. .*classes.txt has 2"):
        list(opened(folder / "table.csv").images())
    (folder / "table.csv").write_text("path,label\na.jpg,cat\nsub/b.jpg,dgo\n")
    with pytest.raises(DataError, match=r"has the label 'dgo', which is no class\. Did you mean 'dog'"):
        list(opened(folder / "table.csv").images())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is not valid JSON"),
        ("[1]", "line 2 is no JSON object"),
        ('{"path": "a.jpg"}', "line 2: has no column `label`"),
        ('{"path": "a.jpg", "label": 1.5}', "line 2 has the label 1.5; a label is a name or a whole number"),
        ('{"path": 3, "label": "x"}', "line 2 has no path"),
    ],
)
def test_a_broken_line_of_json_is_named(line: str, message: str, folder: Path) -> None:
    (folder / "table.jsonl").write_text(f'{{"path": "a.jpg", "label": "dog"}}\n{line}\n')
    with pytest.raises(DataError, match=message):
        opened(folder / "table.jsonl")


def test_a_table_that_is_none_is_named(folder: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.csv: no such table"):
        opened(folder / "nowhere.csv")
    (folder / "table.parquet").write_bytes(b"thesis")
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        opened(folder / "table.parquet")
    (folder / "table.csv").write_bytes("path,label\nK\xe4fer.jpg,a".encode("latin-1"))
    with pytest.raises(DataError, match=r"is not UTF-8 text .* Save it as UTF-8"):
        opened(folder / "table.csv")
