"""Every way a dataset on disk can be wrong ends in one error that names file and layout."""

import importlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from promptkd import benchmarks
from promptkd.benchmarks.layouts import LAYOUTS
from promptkd.errors import DataError

SEED = 5


class Broken(NamedTuple):
    what: str
    dataset: str
    split: str
    damage: Callable[[Path], Any]
    """Called with the dataset's own folder."""
    said: tuple[str, ...]
    """Parts of the message."""


def split_file(folder: Path) -> Path:
    return next(folder.glob("split_zhou_*.json"))


def edit(change: Callable[[Any], Any]) -> Callable[[Path], None]:
    """Damage to the content of the split file."""

    def damage(folder: Path) -> None:
        path = split_file(folder)
        data = json.loads(path.read_text())
        path.write_text(json.dumps(change(data) or data))

    return damage


def append(file: str, text: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        with open(folder / file, "a") as handle:
            handle.write(text)

    return damage


def first_folder(path: Path) -> Path:
    return next(p for p in sorted(path.iterdir()) if p.is_dir())


def empty(images: str) -> Callable[[Path], None]:
    """A class folder without pictures (the hidden file that stays is no picture)."""

    def damage(folder: Path) -> None:
        for picture in first_folder(folder / images).glob("[!.]*"):
            picture.unlink()

    return damage


def doubled(folder: Path) -> None:
    """An archive unpacked inside a folder of its own name."""
    inner = folder.rename(folder.with_name("moved"))
    folder.mkdir()
    inner.rename(folder / folder.name)


def drop_class(part: str) -> Callable[[Any], None]:
    def change(data: Any) -> None:
        data[part] = [row for row in data[part] if row[1] != 1]

    return edit(change)


def drop_label(data: Any) -> None:
    for part in data:
        data[part] = [row for row in data[part] if row[1] != 2]


def rename_one(data: Any) -> None:
    data["test"][0][2] = "another name"


def escape(data: Any) -> None:
    data["train"][0][0] = "../../secret.jpg"


def no_label(data: Any) -> None:
    data["val"][0][1] = None


def too_few(folder: Path) -> None:
    for picture in sorted(first_folder(folder / "images").glob("[!.]*"))[3:]:
        picture.unlink()


CASES = [
    Broken("no folder", "dtd", "present", shutil.rmtree, ("dtd' is not there",)),
    Broken("doubled", "food101", "present", doubled, ("split_zhou_Food101.json' is missing",)),
    Broken("doubled", "food101", "absent", doubled, ("can't list", "no such file")),
    Broken("absent picture", "eurosat", "present",
           lambda d: next((d / "2750/River").iterdir()).unlink()
           if (d / "2750/River").exists() else next(first_folder(d / "2750").iterdir()).unlink(),
           ("2750/", "listed, but not there")),
    Broken("absent pictures", "fgvc_aircraft", "present", lambda d: shutil.rmtree(d / "images"),
           (".jpg' and ", "more: listed, but not there")),
    Broken("no text file", "fgvc_aircraft", "present",
           lambda d: (d / "images_variant_val.txt").unlink(),
           ("images_variant_val.txt'", "no such file")),
    Broken("unknown variant", "fgvc_aircraft", "present",
           append("images_variant_test.txt", "0000001 Zeppelin\n"),
           ("images_variant_test.txt' line", "0000001 Zeppelin")),
    Broken("empty line", "fgvc_aircraft", "present", append("variants.txt", "\nConcorde\n"),
           ("variants.txt' has an empty line",)),
    Broken("not text", "sun397", "absent",
           lambda d: (d / "ClassName.txt").write_bytes(b"\xff\xfe\x00"),
           ("ClassName.txt'", "UnicodeDecodeError")),
    Broken("empty class", "dtd", "absent", empty("images"), ("class folder", "is empty")),
    Broken("empty class", "imagenet", "present", empty("images/val"), ("images/val/", "is empty")),
    Broken("empty class", "imagenet_a", "present", empty("imagenet-a"), ("is empty",)),
    Broken("empty class", "ucf101", "present", drop_class("train"),
           ("label 1", "train list", "an empty class")),
    Broken("empty class", "ucf101", "present", drop_class("test"),
           ("label 1", "test list", "an empty class")),
    Broken("label gap", "oxford_flowers", "present", edit(drop_label),
           ("label 2 of", "OxfordFlowers.json", "an empty class")),
    Broken("no lists", "caltech101", "present",
           edit(lambda data: {"train": [], "val": [], "test": []}), ("lists no pictures",)),
    Broken("too few pictures", "dtd", "absent", too_few, ("has 3 pictures", "too few")),
    Broken("two names", "stanford_cars", "present", edit(rename_one),
           ("has two names", "another name", "StanfordCars.json")),
    Broken("path outside", "sun397", "present", edit(escape), ("train[0]", "../../secret.jpg")),
    Broken("no label", "sun397", "present", edit(no_label), ("val[0]", "None")),
    Broken("not json", "oxford_pets", "present",
           lambda d: split_file(d).write_text("<html>"), ("OxfordPets.json'", "JSONDecodeError")),
    Broken("other json", "oxford_pets", "present", edit(lambda data: [1]), ("no list 'train'",)),
    Broken("bad line", "oxford_pets", "absent", append("annotations/test.txt", "pug_1 2\n"),
           ("test.txt' line", "pug_1 2")),
    Broken("bad class list", "ucf101", "absent",
           append("ucfTrainTestlist/classInd.txt", "x YoYo\n"), ("classInd.txt' line", "x YoYo")),
    Broken("no matlab file", "oxford_flowers", "absent",
           lambda d: (d / "imagelabels.mat").unlink(), ("imagelabels.mat'", "no such file")),
    Broken("bad matlab file", "stanford_cars", "absent",
           lambda d: (d / "devkit/cars_meta.mat").write_bytes(b"<html>" * 40),
           ("cars_meta.mat' is no MATLAB file",)),
    Broken("no flower names", "oxford_flowers", "absent",
           lambda d: (d / "cat_to_name.json").write_text("{}"), ("cat_to_name.json'", "no name")),
    Broken("shifted labels", "imagenet", "present",
           lambda d: shutil.rmtree(first_folder(d / "images/val")),
           ("images/train' only", "labels would shift")),
    Broken("no class names", "imagenet_r", "present", lambda d: (d / "classnames.txt").unlink(),
           ("classnames.txt'", "no such file")),
    Broken("unnamed class", "imagenet_sketch", "present",
           lambda d: (d / "images/n99999999").mkdir(), ("no name for", "n99999999")),
    Broken("short names", "imagenetv2", "present",
           lambda d: (d / "classnames.txt").write_text("n01 tench\n"), ("names 1 classes",)),
    Broken("nested folder", "imagenet_r", "present",
           lambda d: (first_folder(d / "imagenet-r") / "more").mkdir(),
           ("more' is a folder where pictures",)),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.dataset}-{c.what}".replace(" ", "-"))
def test_one_clear_error(case: Broken, tree: Any, tmp_path: Path) -> None:
    paper = benchmarks.find(case.dataset)
    root = tmp_path / "data"
    shutil.copytree(tree(SEED, paper.name, case.split), root)
    seed = 1 if case.split == "absent" else None
    benchmarks.load(case.dataset, root, split_seed=seed)  # readable before the damage
    folder = root / LAYOUTS[paper.key].folder
    case.damage(folder)
    with pytest.raises(DataError) as raised:
        benchmarks.load(case.dataset, root, split_seed=seed)
    message = str(raised.value)
    assert message.startswith(f"{paper.title}: ")
    assert all(part in message for part in case.said), message
    assert str(folder.parent) in message
    layout = message.partition("\nexpected under ")[2]
    assert all(f"{LAYOUTS[paper.key].folder}/{p}" in layout for p in LAYOUTS[paper.key].expected)


@pytest.mark.parametrize("key", [k for k, layout in LAYOUTS.items() if layout.split])
def test_a_missing_split_file_is_named(key: str, tree: Any) -> None:
    root = tree(SEED, benchmarks.PAPER[key].name, "absent")
    with pytest.raises(DataError) as raised:
        benchmarks.load(key, root)
    assert f"{LAYOUTS[key].split}' is missing" in str(raised.value)
    assert "split_seed" in str(raised.value)


def test_without_scipy_the_error_says_what_to_install(
    tree: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_scipy(name: str) -> Any:
        raise ImportError(f"No module named '{name}'")

    monkeypatch.setattr(importlib, "import_module", no_scipy)
    with pytest.raises(DataError, match=r"needs scipy: pip install 'promptkd\[datasets\]'"):
        benchmarks.load("cars", tree(SEED, "StanfordCars", "absent"), split_seed=1)
    # With the split file there is nothing for scipy to do.
    assert benchmarks.load("cars", tree(SEED, "StanfordCars", "present")).train


def test_wrong_use_is_refused(tree: Any) -> None:
    data = benchmarks.load("dtd", tree(SEED, "DescribableTextures", "present"))
    variant = benchmarks.load("imagenet-a", tree(SEED, "ImageNetA", "present"))
    wrong: list[tuple[str, Callable[[], Any]]] = [
        ("unknown dataset 'mnist'; known are imagenet, ", lambda: benchmarks.load("mnist", "/")),
        ("unknown protocol 'base2novel'", lambda: data.protocol("base2novel")),
        ("not 'new'", lambda: data.protocol("standard", classes="new")),
        ("unknown protocol 'xd'", lambda: data.paper.student("xd")),
        ("unknown protocol 'xd'", lambda: data.paper.teacher("xd")),
        ("shots must be 1 or more", lambda: data.few_shot(0, 1)),
        ("sample before taking the base half", lambda: data.base().few_shot(1, 1)),
        ("already the novel half", lambda: data.novel().base()),
        ("needs a split drawn with seed 1", lambda: data.few_shot(1, 1, first_start=True)),
        ("a test set: it has no training", lambda: variant.few_shot(1, 1)),
        ("a test set only", variant.novel),
    ]
    for message, call in wrong:
        with pytest.raises(DataError) as raised:
            call()
        assert message in str(raised.value)
