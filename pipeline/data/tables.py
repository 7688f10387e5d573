"""Images listed in a table: CSV, JSON-lines or Parquet with the columns path, label and, if it says so, split.

A label is a class name or, where every label is a whole number, a class number; classes.txt beside the table then names the
classes, one a line. Several labels of an image are `a|b` in CSV and a list elsewhere; one such cell makes the whole table
multi-label.
"""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.data.class_folders import split_named
from pipeline.data.labels import CLASS_LIST, are_numbers, numbered_classes, read_class_list
from pipeline.data.sources import ImageSource, ListedImage, facts_of
from pipeline.errors import DataError, nearest

COLUMNS = ("path", "label", "split")
SEPARATOR = "|"
ROWS_AT_A_TIME = 10_000


class Row(NamedTuple):
    """One row: where it is in the table, the path, its labels as text, whether the cell was a list, and the split."""

    place: str
    path: str
    labels: tuple[str, ...]
    is_list: bool
    split: str


class TableImages(ImageSource):
    """The images that a table lists; paths are absolute or relative to the table. Raises DataError naming the row.

    The table is read twice: once for its classes, once to list.
    """

    kind = "table"

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            raise DataError(f"{path}: no such table.")
        names: set[str] = set()
        is_multi, lacking = False, None
        for row in self._rows():
            names.update(row.labels)
            is_multi |= row.is_list
            lacking = lacking or (None if row.labels else row)
        if lacking is not None and not is_multi:
            raise DataError(f"{path}: {lacking.place} ({lacking.path}) has no label.")
        self.task = "multi" if is_multi else "single"
        self.class_names = self._class_names(names)
        self._labels = {name: label for label, name in enumerate(self.class_names)}
        self._by_number = are_numbers(names) and not names <= set(self.class_names)

    def _class_names(self, names: set[str]) -> list[str]:
        listed = self.path.with_name(CLASS_LIST)
        if listed.is_file():
            found = read_class_list(listed)
        elif are_numbers(names):
            found = numbered_classes(set(map(int, names)), str(self.path), f"put a {CLASS_LIST} beside it")
        else:
            found = sorted(names)
        if len(found) < 2:
            raise DataError(f"{self.path}: has {len(found)} classes ({', '.join(found)}); at least 2 are needed.")
        return found

    def images(self) -> Iterator[ListedImage]:
        """List the images in the order of the table."""
        for row in self._rows():
            labels = tuple(self._class_number(row, label) for label in dict.fromkeys(row.labels))
            try:
                split = split_named(row.split) if row.split else None
            except DataError as error:
                raise DataError(f"{self.path}: {row.place}: {error}") from error
            yield ListedImage(row.path, labels, split, facts_of(self.path.parent / row.path))

    def _class_number(self, row: Row, label: str) -> int:
        if label in self._labels and not self._by_number:
            return self._labels[label]
        if self._by_number and int(label) < len(self.class_names):
            return int(label)
        known = nearest(label, self.class_names) or f" {self.path.with_name(CLASS_LIST)} has {len(self.class_names)} classes."
        raise DataError(f"{self.path}: {row.place} ({row.path}) has the label '{label}', which is no class.{known}")

    def read(self, name: str) -> bytes:
        """The file's bytes."""
        return (self.path.parent / name).read_bytes()

    # ---- the three kinds of table ----

    def _rows(self) -> Iterator[Row]:
        suffix = self.path.suffix.lower()
        reader = self._parquet if suffix == ".parquet" else self._json_lines if suffix in (".jsonl", ".ndjson") else self._csv
        try:
            for place, values in reader():
                yield self._row(place, values)
        except UnicodeDecodeError as error:
            raise DataError(
                f"{self.path}: is not UTF-8 text ({error.reason} at byte {error.start}). Save it as UTF-8."
            ) from error

    def _row(self, place: str, values: dict[str, Any]) -> Row:
        path, label = values.get("path"), values.get("label")
        if not isinstance(path, str) or not path or "\0" in path:
            raise DataError(f"{self.path}: {place} has no path.")
        is_list = isinstance(label, list)
        if isinstance(label, str) and SEPARATOR in label and self.path.suffix.lower() in (".csv", ".tsv"):
            label, is_list = label.split(SEPARATOR), True
        cells = label if isinstance(label, list) else [label]
        for cell in cells:
            if isinstance(cell, bool) or not isinstance(cell, str | int | None):
                raise DataError(f"{self.path}: {place} has the label {cell!r}; a label is a name or a whole number.")
        labels = tuple(text for cell in cells if cell is not None and (text := str(cell).strip()))
        return Row(place, path, labels, is_list, str(values.get("split") or "").strip())

    def _csv(self) -> Iterator[tuple[str, dict[str, Any]]]:
        with self.path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, delimiter="\t" if self.path.suffix.lower() == ".tsv" else ",", strict=True)
            try:
                reader.fieldnames = [name.strip().lower() for name in reader.fieldnames or []]
                self._require_columns(list(reader.fieldnames))
                for values in reader:
                    if None in values or None in values.values():
                        raise DataError(f"{self.path}: line {reader.line_num} has not {len(reader.fieldnames)} cells.")
                    yield f"line {reader.line_num}", values
            except csv.Error as error:
                raise DataError(f"{self.path}: line {reader.line_num} is not valid CSV ({error}).") from error

    def _json_lines(self) -> Iterator[tuple[str, dict[str, Any]]]:
        with self.path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                try:
                    values = json.loads(line)
                except ValueError as error:
                    raise DataError(f"{self.path}: line {number} is not valid JSON ({error}).") from error
                if not isinstance(values, dict):
                    raise DataError(f"{self.path}: line {number} is no JSON object.")
                self._require_columns(list(values), f"line {number}: ")
                yield f"line {number}", values

    def _parquet(self) -> Iterator[tuple[str, dict[str, Any]]]:
        from pyarrow import ArrowInvalid, parquet

        try:
            with parquet.ParquetFile(self.path) as table:
                names = table.schema_arrow.names
                self._require_columns(names)
                number = 0
                for batch in table.iter_batches(ROWS_AT_A_TIME, columns=[name for name in COLUMNS if name in names]):
                    for values in batch.to_pylist():
                        number += 1
                        yield f"row {number}", values
        except (ArrowInvalid, OSError) as error:
            raise DataError(f"{self.path}: cannot be read as Parquet ({' '.join(str(error).split())[:200]}).") from error

    def _require_columns(self, names: list[str], place: str = "") -> None:
        for column in COLUMNS[:2]:
            if column not in names:
                found = ", ".join(names) or "none"
                raise DataError(f"{self.path}: {place}has no column `{column}` (found: {found}). It needs path and label.")
