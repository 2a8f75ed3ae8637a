"""Reading golden sets: plain `*.json` as recorded, or `*.json.gz` as committed here.

Both sets hold what the official dataset classes (PromptKD at ec244f7, its own copy of Dassl,
folder listings sorted) made of the trees of `make_tree.py`: `public` six datasets through the
official `train.main()`, `others` the other nine, each class constructed after `random.seed`.
"""

import gzip
import json
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent / "goldens"
COMMITTED = (HERE / "public", HERE / "others")


class Item(NamedTuple):
    """A picture as a golden lists it: path relative to the data folder, label, class name."""

    path: str
    label: int
    name: str


def read(folder: Path, name: str) -> Any:
    """One golden file by the name it has in the manifest."""
    plain, packed = folder / name, folder / f"{name}.gz"
    text = plain.read_bytes() if plain.is_file() else gzip.decompress(packed.read_bytes())
    return json.loads(text)


def datasets(folder: Path) -> list[str]:
    return sorted(read(folder, "manifest.json")["datasets"])


def items(case: Any, list_id: str | None) -> list[Item] | None:
    """A pooled list, written out; None stays None."""
    if list_id is None:
        return None
    rows, labels = case["lists"][list_id]
    return [
        Item(case["images"][row][0], label, case["images"][row][1])
        for row, label in zip(rows, labels, strict=True)
    ]
