"""Where pictures come from: folders, lists, shards and datasets, resolved to one `ImageList`."""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from promptkd.class_names import PublishedNames, plain_name
from promptkd.data.datasets import dataset_pictures, is_dataset, pick_part
from promptkd.data.lists import LISTS, Entry, read_list
from promptkd.data.pictures import Found, Picture
from promptkd.data.shards import expand, is_shard, shard_pictures
from promptkd.errors import DataError

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
        paths: where each picture is: a file, a part of an archive, or a row of a dataset.
        names: path relative to the list's root, "/" separated; views depend on it alone.
        labels: (N,) int64 indices into `class_names`, or None.
        class_names: names of the labels, or None.
        origin: what tells the source from others with the same names; empty for files.
    """

    paths: tuple[Picture, ...]
    names: tuple[str, ...]
    labels: NDArray[np.int64] | None = None
    class_names: tuple[str, ...] | None = None
    origin: str = ""

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
            self.origin,
        )

    def digest(self) -> str:
        """32 hex digits over names and labels: tells two lists apart."""
        labels = [] if self.labels is None else self.labels.tolist()
        origin = [self.origin] if self.origin else []
        text = json.dumps([self.names, labels, self.class_names, *origin])
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
        images: a folder (searched below; with a split.json its `train` part), a text, CSV, TSV,
            JSONL or Parquet file that lists paths, a list of paths, tar shards (a path, a pattern
            as "shards/{000..012}.tar", a list of paths, or a folder of nothing else), a dataset
            object (Hugging Face, torchvision; of a mapping of parts its `train`), or an
            `ImageList`.

    Raises:
        DataError: nothing there, or no picture in it.
    """
    if isinstance(images, ImageList):
        paths, names, origin = images.paths, images.names, images.origin
    else:
        found = _find(images, "train", labels=False)
        paths, names, origin = tuple(found.pictures), tuple(found.names), found.origin
    if not paths:
        raise DataError(f"no pictures in {_describe(images)}; looked for {_extensions()}")
    return ImageList(paths, names, origin=origin)


def pictures_in(place: str | os.PathLike[str]) -> ImageList:
    """Every picture of a folder, sorted by name, whatever a split says; or of a list or tar shards.

    Raises:
        DataError: nothing there, or no picture in it.
    """
    folder = Path(place).expanduser()
    if not folder.is_dir():
        return unlabelled(place)
    found = _from_folder(folder, None)
    shards = [] if found.pictures else sorted(p for p in folder.iterdir() if is_shard(p))
    if shards:
        found = shard_pictures(shards, labels=False)
    if not found.pictures:
        raise DataError(f"no pictures in '{folder}'; looked for {_extensions()}")
    return ImageList(tuple(found.pictures), tuple(found.names))


def stands_for_many(place: str | os.PathLike[str]) -> bool:
    """Whether a path is a folder, a list, a tar shard or a pattern, not that of one picture."""
    path = Path(place).expanduser()
    if path.exists():
        return path.is_dir() or is_shard(path) or path.suffix.lower() in LISTS
    return expand(os.fspath(path)) != [os.fspath(path)]


def labelled(
    source: Any, class_names: Sequence[str] | None = None, *, part: str = "train"
) -> ImageList:
    """Resolve labelled pictures.

    Args:
        source: a folder with one sub-folder a class (with a split.json its `part`), a CSV, TSV,
            JSONL or Parquet file of (path, label), a list of (path, class name) pairs, tar shards
            as for `unlabelled` with a .cls, .json ("label") or .txt beside each picture, a
            dataset object, or an `ImageList`.
        class_names: the names that labels must be among, in label order; default: those found,
            sorted, or in the dataset's order. "_" and blanks count as the same. A label that is a
            number and no name is a place in this list, from 0.
        part: which list of a split.json, or which part of a mapping of datasets, to take.

    Raises:
        DataError: nothing there, no labels, or a label that is not among the class names.
    """
    if isinstance(source, ImageList):
        return _relabel(source, class_names)
    found = _find(source, part, labels=True)
    if not found.pictures:
        raise DataError(
            f"no labelled pictures in {_describe(source)}; expected FOLDER/CLASS NAME/*.jpg "
            "or a list of (path, label)"
        )
    assert found.labels is not None
    known = None if found.class_names is None else PublishedNames(found.class_names)
    texts = _label_names(found, known or class_names, source)
    names: tuple[str, ...]
    if known is not None and (not class_names or tuple(class_names) == known):
        names, rows = known, np.array(found.labels, dtype=np.int64)  # places, whatever repeats
    else:
        names = tuple(class_names or sorted({plain_name(text) for text in texts}))
        rows = _label_rows(texts, names, source)
    return ImageList(tuple(found.pictures), tuple(found.names), rows, names, found.origin)


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


