"""Under which licence each locked package comes: `make licenses` writes docs/licenses.md.

Packages say it in three ways, two of them in free words, so what is said is turned into SPDX identifiers here. Only the
standard library is needed: docker/sbom.py runs this inside an image.
"""

import re
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

UNKNOWN = "unknown"
NVIDIA = "LicenseRef-NVIDIA-Proprietary"
# Of packages that say nothing, or nothing that can be read, in their metadata: from the text that they ship or their home page.
READ = {
    "cuda-toolkit": NVIDIA,
    "huey": "MIT",
    "nvidia-cusparselt-cu13": NVIDIA,
    "pyelftools": "Unlicense",
    "python-dateutil": "Apache-2.0 OR BSD-3-Clause",
    "skops": "MIT",
}
# Free words of the field `License` and of classifiers. Which BSD licence it is, the classifier does not say.
WORDS = {
    "3-clause bsd license": "BSD-3-Clause",
    "apache": "Apache-2.0",
    "apache 2.0": "Apache-2.0",
    "apache license 2.0": "Apache-2.0",
    "apache software license": "Apache-2.0",
    "bsd": "BSD",
    "bsd 2-clause license": "BSD-2-Clause",
    "bsd license": "BSD",
    "gnu library or lesser general public license (lgpl)": "LGPL-3.0-or-later",
    "lgpl with exceptions": "LGPL-3.0-or-later",
    "mit license": "MIT",
    "mozilla public license 2.0 (mpl 2.0)": "MPL-2.0",
    "psfl": "PSF-2.0",
    "python software foundation license": "PSF-2.0",
}
PERMISSIVE = {
    "0BSD",
    "Apache-2.0",
    "BSD",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "BSL-1.0",
    "CC0-1.0",
    "LLVM-exception",
    "MIT",
    "MIT-0",
    "MIT-CMU",
    "PSF-2.0",
    "Unlicense",
    "ZPL-2.1",
    "Zlib",
}
# What else there is, and what follows from it.
OTHERS = {
    "LGPL-3.0-or-later": "may be used by anything; whoever passes it on must let others replace it",
    "MPL-2.0": "may be used by anything; changes of its own files are passed on under it",
    "GPL-3.0": "a program that checks this project's files; nothing of it is in what is passed on",
    "GPL-3.0-or-later": "a program that builds its wheel; nothing of it is in what is passed on",
    NVIDIA: "not free software: CUDA and NCCL may be passed on with a program under NVIDIA's own terms (the CUDA Toolkit EULA)",
}


def licence_of(package: Distribution) -> str:
    """The SPDX expression of an installed package, or `unknown`."""
    name = normalised(package.metadata["Name"])
    if name in READ:
        return READ[name]
    said = {key: package.metadata.get_all(key) or [""] for key in ("License-Expression", "License", "Classifier")}
    if said["License-Expression"][0]:
        return str(said["License-Expression"][0])
    field = " ".join(said["License"][0].split())
    if 0 < len(field) <= 40:  # longer ones are whole licences
        return WORDS.get(field.lower().rpartition(" :: ")[2], field)
    classifiers = [line.rpartition(" :: ")[2].lower() for line in said["Classifier"] if line.startswith("License ::")]
    known = sorted({WORDS[word] for word in classifiers if word in WORDS})
    return " OR ".join(known) or UNKNOWN


def unusual_in(expression: str) -> list[str]:
    """The parts of an SPDX expression that are not permissive; a choice between licences is as good as its best."""
    parts = [re.split(r" AND | WITH ", choice.strip("() ")) for choice in expression.split(" OR ")]
    return min(([part.strip("() ") for part in parts if part.strip("() ") not in PERMISSIVE] for parts in parts), key=len)


def normalised(name: str) -> str:
    """A package's name as locks and indexes write it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def locked(lock: Path) -> list[str]:
    """The names in a lock file, each once."""
    return list(dict.fromkeys(re.findall(r"^([a-z0-9][a-z0-9.-]*)==", lock.read_text(), flags=re.MULTILINE)))


def main() -> None:
    """Write docs/licenses.md from the lock files and what is installed here."""
    repository = Path(__file__).parents[1]
    path = repository / "docs/licenses.md"
    path.write_text(page(repository))
    print(path)


def page(repository: Path) -> str:
    """The page: a table of the packages, then what is not permissive among their licences."""
    images = {path.stem: locked(path) for path in sorted((repository / "docker").glob("*.lock"))}
    rows, elsewhere, unusual = [], [], dict[str, list[str]]()
    for name in locked(repository / "requirements.lock"):
        try:
            package = distribution(name)
        except PackageNotFoundError:
            elsewhere.append(name)
            continue
        licence = licence_of(package)
        where = ", ".join(image for image, names in images.items() if name in names) or "development only"
        rows.append(f"| {name} | {licence} | {where} |")
        for part in unusual_in(licence):
            unusual.setdefault(part, []).append(name)
    named = [f"- **{part}**: {OTHERS.get(part, '?')}. {', '.join(names)}." for part, names in sorted(unusual.items())]
    return "\n".join([HEAD, *rows, "", "## Not permissive", "", *named, "", TAIL.format(names=", ".join(elsewhere)), ""])


HEAD = """# Licences of the dependencies

Made by `make licenses` from `requirements.lock`, which has the versions, and what the packages say of themselves; their texts
lie beside them, in the images too (`NAME.dist-info/licenses`). "BSD" is one of two that differ in a clause. The last column
names the images that hold a package. Shardline itself is Apache-2.0; its wheel also holds libjpeg-turbo (IJG AND BSD-3-Clause
AND Zlib, `pipeline/data/native`) and onnxruntime-web (MIT, `pipeline/export/web`).

| package | licence | images |
|---|---|---|"""
TAIL = "Locked for other systems or versions of Python, and not looked at: {names}."


if __name__ == "__main__":
    main()
