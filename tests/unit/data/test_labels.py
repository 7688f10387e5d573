from pathlib import Path

import pytest

from pipeline.data.labels import (
    RawLabel,
    SampleRule,
    numbered_classes,
    raw_labels,
    read_class_list,
    require_label_rule,
    require_text,
)
from pipeline.errors import ConfigError, DataError

NAMES = ("cat", "dog")


@pytest.mark.parametrize(
    ("rule", "content", "labels"),
    [
        ("cls", b"3", [3]),
        ("cls", b" 3\n", [3]),
        ("txt", b"dog\n", ["dog"]),
        ("txt", b"1", ["1"]),
        ("txt", "Käfer".encode(), ["Käfer"]),
        ("json:label", b'{"label": 2}', [2]),
        ("json:label", b'{"label": "dog"}', ["dog"]),
        ("json:a.b", b'{"a": {"b": ["cat", "dog"]}}', ["cat", "dog"]),
        ("json:label", b'{"label": []}', []),
        ("cls", b"-1", [-1]),
    ],
)
def test_a_label_is_a_number_a_name_or_a_list(rule: str, content: bytes, labels: list[RawLabel]) -> None:
    assert raw_labels(rule, content) == labels


@pytest.mark.parametrize(
    ("rule", "content", "message"),
    [
        ("cls", b"dog", "has 'dog' in its .cls member, not a class number"),
        ("cls", b"", "has the label '', which is neither"),
        ("txt", b"\xff\xfe", "has a .txt member that cannot be read"),
        ("json:label", b"{", "has a .json member that cannot be read"),
        ("json:label", b'{"labels": 1}', "has no `label` in its .json member"),
        ("json:a.b", b'{"a": 1}', "has no `a.b` in its .json member"),
        ("json:label", b'{"label": true}', "has the label True, which is neither a number nor a name"),
        ("json:label", b'{"label": 1.5}', "has the label 1.5, which is neither"),
        ("json:label", b'{"label": [null]}', "has the label None, which is neither"),
    ],
)
def test_a_label_that_is_none_is_refused(rule: str, content: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message.replace(".", r"\.")):
        raw_labels(rule, content)


def test_a_sample_is_read_by_its_rule() -> None:
    members = {"png": b"P", "jpg": b"J", "seg.png": b"S", "cls": b"1", "json": b'{"kind": "cat"}', "pkl": b"evil"}
    assert SampleRule("cls", "", NAMES).read(members) == (b"J", [1])
    assert SampleRule("json:kind", "png", NAMES).read(members) == (b"P", [0])
    assert SampleRule("cls", "seg.png", NAMES).read(members) == (b"S", [1])


def test_a_sample_may_have_several_labels_or_where_the_data_set_is_such_none() -> None:
    members = {"jpg": b"J", "json": b'{"labels": ["bird", 0]}'}
    names = ("cat", "dog", "bird")
    assert SampleRule("json:labels", "", names).read(members) == (b"J", [2, 0])
    empty = {"jpg": b"J", "json": b'{"labels": []}'}
    assert SampleRule("json:labels", "", names, may_have_none=True).read(empty) == (b"J", [])
    with pytest.raises(DataError, match="has no label"):
        SampleRule("json:labels", "", names).read(empty)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"cls": b"1", "pyd": b""}, "has no image"),
        ({"jpg": b""}, "has no .cls label"),
        ({"jpg": b"", "cls": b"2"}, "has the label 2, which is no class"),
        ({"jpg": b"", "cls": b"-1"}, "has the label -1, which is no class"),
    ],
)
def test_a_sample_without_image_or_class_is_refused(members: dict[str, bytes], message: str) -> None:
    with pytest.raises(DataError, match=message.replace(".", r"\.")):
        SampleRule("cls", "", NAMES).read(members)


def test_the_rule_itself_is_checked() -> None:
    for rule in ("cls", "txt", "json:a", "json:a.b"):
        require_label_rule(rule)
    for rule in ("json", "json:", "pickle", "cls:a", ""):
        with pytest.raises(ConfigError, match="it is `cls`, `txt` or `json:FIELD`"):
            require_label_rule(rule)


def test_a_text_is_a_class_name_first_and_then_a_class_number() -> None:
    years = SampleRule("txt", "", ("1984", "2001", "3"))
    assert [years.class_number(label) for label in ("1984", "3", "0", 0, 2)] == [0, 2, 0, 0, 2]
    with pytest.raises(DataError, match="has the label '7', which is no class"):
        years.class_number("7")


def test_numbers_that_are_no_class_numbers_are_refused_before_a_class_is_made_of_each() -> None:
    assert numbered_classes({0, 3}, "table.csv", "") == ["0", "1", "2", "3"]
    with pytest.raises(DataError, match=r"table\.csv: its labels are numbers up to 2,021,030,401, but only 2 different ones"):
        numbered_classes({2021030400, 2021030401}, "table.csv", "put a classes.txt beside it")


def test_a_list_of_classes_is_text_and_names_each_once(tmp_path: Path) -> None:
    path = tmp_path / "classes.txt"
    path.write_bytes("\ufeffcafé \r\n\r\ntea".encode())
    assert read_class_list(path) == ["café", "tea"]
    for content, words in ((b"caf\xe9\ntea\n", "is not UTF-8 text .* at byte 3.* Save it as UTF-8"), (b"a\nb\na\n", "twice")):
        path.write_bytes(content)
        with pytest.raises(DataError, match=rf"classes\.txt: .*{words}"):
            read_class_list(path)


def test_a_name_that_is_no_text_is_refused() -> None:
    # Half a surrogate pair, which JSON can spell and no file can hold.
    with pytest.raises(DataError, match=r"labels\.jsonl: the class 'caf\\ud83d' has a name that is not UTF-8\. Rename it"):
        require_text(["tea", "caf\ud83d"], "labels.jsonl")