def _find(source: Any, part: str, *, labels: bool) -> Found:
    """The pictures of any source, with their labels if they are wanted."""
    if isinstance(source, str | os.PathLike):
        return _find_on_disk(os.path.expanduser(os.fspath(source)), part, labels)
    if isinstance(source, Mapping):
        return _find(pick_part(source, part), part, labels=labels)
    if is_dataset(source):
        return dataset_pictures(source, labels=labels)
    if not isinstance(source, Iterable) or isinstance(source, bytes):
        raise DataError(
            "pictures must be a folder, a list file, tar shards, a dataset or a list of paths, "
            f"not {type(source).__name__}"
        )
    items = list(source)
    if items and all(isinstance(i, str | os.PathLike) and is_shard(i) for i in items):
        return shard_pictures(items, labels=labels)
    return _pairs(items) if labels else _from_paths([_only_path(i) for i in items], None)


def _find_on_disk(source: str, part: str, labels: bool) -> Found:
    place = Path(source)
    if place.is_dir():
        found = _from_classes(place, part) if labels else _from_split_folder(place)
        shards = [] if found.pictures else sorted(p for p in place.iterdir() if is_shard(p))
        return shard_pictures(shards, labels=labels) if shards else found
    if is_shard(place) and place.is_file():
        return shard_pictures([place], labels=labels)
    if place.is_file():
        entries = read_list(place)
        texts = [_need_label(e.label, e.path, place) for e in entries] if labels else None
        return _from_paths([e.path for e in entries], place.parent, entries, texts)
    files = expand(source)
    if files == [source]:
        raise DataError(
            f"'{source}' is neither a folder of pictures, a file that lists them, nor tar shards"
        )
    if not files:
        raise DataError(f"no file has a name like '{source}'")
    if all(is_shard(file) for file in files):
        return shard_pictures(files, labels=labels)
    if labels:
        raise DataError(f"'{source}' stands for files without labels; expected tar shards")
    return _from_paths(files, None)


def _from_split_folder(folder: Path) -> Found:
    split = find_split(folder)
    return _from_folder(folder, split.parts["train"] if split else None)


def _from_folder(folder: Path, part: Sequence[str] | None) -> Found:
    if part is not None:
        missing = next((name for name in part if not (folder / name).is_file()), None)
        if missing is not None:
            raise DataError(f"'{missing}' stands in the split of '{folder}' but is not there")
    names = _walk(folder) if part is None else list(part)
    return Found([str(folder / n) for n in names], names)


def _walk(folder: Path) -> list[str]:
    found = []
    for base, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        for file in files:
            if not file.startswith(".") and os.path.splitext(file)[1].lower() in EXTENSIONS:
                found.append(os.path.relpath(os.path.join(base, file), folder).replace(os.sep, "/"))
    return sorted(found)


def _from_classes(folder: Path, part: str) -> Found:
    """A folder with one sub-folder a class."""
    split = find_split(folder)
    if split is not None and not split.parts[part]:
        raise DataError(f"'{split.path}' lists no pictures under '{part}'")
    found = _from_folder(folder, split.parts[part] if split else None)
    flat = next((name for name in found.names if "/" not in name), None)
    if flat is not None:
        raise DataError(
            f"'{folder / flat}' lies in no class folder; expected '{folder}/CLASS NAME/picture', "
            "or give a CSV file of path,label"
        )
    return Found(found.pictures, found.names, [name.split("/")[0] for name in found.names])


