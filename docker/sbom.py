"""What an image holds, as a CycloneDX 1.6 bill of materials on standard output: Python packages and those of Debian.

Run by the image's own Python, so it lists what is there and not what a lock file meant. The same image gives the same bytes.
"""

import json
import re
from importlib.metadata import Distribution, distributions
from pathlib import Path
from typing import Any
from urllib.parse import quote

from licenses import UNKNOWN, licence_of, normalised

DPKG_STATUS = Path("/var/lib/dpkg/status")
OS_RELEASE = Path("/etc/os-release")
# Words of the classifiers that are no SPDX identifiers.
NAMES = ("BSD", UNKNOWN)


def python_component(package: Distribution) -> dict[str, Any]:
    """An installed Python package."""
    name, licence = normalised(package.metadata["Name"]), licence_of(package)
    purl = f"pkg:pypi/{name}@{package.version}"
    said = {"license": {"name": licence}} if licence in NAMES else {"expression": licence}
    return {"type": "library", "bom-ref": purl, "name": name, "version": package.version, "purl": purl, "licenses": [said]}


def debian_component(paragraph: str, release: str) -> dict[str, Any]:
    """An installed package of Debian, from its paragraph in dpkg's list."""
    field = dict(re.findall(r"^(Package|Version|Architecture): (.+)$", paragraph, flags=re.MULTILINE))
    name, version = (quote(field[part], safe="") for part in ("Package", "Version"))
    purl = f"pkg:deb/debian/{name}@{version}?arch={field['Architecture']}&distro={release}"
    return {"type": "library", "bom-ref": purl, "name": field["Package"], "version": field["Version"], "purl": purl}


def debian_components() -> list[dict[str, Any]]:
    """What dpkg has installed; nothing where there is no dpkg."""
    if not DPKG_STATUS.is_file():
        return []
    system = dict(re.findall(r'^(\w+)="?([^"\n]*)"?$', OS_RELEASE.read_text(), flags=re.MULTILINE))
    release = f"{system['ID']}-{system['VERSION_ID']}"
    paragraphs = DPKG_STATUS.read_text(encoding="utf-8").strip().split("\n\n")
    return [debian_component(paragraph, release) for paragraph in paragraphs if "\nStatus: install ok installed" in paragraph]


def bill_of_materials() -> dict[str, Any]:
    """The whole document."""
    packages = {component["bom-ref"]: component for component in map(python_component, distributions())}
    components = [*packages.values(), *debian_components()]
    return {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "components": sorted(components, key=lambda component: str(component["bom-ref"])),
    }


if __name__ == "__main__":
    print(json.dumps(bill_of_materials(), indent=1))
