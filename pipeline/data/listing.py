"""The list of a source's images as a table on disk: a million of them cost no more memory than ten thousand.

The table is scaffolding of one process, made anew by each run; nothing of it is part of the data set. A number counts images in
the order of their names, so it does not depend on the order in which a source lists them.
"""

import hashlib
import itertools
import sqlite3
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline.data.sources import ListedImage
from pipeline.errors import DataError

CACHE_KIBIBYTES = 4096
CHUNK_IMAGES = 2000
SCHEMA = """
    CREATE TABLE listed (name BLOB PRIMARY KEY, label INT, labels TEXT, split TEXT) WITHOUT ROWID;
    CREATE TABLE image (
        number INTEGER PRIMARY KEY, name BLOB, label INT, labels TEXT, split TEXT, is_open INT,
        content BLOB, num_bytes INT, reason TEXT
    );
    CREATE TABLE placed (position INTEGER PRIMARY KEY, number INT);
"""
# A file system's odd bytes reach Python as surrogates, an archive's sometimes too.
ODD_LETTERS = "surrogatepass"


class Fingerprint:
    """A digest of listed images that does not depend on their order; another name, label, split, size or time changes it."""

    def __init__(self) -> None:
        self._sum = 0

    def add(self, image: ListedImage) -> None:
        """Take one image in."""
        facts = ascii((image.name, image.labels, image.split, image.facts)).encode()
        self._sum += int.from_bytes(hashlib.sha256(facts).digest(), "big")

    def hexdigest(self) -> str:
        """The digest of what was taken in so far."""
        return f"{self._sum % 2**256:064x}"


@dataclass(frozen=True, slots=True)
class Group:
    """Byte-identical images, with the label of the first of them."""

    label: int
    content: bytes
    size: int


@dataclass(frozen=True, slots=True)
class PlacedImage:
    """An image on its way into a shard."""

    name: str
    labels: tuple[int, ...]
    num_bytes: int  # when it was hashed