def _pairs(items: Sequence[Any]) -> Found:
    """(path, class name) pairs."""
    wrong = next((i for i in items if not isinstance(i, tuple | list) or len(i) != 2), None)
    if wrong is not None:
        raise DataError(
            f"a list of labelled pictures must hold (path, class name) pairs, not {wrong!r:.80}"
        )
    return _from_paths(
        [_only_path(path) for path, _ in items], None, texts=[str(label) for _, label in items]
    )


def _from_paths(
    paths: Sequence[str],
    root: Path | None,
    entries: Sequence[Entry] = (),
    texts: Sequence[str] | None = None,
) -> Found:
    """Paths as given; names are relative to `root`, or to what all of them share."""
    full = [str(root / p) if root is not None else str(Path(p).expanduser()) for p in paths]
    absent = next((row for row, p in enumerate(full) if not os.path.isfile(p)), None)
    if absent is not None:
        where = f" ({entries[absent].where})" if entries else ""
        raise DataError(f"'{full[absent]}' is in the list but is no file{where}")
    if root is not None:
        names = [os.path.relpath(p, root) for p in full]
    else:
        folders = [os.path.dirname(os.path.abspath(p)) for p in full]
        shared = os.path.commonpath(folders) if folders else ""
        names = [os.path.relpath(os.path.abspath(p), shared) for p in full]
    return Found(full, [n.replace(os.sep, "/") for n in names], texts)


def _need_label(label: str | None, path: str, source: Path) -> str:
    if label is None or not label.strip():
        raise DataError(f"'{source}' gives no label for '{path}'; expected columns path and label")
    return label


def _label_names(found: Found, names: Sequence[str] | None, source: Any) -> list[str]:
    """Every label as a name; numbers are places in the names that the source or the user gives."""
    assert found.labels is not None
    if names is None and any(isinstance(label, int) for label in found.labels):
        raise DataError(
            f"the labels of {_describe(source)} are numbers; give the class names that they stand for"
        )
    index = set() if names is None else {plain_name(name) for name in names}
    texts = []
    for row, label in enumerate(found.labels):
        number = label if isinstance(label, int) else int(label) if label.isdecimal() else None
        if names is None or (isinstance(label, str) and plain_name(label) in index):
            texts.append(str(label))
        elif number is None:
            texts.append(str(label))  # told later, with all that are unknown
        elif 0 <= number < len(names):
            texts.append(names[number])
        else:
            raise DataError(
                f"the label of '{found.names[row]}' in {_describe(source)} is {label}, but there "
                f"are {len(names)} class names, from 0"
            )
    return texts


def _label_rows(texts: Sequence[str], names: Sequence[str], source: Any) -> NDArray[np.int64]:
    index = {plain_name(name): row for row, name in enumerate(names)}
    unknown = sorted({text for text in texts if plain_name(text) not in index})
    if unknown:
        shown = ", ".join(f"'{u}'" for u in unknown[:3])
        raise DataError(
            f"{_describe(source)} has labels that are not among the {len(names)} class names: {shown}"
            + (f" and {len(unknown) - 3} more" if len(unknown) > 3 else "")
        )
    return np.array([index[plain_name(text)] for text in texts], dtype=np.int64)


def _relabel(images: ImageList, class_names: Sequence[str] | None) -> ImageList:
    if images.labels is None or images.class_names is None:
        raise DataError("these pictures have no labels")
    if class_names is None or tuple(class_names) == images.class_names:
        return images
    texts = [images.class_names[label] for label in images.labels]
    labels = _label_rows(texts, class_names, "the list")
    return ImageList(images.paths, images.names, labels, tuple(class_names), images.origin)


def _only_path(item: Any) -> str:
    if isinstance(item, str | os.PathLike):
        return os.fspath(item)
    raise DataError(f"a list of pictures must hold paths, not {type(item).__name__}")


def _describe(source: Any) -> str:
    if isinstance(source, str | os.PathLike):
        return f"'{source}'"
    return "the list given" if isinstance(source, list | tuple) else "the dataset given"


def _extensions() -> str:
    return ", ".join(sorted(EXTENSIONS))
