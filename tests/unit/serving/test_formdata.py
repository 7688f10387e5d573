"""Forms, whole and otherwise."""

import random

import pytest

from pipeline.serving.batching import Upload
from pipeline.serving.exchange import RefusedError
from pipeline.serving.formdata import read_form
from tests.unit.serving.asking import form_of

KIND = "multipart/form-data; boundary=b0undary"


def test_files_come_with_their_names_and_bytes_in_their_order() -> None:
    files = {"a.jpg": b"\r\n--b0undar\r\n\r\nx--", "b.png": bytes(range(256)), "c": b""}
    assert read_form(KIND, form_of(files), 5) == [Upload(name, content) for name, content in files.items()]


@pytest.mark.parametrize(
    ("disposition", "name"),
    [
        ('form-data; name="field"; filename="a photo.jpg"', "a photo.jpg"),
        ("form-data; filename=plain.jpg; name=f", "plain.jpg"),
        ('form-data; name="field"', "field"),
        (r'form-data; name="f"; filename="say \"hi\".jpg"', 'say "hi".jpg'),
        ('form-data; name="f"; filename="Möwe.png"', "Möwe.png"),
        ('form-data; name="f"; filename=""', "f"),
        ("form-data", "image 1"),
    ],
)
def test_a_part_is_called_as_its_file_or_its_field(disposition: str, name: str) -> None:
    body = f"--b0undary\r\nContent-Disposition: {disposition}\r\n\r\nx\r\n--b0undary--".encode()
    assert read_form(KIND, body, 1)[0].name == name


def test_a_field_for_files_that_is_left_empty_is_no_file() -> None:
    files = form_of({"": b"", "a.jpg": b"x"})
    assert [upload.name for upload in read_form(KIND, files, 2)] == ["a.jpg"]
    with pytest.raises(RefusedError, match="no file"):
        read_form(KIND, form_of({"": b""}), 2)


@pytest.mark.parametrize(
    "kind", ['Multipart/Form-Data;boundary="b0undary"', "multipart/form-data; charset=utf-8; boundary=b0undary; x=y"]
)
def test_a_boundary_is_found_however_it_is_written(kind: str) -> None:
    assert len(read_form(kind, form_of({"a": b"x"}), 1)) == 1


@pytest.mark.parametrize(
    ("kind", "body", "status"),
    [
        ("multipart/form-data", form_of({"a": b"x"}), 400),
        ("multipart/form-data; boundary=", form_of({"a": b"x"}), 400),
        (f"multipart/form-data; boundary={'b' * 71}", form_of({"a": b"x"}), 400),
        (KIND, b"", 400),
        (KIND, b"--b0undary--\r\n", 400),
        (KIND, b"--b0undary\r\n", 400),
        (KIND, b"--b0undaryX\r\n\r\nx\r\n--b0undary--", 400),
        (KIND, b"preamble\r\n" + form_of({"a": b"x"}), 400),
        (KIND, form_of({"a": b"x"})[:-20], 400),
        (KIND, form_of({"a": b"x"})[:-6], 400),
        (KIND, b"--b0undary\r\nX: " + b"y" * 5000 + b"\r\n\r\nx\r\n--b0undary--", 400),
        (KIND, form_of(dict.fromkeys(map(str, range(10_000)), b"x")), 413),
        (KIND, form_of({"": b""})[:-14] * 10_000, 413),
    ],
)
def test_what_is_no_whole_form_is_refused(kind: str, body: bytes, status: int) -> None:
    with pytest.raises(RefusedError) as refused:
        read_form(kind, body, 5)
    assert refused.value.status == status


def test_any_damage_is_either_refused_or_read_as_no_more_than_its_bytes() -> None:
    whole, chance = form_of({"a.jpg": b"x" * 40, "b.jpg": b"y" * 40}), random.Random(0)
    for _ in range(3000):
        body = bytearray(whole)
        for _ in range(chance.randrange(1, 4)):
            first, last = sorted(chance.choices(range(len(body) + 1), k=2))
            body[first : min(last, first + 6)] = chance.randbytes(chance.randrange(4))
        try:
            found = read_form(KIND, body, 5)
        except RefusedError:
            continue
        assert sum(len(upload.encoded) for upload in found) < len(body)
