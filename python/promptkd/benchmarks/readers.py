"""What each dataset has on disk, turned into rows of (picture, label, class name).

Two kinds of reader: `generate_*` makes the train/val/test split that the official code makes
when a dataset comes without its split file (drawing from `rng` in the same order), `native_*`
reads the datasets that need none.  Folders are always listed sorted, so no result depends on
the file system; nothing is ever written.
"""

from __future__ import annotations

import importlib
import json
import os
import random
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, TypeVar

from promptkd.errors import DataError

V = TypeVar("V")


class Row(NamedTuple):
    """A picture by its path relative to the dataset's folder ("/" separated), its class twice."""

    path: str
    label: int
    name: str


class Parts(NamedTuple):
    """The three lists of a dataset; what a dataset doesn't have is empty."""

    train: list[Row]
    val: list[Row]
    test: list[Row]


# ---------------------------------------------------------------- files and folders
def read_lines(path: Path) -> list[str]:
    """The stripped lines of a text file; blank lines are allowed at its end only."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").split("\n")]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"can't read '{path}': {_reason(error)}") from error
    while lines and not lines[-1]:
        lines.pop()
    if not lines:
        raise DataError(f"'{path}' is empty")
    if "" in lines:
        raise DataError(f"'{path}' has an empty line {lines.index('') + 1}")
    return lines


def read_json(path: Path) -> Any:
    """The content of a JSON file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"can't read '{path}': {_reason(error)}") from error


def read_mat(path: Path, key: str) -> Any:
    """One row of a MATLAB file's array; scipy is imported here only."""
    if not path.is_file():
        raise DataError(f"can't read '{path}': no such file")
    try:
        scipy_io: Any = importlib.import_module("scipy.io")
    except ImportError as error:
        raise DataError(
            f"'{path}' is a MATLAB file, and reading it needs scipy: "
            "pip install 'promptkd[datasets]', or put the split file beside it"
        ) from error
    try:
        return scipy_io.loadmat(path)[key][0]
    except Exception as error:  # scipy raises many kinds for a broken file
        raise DataError(f"'{path}' is no MATLAB file with '{key}': {_reason(error)}") from error


def class_folders(folder: Path, ignored: Sequence[str] = ()) -> list[str]:
    """Names of the class folders in byte order of their names; hidden ones and files skipped."""
    try:
        names = sorted(e.name for e in os.scandir(folder) if e.is_dir())
    except OSError as error:
        raise DataError(f"can't list '{folder}': {_reason(error)}") from error
    names = [n for n in names if not n.startswith(".") and n not in ignored]
    if not names:
        raise DataError(f"'{folder}' has no class folders")
    return names


def pictures(folder: Path) -> list[str]:
    """File names of a class folder, sorted; hidden ones skipped, others kept as they are."""
    try:
        entries = sorted((e.name, e.is_dir()) for e in os.scandir(folder))
    except OSError as error:
        raise DataError(f"can't list '{folder}': {_reason(error)}") from error
    entries = [e for e in entries if not e[0].startswith(".")]
    nested = [name for name, is_folder in entries if is_folder]
    if nested:
        raise DataError(f"'{folder / nested[0]}' is a folder where pictures are expected")
    if not entries:
        raise DataError(f"class folder '{folder}' is empty")
    return [name for name, _ in entries]


