"""Dataset objects as sources: Hugging Face `datasets`, torchvision's, and others that have rows."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from promptkd.data.pictures import Found, Row, Rows, row_name
from promptkd.errors import DataError

_PARTS = {"train": ("train", "training"), "val": ("val", "validation", "valid"), "test": ("test",)}
_TARGETS = ("targets", "_labels", "labels", "_targets")


def is_dataset(source: Any) -> bool:
    """Whether it is an object with numbered rows, or a stream of them."""
    if isinstance(source, str | os.PathLike | Sequence | Mapping | np.ndarray | Tensor | Iterator):
        return False
    return hasattr(source, "__getitem__") or hasattr(source, "__iter__")


def pick_part(splits: Mapping[Any, Any], part: str) -> Any:
    """The dataset of a part in a mapping of several, as `datasets.load_dataset` gives it.

    Raises:
        DataError: none of its names is that of the part.
    """
    found = next((name for name in _PARTS[part] if name in splits), None)
    if found is None:
        raise DataError(
            f"the dataset has the parts {', '.join(map(str, splits))}, none of them "
            f"{' or '.join(_PARTS[part])}; give one, as in dataset['{next(iter(splits), part)}']"
        )
    return splits[found]


def dataset_pictures(source: Any, *, labels: bool) -> Found:
    """The pictures of a dataset object, fetched later one by one.

    Args:
        source: a Hugging Face dataset with a column of pictures; a torchvision dataset; a
            `torch.utils.data.Subset` of one; anything whose rows are pictures (paths, bytes,
            Pillow images, uint8 arrays) or tuples that begin with a picture and a label.
        labels: whether they are wanted.

    Raises:
        DataError: a stream, which has no numbered rows; no pictures or no labels in it.
    """
    if not hasattr(source, "__len__") or not hasattr(source, "__getitem__"):
        raise DataError(
            f"a {type(source).__name__} is a stream without numbered rows; give a dataset with "
            "rows, tar shards, or a folder"
        )
    if hasattr(source, "features") and hasattr(source, "column_names"):
        return _hugging_face(source, labels)
    if hasattr(source, "dataset") and hasattr(source, "indices"):
        return _subset(source, labels)
    files = _files(source)
    if files is not None:
        return files
    return _by_rows(source, labels)


# ---------------------------------------------------------------- Hugging Face
def _hugging_face(source: Any, labels: bool) -> Found:
    plain = source.with_format(None)
    column = _column_of_pictures(plain)
    feature = plain.features[column]
    # Undecoded, so that the files' own bytes come through, for our decoder.
    stored = plain.select_columns([column]).cast_column(column, type(feature)(decode=False))

    def read(index: int) -> Any:
        entry = stored[index][column]
        if entry is None:
            raise DataError("it is empty")
        return entry["path"] if entry.get("bytes") is None else entry["bytes"]

    count = len(stored)
    values, class_names = _labels_of(plain) if labels else (None, None)
    pictures, names = _rows(read, count)
    origin = str(getattr(source, "_fingerprint", ""))
    return Found(pictures, names, values, class_names, origin)


def _column_of_pictures(source: Any) -> str:
    found = [name for name, f in source.features.items() if type(f).__name__ == "Image"]
    if "image" in found:
        return "image"
    if len(found) != 1:
        raise DataError(
            f"the dataset has {len(found)} columns of pictures (of feature Image) among "
            f"{', '.join(source.column_names)}; give one that has one, or call it 'image'"
        )
    return str(found[0])


def _labels_of(source: Any) -> tuple[list[Any], tuple[str, ...] | None]:
    kinds = {name: type(f).__name__ for name, f in source.features.items()}
    found = [name for name, kind in kinds.items() if kind == "ClassLabel"]
    column = "label" if "label" in kinds else found[0] if len(found) == 1 else None
    if column is None:
        raise DataError(
            f"the dataset has no column 'label' and {len(found)} of feature ClassLabel among "
            f"{', '.join(source.column_names)}; rename the one with the labels to 'label'"
        )
    known = source.features[column].names if kinds[column] == "ClassLabel" else None
    return list(source[column]), None if known is None else tuple(known)


# ---------------------------------------------------------------- torchvision and its like
def _subset(source: Any, labels: bool) -> Found:
    whole = dataset_pictures(source.dataset, labels=labels)
    rows = [int(row) for row in source.indices]
    return Found(
        [whole.pictures[row] for row in rows],
        [whole.names[row] for row in rows],
        None if whole.labels is None else [whole.labels[row] for row in rows],
        whole.class_names,
        whole.origin,
    )


def _files(source: Any) -> Found | None:
    """A dataset that lists files, as ImageFolder: the files themselves, decoded here."""
    samples, root = getattr(source, "samples", None), getattr(source, "root", None)
    if not isinstance(samples, list) or root is None or len(samples) != len(source) or not samples:
        return None
    if not all(isinstance(s, tuple) and len(s) == 2 and isinstance(s[0], str) for s in samples):
        return None
    names = [os.path.relpath(path, root).replace(os.sep, "/") for path, _ in samples]
    targets = [int(target) for _, target in samples]
    return Found([path for path, _ in samples], names, targets, _class_names(source))


def _by_rows(source: Any, labels: bool) -> Found:
    def read(index: int) -> Any:
        item = source[index]
        if isinstance(item, Mapping):
            item = item.get("image", item.get("img"))
        return item[0] if isinstance(item, tuple | list) and len(item) else item

    pictures, names = _rows(read, len(source))
    if pictures:
        pictures[0].rows.fetch(0)  # what is wrong with all of them shows at once
    values = _targets(source) if labels else None
    return Found(pictures, names, values, _class_names(source) if labels else None)


def _targets(source: Any) -> list[Any]:
    """The labels, from the dataset's own list where it has one, else row by row."""
    for name in _TARGETS:
        found = getattr(source, name, None)
        if isinstance(found, np.ndarray | Tensor):
            found = found.tolist()
        if isinstance(found, list) and len(found) == len(source):
            return found
    return [_label_of(source, row) for row in range(len(source))]


def _label_of(source: Any, row: int) -> Any:
    try:
        item = source[row]
    except Exception as error:  # whatever a foreign object raises
        raise DataError(f"{row_name(row)} can't be had: {error}") from error
    if isinstance(item, Mapping):
        item = (None, item.get("label"))
    if not isinstance(item, tuple | list) or len(item) < 2 or item[1] is None:
        raise DataError(f"{row_name(row)} has no label; expected (picture, label)")
    label = item[1]
    return label.item() if isinstance(label, Tensor | np.generic) else label


def _class_names(source: Any) -> tuple[str, ...] | None:
    """Its `classes`; of ImageNet's lists of synonyms the first."""
    found = getattr(source, "classes", None)
    if not isinstance(found, list | tuple) or not found:
        return None
    names = [name[0] if isinstance(name, tuple | list) and name else name for name in found]
    return tuple(names) if all(isinstance(name, str) for name in names) else None


def _rows(read: Callable[[int], Any], count: int) -> tuple[list[Row], list[str]]:
    rows = Rows(read)
    return [Row(rows, index) for index in range(count)], [f"{index:08}" for index in range(count)]
