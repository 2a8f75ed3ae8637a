"""Where pictures come from: folders, lists and splits, resolved to one `ImageList`."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from promptkd.errors import DataError
from promptkd.prompts import plain_name

EXTENSIONS = frozenset(
    f".{name}"
    for name in (
        "jpg",
        "jpeg",
        "jpe",
        "png",
        "webp",
        "bmp",
        "gif",
        "tif",
        "tiff",
        "ppm",
        "pgm",
        "heic",
        "heif",
        "avif",
    )
)
SPLIT_FILE = "split.json"


@dataclass(frozen=True, slots=True)
class ImageList:
    """Pictures in a fixed order, each with the name that decides its random views.

    Attributes:
        paths: files, one a picture.
        names: path relative to the list's root, "/" separated; views depend on it alone.
        labels: (N,) int64 indices into `class_names`, or None.
        class_names: names of the labels, or None.
    """

    paths: tuple[str, ...]
    names: tuple[str, ...]
    labels: NDArray[np.int64] | None = None
    class_names: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.paths)

    def select(self, rows: Sequence[int] | NDArray[np.int64]) -> ImageList:
        """The pictures of these rows, in their order."""
        picked = [int(r) for r in rows]
        return ImageList(
            tuple(self.paths[r] for r in picked),
            tuple(self.names[r] for r in picked),
            None if self.labels is None else self.labels[picked],
            self.class_names,
        )

    def digest(self) -> str:
        """32 hex digits over names and labels: tells two lists apart."""
        labels = [] if self.labels is None else self.labels.tolist()
        text = json.dumps([self.names, labels, self.class_names])
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


@dataclass(frozen=True, slots=True)
class Split:
    """A `split.json`: which pictures are for training, validation and test; base and novel names."""

    path: Path
    parts: dict[str, tuple[str, ...]]
    base: tuple[str, ...]
    novel: tuple[str, ...]


def read_split(path: Path) -> Split:
    """Read lists `train`, `val`, `test` of relative paths and optional `base`, `novel` names."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"'{path}' is no readable JSON split: {error}") from error
    keys = ("train", "val", "test", "base", "novel")
    lists: dict[str, Any] = (
        {k: data.get(k, []) for k in keys} if isinstance(data, dict) else {"": None}
    )
    if not all(isinstance(v, list) and all(isinstance(s, str) for s in v) for v in lists.values()):
        raise DataError(f"'{path}' must hold lists of strings: train, val, test, base, novel")
    parts = {k: tuple(lists[k]) for k in ("train", "val", "test")}
    return Split(path, parts, tuple(lists["base"]), tuple(lists["novel"]))


def find_split(folder: Path) -> Split | None:
    """The split.json in an image folder or beside it, if there is one."""
    for place in (folder / SPLIT_FILE, folder.parent / SPLIT_FILE):
        if place.is_file():
            return read_split(place)
    return None


def unlabelled(images: Any) -> ImageList:
    """Resolve the pictures to distil on; labels, where there are any, are dropped.

    Args:
        images: a folder (searched below; with a split.json its `train` part), a text, CSV, TSV or
            JSONL file that lists paths, a list of paths, or an `ImageList`.

    Raises:
        DataError: nothing there, or no picture in it.
    """
    if isinstance(images, ImageList):
        found = images
    elif isinstance(images, str | os.PathLike):
        place = Path(images).expanduser()
        if place.is_dir():
            split = find_split(place)
            found = _from_folder(place, split.parts["train"] if split else None)
        elif place.is_file():
            rows = _read_list(place)
            found = _from_paths([path for path, _ in rows], place.parent)
        else:
            raise DataError(
                f"'{images}' is neither a folder of pictures nor a file that lists them"
            )
    elif isinstance(images, Sequence):
        found = _from_paths([_only_path(item) for item in images], None)
    else:
        raise DataError(
            f"pictures must be a folder, a list file or a list of paths, not {type(images).__name__}"
        )
    if len(found) == 0:
        raise DataError(f"no pictures in {_describe(images)}; looked for {_extensions()}")
    return ImageList(found.paths, found.names)