def _reason(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return f"{type(error).__name__}: {error}"


def _parse(path: Path, parse: Callable[[str], Row]) -> list[Row]:
    """Rows of a text file, one a line; the message of a bad line names file and line."""
    rows = []
    for number, line in enumerate(read_lines(path), 1):
        try:
            rows.append(parse(line))
        except (KeyError, ValueError, IndexError) as error:
            raise DataError(f"'{path}' line {number} is not understood: '{line}'") from error
    return rows


def _table(path: Path, parse: Callable[[str, str], tuple[str, V]]) -> dict[str, V]:
    """A mapping of a text file whose lines are two words, the second to the end of the line."""
    table: dict[str, V] = {}
    for number, line in enumerate(read_lines(path), 1):
        try:
            key, value = parse(*line.split(" ", 1))
        except (ValueError, TypeError) as error:
            raise DataError(f"'{path}' line {number} is not understood: '{line}'") from error
        table[key] = value
    return table


# ---------------------------------------------------------------- CoOp's split file
def read_split(path: Path, images: str) -> Parts:
    """CoOp's `split_zhou_*.json`: lists of [path, label, class name], taken as they stand."""
    data = read_json(path)
    parts = []
    for key in Parts._fields:
        if not isinstance(data, dict) or not isinstance(data.get(key), list):
            raise DataError(f"'{path}' has no list '{key}'")
        rows = []
        for number, entry in enumerate(data[key]):
            try:
                relative, label, name = entry
                rows.append(Row(_join(images, _inside(relative)), int(label), _text(name)))
            except (TypeError, ValueError) as error:
                raise DataError(
                    f"'{path}' {key}[{number}] is no [path, label, class name]: {entry!r}"
                ) from error
        parts.append(rows)
    return Parts(*parts)


def write_split(parts: Parts, images: str) -> str:
    """The text of a split file, byte for byte as the official code writes it."""
    prefix = f"{images}/" if images else ""
    data = {
        key: [[row.path.removeprefix(prefix), row.label, row.name] for row in rows]
        for key, rows in zip(Parts._fields, parts, strict=True)
    }
    return json.dumps(data, indent=4, separators=(",", ": "))


def _join(*parts: str) -> str:
    return "/".join(p for p in parts if p)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


def _inside(path: Any) -> str:
    pure = PurePosixPath(_text(path))
    if pure.is_absolute() or ".." in pure.parts or not pure.parts:
        raise ValueError(f"'{path}' does not stay in its folder")
    return str(path)


# ---------------------------------------------------------------- drawing a split
def _three_way(
    pictures_of: Iterable[tuple[int, str, list[str]]], rng: random.Random, source: Path
) -> Parts:
    """Half of each class to train, a fifth to val, the rest to test; Python's own rounding."""
    parts = Parts([], [], [])
    for label, name, paths in pictures_of:
        rng.shuffle(paths)
        num_train, num_val = round(len(paths) * 0.5), round(len(paths) * 0.2)
        cuts = (paths[:num_train], paths[num_train : num_train + num_val])
        for part, cut in zip(parts, (*cuts, paths[num_train + num_val :]), strict=True):
            if not cut:
                raise DataError(
                    f"class '{name}' of '{source}' has {len(paths)} pictures, "
                    "too few for a train, a val and a test part"
                )
            part.extend(Row(path, label, name) for path in cut)
    return parts


def _hold_out(trainval: list[Row], test: list[Row], rng: random.Random) -> Parts:
    """A fifth of each class's pictures to val, classes in order of first appearance."""
    groups: dict[int, list[Row]] = {}
    for row in trainval:
        groups.setdefault(row.label, []).append(row)
    parts = Parts([], [], test)
    for rows in groups.values():
        rng.shuffle(rows)
        num_val = round(len(rows) * 0.2)
        parts.val.extend(rows[:num_val])
        parts.train.extend(rows[num_val:])
    return parts


def generate_from_folders(
    images: str, ignored: Sequence[str] = (), renamed: dict[str, str] | None = None
) -> Callable[[Path, random.Random], Parts]:
    """A split of a dataset that is one folder a class: Caltech101, DTD, EuroSAT, Food101."""

    def generate(folder: Path, rng: random.Random) -> Parts:
        base = folder / images
        classes = (
            (label, (renamed or {}).get(c, c), [f"{images}/{c}/{p}" for p in pictures(base / c)])
            for label, c in enumerate(class_folders(base, ignored))
        )
        return _three_way(classes, rng, base)

    return generate


def generate_pets(folder: Path, rng: random.Random) -> Parts:
    """OxfordPets: `Egyptian_Mau_12 5 1 2` is class 4, `egyptian_mau`."""

    def parse(line: str) -> Row:
        stem, label, _, _ = line.split(" ")
        return Row(f"images/{stem}.jpg", int(label) - 1, stem.rsplit("_", 1)[0].lower())

    lists = (folder / "annotations" / f for f in ("trainval.txt", "test.txt"))
    trainval, test = (_parse(path, parse) for path in lists)
    return _hold_out(trainval, test, rng)


def generate_ucf(folder: Path, rng: random.Random) -> Parts:
    """UCF101: `HorseRiding/v_HorseRiding_g01_c01.avi` is the picture of class `Horse_Riding`."""
    lists = folder / "ucfTrainTestlist"
    numbers = _table(lists / "classInd.txt", lambda number, action: (action, int(number) - 1))

    def parse(line: str) -> Row:
        action, video = line.split(" ")[0].split("/")
        name = "_".join(re.findall("[A-Z][^A-Z]*", action))
        picture = video.replace(".avi", ".jpg")
        return Row(f"UCF-101-midframes/{name}/{picture}", numbers[action], name)

    trainval, test = (_parse(lists / f, parse) for f in ("trainlist01.txt", "testlist01.txt"))
    return _hold_out(trainval, test, rng)


def generate_sun(folder: Path, rng: random.Random) -> Parts:
    """SUN397: `/a/apartment_building/outdoor/x.jpg` is of class `outdoor apartment_building`."""
    labels = {line: i for i, line in enumerate(read_lines(folder / "ClassName.txt"))}

    def parse(line: str) -> Row:
        place = str(PurePosixPath(line).parent)
        name = " ".join(reversed(place.split("/")[2:]))
        return Row(f"SUN397{line}", labels[place], name)

    trainval, test = (_parse(folder / f, parse) for f in ("Training_01.txt", "Testing_01.txt"))
    return _hold_out(trainval, test, rng)


def generate_cars(folder: Path, rng: random.Random) -> Parts:
    """StanfordCars: `BMW X6 SUV 2012` is called `2012 BMW X6 SUV`."""
    names = [str(cell[0]) for cell in read_mat(folder / "devkit/cars_meta.mat", "class_names")]

    def read(images: str, file: str) -> list[Row]:
        rows = []
        for number, entry in enumerate(read_mat(folder / file, "annotations")):
            try:
                label = int(entry["class"][0, 0]) - 1
                words = names[label].split(" ")
                picture = str(entry["fname"][0])
            except (ValueError, IndexError, TypeError) as error:
                raise DataError(f"'{folder / file}' entry {number} is not understood") from error
            rows.append(Row(f"{images}/{picture}", label, " ".join(words[-1:] + words[:-1])))
        return rows

    trainval = read("cars_train", "devkit/cars_train_annos.mat")
    return _hold_out(trainval, read("cars_test", "cars_test_annos_withlabels.mat"), rng)


def generate_flowers(folder: Path, rng: random.Random) -> Parts:
    """OxfordFlowers: picture i has the i-th label; classes in order of first appearance."""
    groups: dict[int, list[str]] = {}
    for i, label in enumerate(read_mat(folder / "imagelabels.mat", "labels"), 1):
        groups.setdefault(int(label), []).append(f"jpg/image_{i:05d}.jpg")
    path = folder / "cat_to_name.json"
    names = read_json(path)
    try:
        classes = [(y - 1, str(names[str(y)]), paths) for y, paths in groups.items()]
    except (KeyError, TypeError) as error:
        raise DataError(f"'{path}' has no name for a label of imagelabels.mat: {error}") from error
    return _three_way(classes, rng, folder)


# ---------------------------------------------------------------- datasets without a split file
def native_aircraft(folder: Path) -> Parts:
    """FGVCAircraft: the label is the line number in variants.txt, which is not sorted."""
    labels = {line: i for i, line in enumerate(read_lines(folder / "variants.txt"))}

    def parse(line: str) -> Row:
        stem, name = line.split(" ", 1)
        return Row(f"images/{stem}.jpg", labels[name], name)

    return Parts(*(_parse(folder / f"images_variant_{part}.txt", parse) for part in Parts._fields))


def read_class_names(path: Path) -> dict[str, str]:
    """`classnames.txt`: WordNet id, blank, name; two ids may share a name ("missile")."""
    return _table(path, lambda wordnet_id, name: (wordnet_id, name))


def _scan(folder: Path, images: str, classes: Iterable[tuple[str, str]]) -> list[Row]:
    return [
        Row(f"{images}/{c}/{picture}", label, name)
        for label, (c, name) in enumerate(classes)
        for picture in pictures(folder / images / c)
    ]


def _named(folder: Path, classes: list[str]) -> list[tuple[str, str]]:
    path = folder / "classnames.txt"
    names = read_class_names(path)
    missing = [c for c in classes if c not in names]
    if missing:
        raise DataError(f"'{path}' has no name for class folder '{missing[0]}'")
    return [(c, names[c]) for c in classes]


def native_imagenet(folder: Path) -> Parts:
    """ImageNet: folders `train` and `val`, which is the test set; the same classes in both."""
    train, test = (class_folders(folder / "images" / part) for part in ("train", "val"))
    odd = sorted(set(train) ^ set(test))
    if odd:
        place, other = ("train", "val") if odd[0] in train else ("val", "train")
        raise DataError(
            f"class folder '{odd[0]}' is in '{folder / 'images' / place}' only, not in "
            f"'{other}': later labels would shift"
        )
    classes = _named(folder, train)
    return Parts(_scan(folder, "images/train", classes), [], _scan(folder, "images/val", classes))


def native_imagenet_test(images: str) -> Callable[[Path], Parts]:
    """ImageNet-Sketch, -A, -R: one folder a class, for testing only."""

    def read(folder: Path) -> Parts:
        classes = _named(folder, class_folders(folder / images))
        return Parts([], [], _scan(folder, images, classes))

    return read


def native_imagenetv2(folder: Path) -> Parts:
    """ImageNetV2: folders 0 to 999, named by that line of classnames.txt."""
    images = "imagenetv2-matched-frequency-format-val"
    names = list(read_class_names(folder / "classnames.txt").values())
    if len(names) < 1000:
        raise DataError(
            f"'{folder / 'classnames.txt'}' names {len(names)} classes; ImageNetV2 has 1000"
        )
    classes = [(str(i), names[i]) for i in range(1000)]
    return Parts([], [], _scan(folder, images, classes))