class Listing:
    """The table. A context manager: it is deleted at the end."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.num_images = 0
        self._chunk_starts: list[bytes] = []

    def __enter__(self) -> "Listing":
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.unlink(missing_ok=True)
        self._table = sqlite3.connect(self.path, isolation_level=None)
        # It need not survive a crash, and nobody else looks at it.
        for setting in ("journal_mode=OFF", "synchronous=OFF", "locking_mode=EXCLUSIVE", f"cache_size=-{CACHE_KIBIBYTES}"):
            self._table.execute(f"PRAGMA {setting}")
        self._table.executescript(SCHEMA)
        return self

    def __exit__(self, *_: object) -> None:
        self._table.close()
        self.path.unlink(missing_ok=True)

    # ---- what the source says ----

    def fill(self, images: Iterable[ListedImage]) -> str:
        """Take in every image and return their fingerprint. Raises DataError for a name that comes twice."""
        fingerprint = Fingerprint()

        def rows() -> Iterator[tuple[bytes, int, str, str | None]]:
            for image in images:
                fingerprint.add(image)
                self.num_images += 1
                name = image.name.encode(errors=ODD_LETTERS)
                first = image.labels[0] if image.labels else -1
                yield name, first, ",".join(map(str, image.labels)), image.split

        self._table.execute("BEGIN")
        try:
            self._table.executemany("INSERT INTO listed VALUES (?, ?, ?, ?)", rows())
        except sqlite3.IntegrityError as error:
            raise DataError("the source lists an image twice under one name.") from error
        self._table.execute("COMMIT")
        names = self._table.execute("SELECT name FROM listed ORDER BY name")
        self._chunk_starts = [name for number, (name,) in enumerate(names) if number % CHUNK_IMAGES == 0]
        return fingerprint.hexdigest()

    def num_by_label(self) -> dict[int, int]:
        """Images of each first label; -1 for those without any."""
        return dict(self._table.execute("SELECT label, COUNT(*) FROM listed GROUP BY label"))

    @property
    def num_chunks(self) -> int:
        """Chunks of consecutive images by name."""
        return len(self._chunk_starts)

    def chunk_size(self, number: int) -> int:
        """Images in a chunk: the last may be short."""
        return min(CHUNK_IMAGES, self.num_images - number * CHUNK_IMAGES)

    def chunk(self, number: int) -> list[tuple[str, int]]:
        """(name, first label) of the images of a chunk."""
        start = self._chunk_starts[number]
        rows = self._table.execute(
            "SELECT name, label FROM listed WHERE name >= ? ORDER BY name LIMIT ?", (start, CHUNK_IMAGES)
        )
        return [(name.decode(errors=ODD_LETTERS), label) for name, label in rows]

    # ---- what the images hold ----

    def set_contents(self, contents: Iterable[tuple[bytes | None, int, str | None]]) -> None:
        """Take in (sha256, size, None) or (None, 0, why it was rejected) of every image by name."""
        listed = self._table.execute("SELECT name, label, labels, split FROM listed ORDER BY name")
        rows = ((number, *row, *content) for number, (row, content) in enumerate(zip(listed, contents, strict=True)))
        self._table.execute("BEGIN")
        columns = "number, name, label, labels, split, content, num_bytes, reason"
        self._table.executemany(f"INSERT INTO image ({columns}) VALUES (?, ?, ?, ?, ?, ?, ?, ?)", rows)  # noqa: S608 - constants
        self._table.execute("UPDATE image SET is_open = split IS NULL OR split = 'train', split = COALESCE(split, 'train')")
        self._table.execute("COMMIT")

    def named_splits(self) -> set[str]:
        """The splits that the source itself names."""
        return {split for (split,) in self._table.execute("SELECT DISTINCT split FROM listed WHERE split IS NOT NULL")}

    def rejected_of(self, label: int, limit: int) -> list[tuple[str, str]]:
        """(name, reason) of the first rejected images of a class."""
        rows = self._table.execute("SELECT name, reason FROM image WHERE content IS NULL AND label = ? LIMIT ?", (label, limit))
        return [(name.decode(errors=ODD_LETTERS), reason) for name, reason in rows]

    def num_open_by_label(self) -> dict[int, int]:
        """Good images of each class that may be shared out: those in groups whose first image is of that class."""
        rows = self._table.execute(f"SELECT label, SUM(size) FROM ({_GROUPS}) GROUP BY label")  # noqa: S608
        return dict(rows)

    def open_groups(self, key: Callable[[bytes], bytes]) -> Iterator[Group]:
        """Yield the groups that may be shared out, class by class, each class in the order of `key(content)`."""
        self._table.create_function("group_key", 1, key, deterministic=True)
        rows = self._table.execute(f"SELECT label, content, size FROM ({_GROUPS}) ORDER BY label, group_key(content)")  # noqa: S608
        return itertools.starmap(Group, rows)

    # ---- which image goes where ----

    def move(self, moves: Iterable[tuple[str, bytes]]) -> None:
        """Give the open images of each (split, content) that split."""
        self._table.execute("BEGIN")
        self._table.execute("CREATE TEMP TABLE moved (content BLOB PRIMARY KEY, split TEXT) WITHOUT ROWID")
        self._table.executemany("INSERT INTO moved (split, content) VALUES (?, ?)", moves)
        self._table.execute(
            "UPDATE image SET split = (SELECT split FROM moved WHERE moved.content = image.content) "
            "WHERE is_open AND content IN (SELECT content FROM moved)"
        )
        self._table.execute("DROP TABLE moved")
        self._table.execute("COMMIT")

    def labels_without_train(self) -> list[int]:
        """Classes that have open images but none of them in train."""
        rows = self._table.execute(
            "SELECT label FROM image WHERE content IS NOT NULL AND is_open AND label >= 0 "
            "GROUP BY label HAVING SUM(split = 'train') = 0"
        )
        return [label for (label,) in rows]

    def open_contents_of(self, label: int) -> Iterator[bytes]:
        """Contents of the open images of a class."""
        rows = self._table.execute(
            "SELECT DISTINCT content FROM image WHERE is_open AND label = ? AND content NOT NULL", (label,)
        )
        return (content for (content,) in rows)

    def num_across_splits(self) -> int:
        """Images that have a byte-identical one in another split."""
        (number,) = self._table.execute(
            "SELECT COALESCE(SUM(size), 0) FROM (SELECT COUNT(*) AS size FROM image WHERE content IS NOT NULL "
            "GROUP BY content HAVING COUNT(DISTINCT split) > 1)"
        ).fetchone()
        return int(number)

    def class_counts(self) -> Iterator[tuple[str, int, int]]:
        """Yield (split, first label, images)."""
        yield from self._table.execute(
            "SELECT split, label, COUNT(*) FROM image WHERE content IS NOT NULL GROUP BY split, label"
        )

    # ---- in which order ----

    def place(self, split: str, key: Callable[[bytes, bytes], bytes]) -> None:
        """Put the images of a split behind those placed before, in the order of `key(content, name)`."""
        self._table.create_function("order_key", 2, key, deterministic=True)
        self._table.execute(
            "INSERT INTO placed (number) SELECT number FROM image WHERE split = ? AND content IS NOT NULL "
            "ORDER BY order_key(content, name), number",
            (split,),
        )

    def placed(self, first: int, count: int) -> list[PlacedImage]:
        """The images at positions [first, first + count), counted over all splits."""
        rows = self._table.execute(
            "SELECT name, labels, num_bytes FROM placed JOIN image USING (number) "
            "WHERE position BETWEEN ? AND ? ORDER BY position",
            (first + 1, first + count),
        )
        return [
            PlacedImage(name.decode(errors=ODD_LETTERS), tuple(map(int, labels.split(","))) if labels else (), num_bytes)
            for name, labels, num_bytes in rows
        ]


# A group's first image is the one of the lowest number: SQLite takes the other columns from the row of MIN.
_GROUPS = (
    "SELECT label, content, COUNT(*) AS size, MIN(number) FROM image WHERE is_open AND content IS NOT NULL GROUP BY content"
)