def pictures_in(folder: Path) -> ImageList:
    """Every picture below a folder, sorted by name, whatever a split says."""
    found = _from_folder(folder, None)
    if len(found) == 0:
        raise DataError(f"no pictures in '{folder}'; looked for {_extensions()}")
    return found


def labelled(
    source: Any, class_names: Sequence[str] | None = None, *, part: str = "train"
) -> ImageList:
    """Resolve labelled pictures.

    Args:
        source: a folder with one sub-folder a class (with a split.json its `part`), a CSV, TSV or
            JSONL file of (path, label), a list of (path, class name) pairs, or an `ImageList`.
        class_names: the names that labels must be among, in label order; default: those found,
            sorted. "_" and blanks count as the same.
        part: which list of a split.json to take.

    Raises:
        DataError: nothing there, no labels, or a label that is not among the class names.
    """
    if isinstance(source, ImageList):
        return _relabel(source, class_names)
    pairs: list[tuple[str, str]]
    root: Path | None = None
    if isinstance(source, str | os.PathLike):
        place = Path(source).expanduser()
        if place.is_dir():
            root = place
            pairs = _folder_pairs(place, part)
        elif place.is_file():
            root = place.parent
            pairs = [(path, _need_label(label, path, place)) for path, label in _read_list(place)]
        else:
            raise DataError(
                f"'{source}' is neither a folder with one sub-folder a class nor a list"
            )
    else:
        pairs = [(str(path), str(label)) for path, label in source]
    if not pairs:
        raise DataError(
            f"no labelled pictures in {_describe(source)}; expected FOLDER/CLASS NAME/*.jpg "
            "or a list of (path, label)"
        )
    names = tuple(class_names) if class_names else tuple(sorted({plain_name(n) for _, n in pairs}))
    images = _from_paths([path for path, _ in pairs], root)
    return ImageList(images.paths, images.names, _label_rows(pairs, names, source), names)


class PublishedNames(tuple[str, ...]):
    """The class names of a published dataset, as they are: some repeat, and labels are places.

    ImageNet's list has "missile" and "sunglasses" twice. Names of one's own must not repeat.
    """

    __slots__ = ()


def check_class_names(names: Sequence[str]) -> tuple[str, ...]:
    """Class names as a tuple; empty and blank names are an error, repeated ones unless published."""
    if isinstance(names, str) or not names:
        raise DataError("class names must be a list with at least one name")
    seen: dict[str, int] = {}
    for row, name in enumerate(names):
        if not isinstance(name, str) or not name.strip():
            raise DataError(f"class name {row + 1} of {len(names)} is empty")
        key = plain_name(name).strip()
        if key in seen and not isinstance(names, PublishedNames):
            raise DataError(
                f"class name '{name}' stands twice (places {seen[key] + 1} and {row + 1})"
            )
        seen[key] = row
    return names if isinstance(names, PublishedNames) else tuple(names)


def read_class_names(path: str | os.PathLike[str]) -> tuple[str, ...]:
    """One class name a line; blank lines are skipped."""
    try:
        lines = Path(path).expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"class names can't be read from '{path}': {error}") from error
    return check_class_names([line.strip() for line in lines if line.strip()])


def few_shot(images: ImageList, shots: int, seed: int) -> ImageList:
    """`shots` pictures a class by `random.sample`, classes in order of first appearance.

    Draws as the paper's code does after `random.seed(seed)`; a class with fewer pictures gives
    all of them without a draw. `shots` 0 takes everything.
    """
    if shots <= 0:
        return images
    assert images.labels is not None
    groups: dict[int, list[int]] = {}
    for row, label in enumerate(images.labels.tolist()):
        groups.setdefault(label, []).append(row)
    rng = random.Random(seed)
    rows: list[int] = []
    for group in groups.values():
        rows += rng.sample(group, shots) if len(group) >= shots else group
    return images.select(rows)


def _from_folder(folder: Path, part: Sequence[str] | None) -> ImageList:
    if part is not None:
        missing = next((name for name in part if not (folder / name).is_file()), None)
        if missing is not None:
            raise DataError(f"'{missing}' stands in the split of '{folder}' but is not there")
        names = tuple(part)
    else:
        names = tuple(_walk(folder))
    return ImageList(tuple(str(folder / n) for n in names), names)


