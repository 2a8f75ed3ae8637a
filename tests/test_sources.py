"""Where pictures come from: folders, lists, splits, few-shot samples, and bad input."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from promptkd.class_names import check_class_names, read_class_names
from promptkd.data.sources import ImageList, few_shot, labelled, read_split, unlabelled
from promptkd.errors import DataError
from tiny import CLASSES


def put(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(folder / name)


def test_folders_are_searched_in_a_fixed_order(tmp_path: Path) -> None:
    put(tmp_path, "b/2.png", "b/1.JPG", "a/deep/er/x.webp", "top.png", ".hidden/x.png", "b/.x.png")
    (tmp_path / "b" / "notes.txt").write_text("no picture")
    found = unlabelled(tmp_path)
    assert found.names == ("a/deep/er/x.webp", "b/1.JPG", "b/2.png", "top.png")
    assert found.labels is None


def test_the_key_of_a_picture_is_its_path_below_the_root(tmp_path: Path) -> None:
    put(tmp_path / "one", "b/2.png", "a/1.png")
    put(tmp_path / "two", "b/2.png", "a/1.png", "a/0.png")
    assert set(unlabelled(tmp_path / "one").names) < set(unlabelled(tmp_path / "two").names)
    listed = unlabelled([tmp_path / "one" / "b" / "2.png", tmp_path / "one" / "a" / "1.png"])
    assert listed.names == ("b/2.png", "a/1.png")


def test_labels_from_folders(photos: Path) -> None:
    found = labelled(photos)
    assert found.class_names == ("blue thing", "green thing", "red thing")
    chosen = labelled(photos, CLASSES)
    assert chosen.class_names == CLASSES
    assert chosen.labels is not None
    assert all(
        CLASSES[y] == n.split("/")[0] for y, n in zip(chosen.labels, chosen.names, strict=True)
    )
    assert found.digest() != chosen.digest()
    again = labelled(found, CLASSES)
    assert again.labels is not None
    assert (again.labels == chosen.labels).all()


@pytest.mark.parametrize("form", ["csv", "tsv", "jsonl", "pairs"])
def test_labels_from_lists(form: str, tmp_path: Path) -> None:
    put(tmp_path, "x/1.png", "2.png")
    rows = [("x/1.png", "cat"), ("2.png", "dog")]
    path = tmp_path / f"list.{form}"
    if form in ("csv", "tsv"):
        separator = "," if form == "csv" else "\t"
        path.write_text("\n".join(separator.join(r) for r in [("path", "label"), *rows]) + "\n")
    else:
        path.write_text("".join(json.dumps({"path": p, "label": y}) + "\n" for p, y in rows))
    source = [(tmp_path / p, y) for p, y in rows] if form == "pairs" else path
    found = labelled(source)
    assert found.labels is not None
    assert found.class_names == ("cat", "dog")
    assert found.labels.tolist() == [0, 1]
    assert found.names == ("x/1.png", "2.png")
    if form != "pairs":
        assert unlabelled(path).names == found.names


def test_plain_text_list(tmp_path: Path) -> None:
    put(tmp_path, "1.png", "2.png")
    (tmp_path / "list.txt").write_text("2.png\n\n1.png\n")
    assert unlabelled(tmp_path / "list.txt").names == ("2.png", "1.png")


def test_few_shot_is_the_papers_own() -> None:
    labels = np.array([2, 0, 2, 1, 0, 2, 2, 0, 1, 2], dtype=np.int64)
    names = tuple(f"{i}" for i in range(10))
    images = ImageList(names, names, labels, ("a", "b", "c"))
    picked = few_shot(images, 3, seed=5)
    random.seed(5)
    expected = random.sample([0, 2, 5, 6, 9], 3) + random.sample([1, 4, 7], 3) + [3, 8]
    assert picked.names == tuple(str(i) for i in expected)
    assert few_shot(images, 0, seed=5) is images


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "list.csv",
            "file,label\na.png,x\n",
            r"list\.csv' has no column 'path' .* but file, label",
        ),
        ("list.jsonl", '{"path": "a.png"', r"line 1 of '.*list\.jsonl' is no JSON"),
        (
            "list.jsonl",
            '{"path": "a.png", "label": "x"}\n\n["a"]',
            "line 3 of .* is no JSON object",
        ),
        ("list.jsonl", '{"label": "x"}', "line 1 of .* has no path"),
        ("list.csv", "path,label\ngone.png,x\n", r"is in the list but is no file \(line 2 of"),
        ("list.csv", "label,path\nx,a.png\nx\n", "line 3 of .* has no path"),
        ("list.csv", "path\na.png\n", "gives no label for 'a.png'"),
        ("list.txt", "a.png\n", "gives no label"),
        ("list.csv", "path,label\n", "no labelled pictures"),
    ],
)
def test_bad_lists(tmp_path: Path, name: str, text: str, message: str) -> None:
    put(tmp_path, "a.png")
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=message):
        labelled(tmp_path / name)


def test_bad_folders(tmp_path: Path) -> None:
    put(tmp_path / "flat", "a.png")
    with pytest.raises(DataError, match="lies in no class folder"):
        labelled(tmp_path / "flat")
    with pytest.raises(DataError, match="neither a folder"):
        labelled(tmp_path / "gone")
    put(tmp_path / "images", "cat/1.png")
    (tmp_path / "split.json").write_text(json.dumps({"train": ["cat/1.png", "cat/2.png"]}))
    with pytest.raises(DataError, match=r"'cat/2\.png' stands in the split"):
        unlabelled(tmp_path / "images")
    with pytest.raises(DataError, match="lists no pictures under 'test'"):
        labelled(tmp_path / "images", part="test")
    for text in ("{", "[]", '{"train": [1]}'):
        (tmp_path / "split.json").write_text(text)
        with pytest.raises(DataError, match=r"split\.json"):
            read_split(tmp_path / "split.json")


def test_class_names(tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("red bus\n\n  tree \n")
    assert read_class_names(tmp_path / "names.txt") == ("red bus", "tree")
    with pytest.raises(DataError, match="class names can't be read"):
        read_class_names(tmp_path / "gone.txt")
    with pytest.raises(DataError, match="'red_bus' stands twice"):
        check_class_names(["red bus", "red_bus"])
    with pytest.raises(DataError, match="at least one name"):
        check_class_names([])
