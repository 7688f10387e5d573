"""The licences of the dependencies: how what packages say is read, and that docs/licenses.md is true of the lock files."""

import contextlib
import re
from email.message import Message
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import pytest
from licenses import OTHERS, PERMISSIVE, UNKNOWN, licence_of, locked, page, unusual_in

REPOSITORY = Path(__file__).parents[3]
PAGE = (REPOSITORY / "docs/licenses.md").read_text()
TABLE = re.findall(r"^\| (?!package \|)(\S+) \| (.+) \| (.+) \|$", PAGE, flags=re.MULTILINE)
ROWS = {name: (licence, images) for name, licence, images in TABLE}
NOT_HERE = set(re.findall(r"[a-z0-9-]+", PAGE.split("not looked at: ")[1]))
LOCK = (REPOSITORY / "requirements.lock").read_text()
LOCKED = set(re.findall(r"^([a-z0-9.-]+)==", LOCK, flags=re.MULTILINE))


class Said(Distribution):
    """A package that says just this of itself."""

    def __init__(self, name: str = "any", **fields: str) -> None:
        self.message = Message()
        self.message["Name"] = name
        for field, value in fields.items():
            for one in value.split("|"):
                self.message[field.replace("_", "-")] = one

    @property
    def metadata(self) -> Any:
        return self.message

    def read_text(self, filename: str) -> str | None:
        return None

    def locate_file(self, path: Any) -> Any:
        return path


@pytest.mark.parametrize(
    ("package", "expected"),
    [
        (Said(License_Expression="MIT AND PSF-2.0", License="other"), "MIT AND PSF-2.0"),
        (Said(License="MIT"), "MIT"),
        (Said(License="Apache License 2.0"), "Apache-2.0"),
        (
            Said(License="Copyright 2018, reserved, and " * 20, Classifier="License :: OSI Approved :: MIT License"),
            "MIT",
        ),
        (Said(Classifier="License :: OSI Approved :: BSD License|License :: OSI Approved :: MIT License"), "BSD OR MIT"),
        (Said(Classifier="License :: OSI Approved"), UNKNOWN),
        (Said(), UNKNOWN),
        (Said("Python_DateUtil", License="Dual License"), "Apache-2.0 OR BSD-3-Clause"),
    ],
)
def test_what_a_package_says_of_its_licence_becomes_an_identifier(package: Distribution, expected: str) -> None:
    assert licence_of(package) == expected


@pytest.mark.parametrize(
    ("expression", "unusual"),
    [
        ("MIT", []),
        ("Apache-2.0 AND Apache-2.0 WITH LLVM-exception AND BSD-3-Clause", []),
        ("MPL-2.0 AND MIT", ["MPL-2.0"]),
        ("GPL-3.0 OR MIT", []),
        ("GPL-3.0 OR (AGPL-3.0 AND SSPL-1.0)", ["GPL-3.0"]),
        (UNKNOWN, [UNKNOWN]),
    ],
)
def test_a_licence_that_is_not_permissive_is_found(expression: str, unusual: list[str]) -> None:
    assert unusual_in(expression) == unusual


def test_the_page_has_every_package_of_the_lock() -> None:
    assert set(ROWS) | NOT_HERE == LOCKED, "make licenses"
    marked = set(re.findall(r"^([a-z0-9.-]+)==[^\n]*;", LOCK, flags=re.MULTILINE))
    assert marked > NOT_HERE, "only markers keep a package away"


def test_the_page_says_what_the_packages_say() -> None:
    for name, (licence, _) in ROWS.items():
        with contextlib.suppress(PackageNotFoundError):  # on another system or Python than the page was made on
            assert licence == licence_of(distribution(name)), f"{name}: make licenses"


def test_no_licence_is_unknown_and_each_that_is_not_permissive_is_explained() -> None:
    for name, (licence, _) in ROWS.items():
        assert licence != UNKNOWN, name
        for part in unusual_in(licence):
            (line,) = re.findall(rf"^- \*\*{re.escape(part)}\*\*: (.+)$", PAGE, flags=re.MULTILINE)
            assert line.startswith(OTHERS[part])
            assert re.search(rf"[ ,]{re.escape(name)}[,.]", line)
    assert not set(OTHERS) & PERMISSIVE


def test_the_cuda_libraries_are_said_to_be_proprietary() -> None:
    cuda = [name for name in ROWS if name.startswith("nvidia-") and name not in ("nvidia-ml-py", "nvidia-nvtx")]
    assert len(cuda) > 10
    assert {ROWS[name][0] for name in cuda} == {"LicenseRef-NVIDIA-Proprietary"}
    assert {ROWS[name][1] for name in cuda} == {"train"}


def test_nothing_that_must_be_passed_on_with_its_source_is_in_an_image() -> None:
    assert not [name for name, (licence, images) in ROWS.items() if "GPL-3.0" in unusual_in(licence) and "only" not in images]


def test_the_page_names_the_images_of_each_package() -> None:
    for image in ("serve", "train", "mlflow"):
        names = set(locked(REPOSITORY / f"docker/{image}.lock"))
        assert {name for name, (_, images) in ROWS.items() if image in images.split(", ")} == names - NOT_HERE
    assert page(REPOSITORY).splitlines()[:7] == PAGE.splitlines()[:7]