def _walk(folder: Path) -> list[str]:
    found = []
    for base, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        for file in files:
            if not file.startswith(".") and os.path.splitext(file)[1].lower() in EXTENSIONS:
                found.append(os.path.relpath(os.path.join(base, file), folder).replace(os.sep, "/"))
    return sorted(found)


def _folder_pairs(folder: Path, part: str) -> list[tuple[str, str]]:
    split = find_split(folder)
    if split is not None and not split.parts[part]:
        raise DataError(f"'{split.path}' lists no pictures under '{part}'")
    names = _from_folder(folder, split.parts[part] if split else None).names
    flat = [name for name in names if "/" not in name]
    if flat:
        raise DataError(
            f"'{folder / flat[0]}' lies in no class folder; expected '{folder}/CLASS NAME/picture', "
            "or give a CSV file of path,label"
        )
    return [(name, name.split("/")[0]) for name in names]


def _from_paths(paths: Sequence[str], root: Path | None) -> ImageList:
    """Paths as given; names are relative to `root`, or to what all of them share."""
    full = [str(root / p) if root is not None else str(Path(p).expanduser()) for p in paths]
    absent = next((p for p in full if not os.path.isfile(p)), None)
    if absent is not None:
        raise DataError(f"'{absent}' is in the list but is no file")
    if root is not None:
        names = [os.path.relpath(p, root) for p in full]
    else:
        folders = [os.path.dirname(os.path.abspath(p)) for p in full]
        shared = os.path.commonpath(folders) if folders else ""
        names = [os.path.relpath(os.path.abspath(p), shared) for p in full]
    return ImageList(tuple(full), tuple(n.replace(os.sep, "/") for n in names))


def _read_list(path: Path) -> list[tuple[str, str | None]]:
    """Rows (path, label or None) of a text, CSV, TSV or JSONL list."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".jsonl":
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
            return [(str(r["path"]), None if "label" not in r else str(r["label"])) for r in rows]
        if path.suffix in (".csv", ".tsv"):
            table = csv.DictReader(
                text.splitlines(), delimiter="\t" if path.suffix == ".tsv" else ","
            )
            return [(r["path"], r.get("label")) for r in table]
    except KeyError as error:
        raise DataError(
            f"'{path}' has no column {error}; expected path and, optionally, label"
        ) from error
    except (OSError, UnicodeDecodeError, ValueError, TypeError) as error:
        raise DataError(f"'{path}' is no readable list of pictures: {error}") from error
    return [(line.strip(), None) for line in text.splitlines() if line.strip()]


def _need_label(label: str | None, path: str, source: Path) -> str:
    if label is None or not label.strip():
        raise DataError(f"'{source}' gives no label for '{path}'; expected columns path and label")
    return label


def _label_rows(
    pairs: Sequence[tuple[str, str]], names: Sequence[str], source: Any
) -> NDArray[np.int64]:
    index = {plain_name(name): row for row, name in enumerate(names)}
    unknown = sorted({label for _, label in pairs if plain_name(label) not in index})
    if unknown:
        shown = ", ".join(f"'{u}'" for u in unknown[:3])
        raise DataError(
            f"{_describe(source)} has labels that are not among the {len(names)} class names: {shown}"
            + (f" and {len(unknown) - 3} more" if len(unknown) > 3 else "")
        )
    return np.array([index[plain_name(label)] for _, label in pairs], dtype=np.int64)


def _relabel(images: ImageList, class_names: Sequence[str] | None) -> ImageList:
    if images.labels is None or images.class_names is None:
        raise DataError("these pictures have no labels")
    if class_names is None or tuple(class_names) == images.class_names:
        return images
    pairs = [(p, images.class_names[y]) for p, y in zip(images.paths, images.labels, strict=True)]
    labels = _label_rows(pairs, class_names, "the list")
    return ImageList(images.paths, images.names, labels, tuple(class_names))


def _only_path(item: Any) -> str:
    if isinstance(item, str | os.PathLike):
        return os.fspath(item)
    raise DataError(f"a list of pictures must hold paths, not {type(item).__name__}")


def _describe(source: Any) -> str:
    return f"'{source}'" if isinstance(source, str | os.PathLike) else "the list given"


def _extensions() -> str:
    return ", ".join(sorted(EXTENSIONS))
