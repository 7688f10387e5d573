"""Which members of a WebDataset sample are its image and its label, in shards that others wrote.

A label is read as a number, a class name or a list of them; no member is ever unpickled.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import ConfigError, DataError
from pipeline.manifest import IMAGE_EXTENSIONS, DatasetManifest

RawLabel = int | str
CLASS_LIST = "classes.txt"  # beside a table or shards: the classes, one a line
# Said where somebody chooses to train on shards without an index, and again by each such training.
TRADE_OFFS = (
    "its shards have no index: an epoch is `data.steps_per_epoch` steps of a shuffled stream, in which a sample may come twice "
    "or not at all, and a resumed run goes on with other samples"
)


@dataclass(frozen=True)
class SampleRule:
    """Where to look: `label` is cls, txt or json:FIELD (a.b for a nested one), `image` an extension or "" for any known one."""

    label: str
    image: str
    class_names: tuple[str, ...]
    may_have_none: bool = False  # as an image of several labels may

    @classmethod
    def of(cls, manifest: DatasetManifest) -> "SampleRule":
        """The rule by which a data set was made; that of our own shards unless it says another."""
        own = "json:labels" if manifest.task == "multi" else "cls"
        preparation = manifest.preparation
        return cls(
            preparation.get("label", own), preparation.get("image", ""), tuple(manifest.class_names), manifest.task == "multi"
        )

    def read(self, members: Mapping[str, Any]) -> tuple[bytes, list[int]]:
        """The encoded image and the class numbers of a sample, given its members' bytes by extension. Raises DataError."""
        image = next((members[extension] for extension in self.image_extensions if extension in members), None)
        if image is None:
            raise DataError(f"has no image ({', '.join(self.image_extensions)})")
        if self.label_extension not in members:
            raise DataError(f"has no .{self.label_extension} label")
        labels = raw_labels(self.label, members[self.label_extension])
        if not labels and not self.may_have_none:
            raise DataError("has no label")
        return image, [self.class_number(label) for label in labels]

    @property
    def label_extension(self) -> str:
        """Extension of the member that holds the label."""
        return self.label.partition(":")[0]

    @property
    def image_extensions(self) -> tuple[str, ...]:
        """Extensions under which the image may be, the first found wins."""
        return (self.image,) if self.image else IMAGE_EXTENSIONS

    def class_number(self, label: RawLabel) -> int:
        """The number of a class given by number or name, a text first as a name. Raises DataError for one that there is not."""
        if isinstance(label, str) and label in self.class_names:
            return self.class_names.index(label)
        number = int(label) if isinstance(label, int) or are_numbers([label]) else -1
        if 0 <= number < len(self.class_names):
            return number
        raise DataError(f"has the label {label!r}, which is no class")


def require_label_rule(label: str) -> None:
    """Refuse what is none of cls, txt and json:FIELD. Raises ConfigError."""
    kind, _, field = label.partition(":")
    if kind not in ("cls", "txt", "json") or (kind == "json") != bool(field):
        raise ConfigError(f"--label is '{label}'; it is `cls`, `txt` or `json:FIELD`.")


def raw_labels(rule: str, content: bytes) -> list[RawLabel]:
    """The labels in the bytes of a label member, as written: numbers or names. Raises DataError."""
    kind, _, field = rule.partition(":")
    try:
        text = content.decode().strip()
        value: Any = json.loads(text) if kind == "json" else text
    except ValueError as error:
        raise DataError(f"has a .{kind} member that cannot be read ({error})") from error
    for name in field.split(".") if field else ():
        if not isinstance(value, dict) or name not in value:
            raise DataError(f"has no `{field}` in its .json member")
        value = value[name]
    values = value if isinstance(value, list) else [value]
    return [_as_label(item, kind) for item in values]


def _as_label(value: Any, kind: str) -> RawLabel:
    if isinstance(value, bool) or not isinstance(value, int | str) or value == "":
        raise DataError(f"has the label {value!r}, which is neither a number nor a name")
    if kind != "cls" or isinstance(value, int):
        return value
    if not value.lstrip("-").isdecimal():
        raise DataError(f"has {value!r} in its .cls member, not a class number")
    return int(value)


# ---- names of classes ----


def require_text(class_names: Iterable[str], where: str) -> None:
    """Refuse names that no JSON file or web page could hold: of odd bytes, or of half a character. Raises DataError."""
    for name in class_names:
        try:
            name.encode()
        except UnicodeEncodeError as error:
            raise DataError(f"{where}: the class {name!a} has a name that is not UTF-8. Rename it.") from error


def read_class_list(path: Path) -> list[str]:
    """The classes that a file lists, one a line. Raises DataError for a file that is not UTF-8 or names a class twice."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not UTF-8 text ({error.reason} at byte {error.start}). Save it as UTF-8.") from error
    found = [line.strip() for line in lines if line.strip()]
    if len(set(found)) < len(found):
        raise DataError(f"{path}: names a class twice.")
    return found


# So many more numbers than classes are identifiers, and not class numbers.
GAPS = 10
ALWAYS_ALLOWED = 1000


def are_numbers(labels: Iterable[str]) -> bool:
    """Whether labels written as text are whole numbers, all of them, and there are any."""
    found = list(labels)
    return bool(found) and all(text.isascii() and text.isdecimal() for text in found)


def numbered_classes(numbers: set[int], where: str, remedy: str) -> list[str]:
    """Names of the classes 0 to the largest number. Raises DataError for numbers that cannot be meant as class numbers."""
    largest = max(numbers, default=-1)
    if largest >= max(ALWAYS_ALLOWED, GAPS * len(numbers)):
        raise DataError(
            f"{where}: its labels are numbers up to {largest:,}, but only {len(numbers):,} different ones. If they are names, "
            f"{remedy} that lists them, one a line."
        )
    return [str(number) for number in range(largest + 1)]
