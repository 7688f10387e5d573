"""The list of what an image holds, here of what this environment holds."""

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import sbom
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from licenses import normalised

REPOSITORY = Path(__file__).parents[3]
STATUS = """Package: libc6
Status: install ok installed
Architecture: amd64
Version: 2.36-9+deb12u14

Package: libstdc++6
Status: install ok installed
Architecture: amd64
Version: 12.2.0-14

Package: gone
Status: deinstall ok config-files
Architecture: amd64
Version: 1

Package: passwd
Status: install ok installed
Architecture: amd64
Version: 1:4.13+dfsg1-1
"""


@pytest.fixture
def debian(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A system of three Debian packages."""
    (tmp_path / "status").write_text(STATUS)
    (tmp_path / "os-release").write_text('NAME="Debian GNU/Linux"\nID=debian\nVERSION_ID="12"\n')
    monkeypatch.setattr(sbom, "DPKG_STATUS", tmp_path / "status")
    monkeypatch.setattr(sbom, "OS_RELEASE", tmp_path / "os-release")


def purls(document: dict[str, Any]) -> list[str]:
    return [component["purl"] for component in document["components"]]


def test_it_is_cyclonedx(debian: None) -> None:
    document = json.dumps(sbom.bill_of_materials())
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(document) is None
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(document.replace('"library"', '"lib"', 1)) is not None


def test_it_lists_every_package_of_python_and_debian_that_is_installed(debian: None) -> None:
    found = purls(sbom.bill_of_materials())
    installed = {f"pkg:pypi/{normalised(p.metadata['Name'])}@{p.version}" for p in importlib.metadata.distributions()}
    assert {purl for purl in found if purl.startswith("pkg:pypi/")} == installed
    assert [purl for purl in found if purl.startswith("pkg:deb/")] == [
        "pkg:deb/debian/libc6@2.36-9%2Bdeb12u14?arch=amd64&distro=debian-12",
        "pkg:deb/debian/libstdc%2B%2B6@12.2.0-14?arch=amd64&distro=debian-12",
        "pkg:deb/debian/passwd@1%3A4.13%2Bdfsg1-1?arch=amd64&distro=debian-12",
    ]


def test_packages_have_their_licence() -> None:
    by_name = {component["name"]: component for component in sbom.bill_of_materials()["components"]}
    assert by_name["numpy"]["licenses"][0]["expression"].startswith("BSD-3-Clause")
    assert by_name["sqlparse"]["licenses"] == [{"license": {"name": "BSD"}}], "no SPDX identifier"


def test_a_system_without_dpkg_has_no_debian_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sbom, "DPKG_STATUS", tmp_path / "none")
    assert not [purl for purl in purls(sbom.bill_of_materials()) if purl.startswith("pkg:deb/")]


def test_the_same_environment_gives_the_same_bytes() -> None:
    script = [sys.executable, str(REPOSITORY / "docker/sbom.py")]
    first, second = (subprocess.check_output(script, timeout=60) for _ in range(2))
    assert first == second
