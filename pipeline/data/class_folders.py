"""What the folders of an image say: its split and its class. One set of rules for folders on disk and inside archives.

- A level at which every image lies in a folder called train, val, test (or validation, testing, ...) names the split.
- A class is the topmost folder on the way to an image that holds images itself: `animals/cat/1.jpg` is a cat, and so is
  `animals/cat/2024/2.jpg`. `class_level` names another level.
- A class is called by its folder's name, or by its path where two class folders have one name. Bytes that are not UTF-8 become
  escapes: no JSON file, tag or page could hold them.
"""

from collections import Counter
from collections.abc import Iterable

from pipeline.errors import DataError, nearest
from pipeline.manifest import IMAGE_EXTENSIONS

SPLIT_OF_FOLDER = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
NAMED = 6
Folder = tuple[str, ...]


def is_image_name(name: str) -> bool:
    """Whether a file of this name is taken for an image: by its extension, unless it or a folder above it is hidden."""
    return name.lower().endswith(IMAGE_ENDINGS) and not any(part.startswith(".") for part in name.split("/"))


IMAGE_ENDINGS = tuple(f".{extension}" for extension in IMAGE_EXTENSIONS)


class ClassFolders:
    """The rules applied to the folders that hold images, given relative to the source. Raises DataError below two classes."""

    def __init__(self, folders: Iterable[Folder], class_level: int | None, where: str) -> None:
        inside = sorted({folder for folder in folders if folder}, key=_as_bytes)
        self.split_level = _split_level(inside)
        self.class_level = class_level
        if self.split_level is None and class_level is None:
            _require_no_half_split(inside, where)
        self._holding = {self._without_split(folder) for folder in inside} - {()}
        found = {self._class_folder(folder) for folder in self._holding} - {None}
        names = Counter(folder[-1] for folder in found if folder)
        called = {folder: folder[-1] if names[folder[-1]] == 1 else "/".join(folder) for folder in found if folder}
        self._names = {folder: name.encode(errors="backslashreplace").decode() for folder, name in called.items()}
        self.class_names = sorted(self._names.values(), key=str.encode)
        self._labels = {name: label for label, name in enumerate(self.class_names)}
        if len(self.class_names) < 2:
            raise DataError(self._too_few(where, inside))

    def _without_split(self, folder: Folder) -> Folder:
        if self.split_level is None:
            return folder
        return (*folder[: self.split_level], *folder[self.split_level + 1 :])

    def _class_folder(self, folder: Folder) -> Folder | None:
        if self.class_level is not None:
            return folder[: self.class_level] if len(folder) >= self.class_level else None
        return next((folder[:depth] for depth in range(1, len(folder) + 1) if folder[:depth] in self._holding), None)

    def place(self, folder: Folder) -> tuple[int, str | None] | None:
        """(label, split) of the images of a folder; None for images that belong to no class."""
        if len(folder) <= (self.split_level or 0):
            return None
        class_folder = self._class_folder(self._without_split(folder))
        if class_folder is None or class_folder not in self._names:
            return None
        split = SPLIT_OF_FOLDER[folder[self.split_level].lower()] if self.split_level is not None else None
        return self._labels[self._names[class_folder]], split

    def _too_few(self, where: str, inside: list[Folder]) -> str:
        if not inside:
            return f"{where}: holds no folder with images; put the images of each class into a folder of its own."
        found = ", ".join("/".join(folder) for folder in inside[:NAMED]) + (", ..." if len(inside) > NAMED else "")
        level = f" at `dataset.class_level` {self.class_level}" if self.class_level is not None else ""
        return (
            f"{where}: holds {len(self.class_names)} class folders{level} (images lie in {found}); at least 2 are needed. "
            "Put each class into a folder of its own, or say with --dataset.class_level which folders name the classes."
        )


def _split_level(folders: list[Folder]) -> int | None:
    """The first level at which every folder's name is that of a split."""
    shallowest = min(map(len, folders), default=0)
    for level in range(shallowest):
        if all(folder[level].lower() in SPLIT_OF_FOLDER for folder in folders):
            return level
    return None


def _require_no_half_split(folders: list[Folder], where: str) -> None:
    """Refuse folders of which some are named as splits are, train among them, and others are not: one guess would be wrong."""
    for level in range(min(map(len, folders), default=0)):
        names = {folder[level] for folder in folders}
        splits = {name for name in names if name.lower() in SPLIT_OF_FOLDER}
        kinds, odd = {SPLIT_OF_FOLDER[name.lower()] for name in splits}, sorted(names - splits)
        if odd and "train" in kinds and len(kinds) > 1:
            found, others = ", ".join(sorted(splits)), ", ".join(odd[:NAMED]) + (", ..." if len(odd) > NAMED else "")
            raise DataError(
                f"{where}: images lie in {found}, which name splits, and beside them in {others}. Move that out of there, "
                "or say with --dataset.class_level which folders name the classes."
            )


def _as_bytes(folder: Folder) -> list[bytes]:
    return [part.encode(errors="surrogatepass") for part in folder]


def split_named(text: str) -> str:
    """The split that a word in a table means. Raises DataError for one that means none."""
    split = SPLIT_OF_FOLDER.get(text.strip().lower())
    if split is None:
        raise DataError(f"'{text}' is no split.{nearest(text, SPLIT_OF_FOLDER) or ' Use train, val or test.'}")
    return split
