"""What is there of the paper's datasets, and what is missing: `promptkd data list` and `check`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from promptkd.benchmarks.layouts import LAYOUTS
from promptkd.benchmarks.lists import absent_pictures, checked_names, read_parts
from promptkd.benchmarks.paper import PAPER, find
from promptkd.errors import DataError


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetReport:
    """One dataset in a data folder.

    Attributes:
        key: short name, e.g. "dtd".
        title: name in the paper's tables.
        folder: where it is expected.
        present: whether that folder is there.
        problem: why it can't be used, in one sentence; None if it can.
        pictures: listed pictures by split ("train", "val", "test"); empty if no list was read.
        missing: those of them that are not there, by split.
        num_classes: classes found, 0 if no list was read.
        paper_classes: classes of the paper's dataset.
        expected: the expected layout, one path a line.
    """

    key: str
    title: str
    folder: Path
    present: bool
    problem: str | None
    pictures: dict[str, int]
    missing: dict[str, int]
    num_classes: int
    paper_classes: int
    expected: str

    @property
    def usable(self) -> bool:
        """Whether `load` would read it."""
        return self.problem is None

    @property
    def note(self) -> str | None:
        """A sentence on a dataset that can be used but is not the paper's."""
        if not self.usable or self.num_classes == self.paper_classes:
            return None
        return f"{self.num_classes} classes, the paper's has {self.paper_classes}"


@dataclass(frozen=True, slots=True)
class CatalogueEntry:
    """One dataset that `load` reads."""

    key: str
    title: str
    num_classes: int
    folder: str
    template: str
    expected: str
    downloadable: bool
    """Whether the hub's repository has it: all but ImageNet."""
    test_only: bool


def catalogue() -> list[CatalogueEntry]:
    """The 15 datasets: the paper's 11, then the four ImageNet variants."""
    return [
        CatalogueEntry(
            key,
            paper.title,
            paper.num_classes,
            LAYOUTS[key].folder,
            LAYOUTS[key].template,
            LAYOUTS[key].describe(),
            downloadable=key != "imagenet",
            test_only=LAYOUTS[key].test_only,
        )
        for key, paper in PAPER.items()
    ]


def check(
    path: str | Path, datasets: Sequence[str] | None = None, *, split_seed: int | None = None
) -> list[DatasetReport]:
    """Look at every dataset of a data folder, or of one dataset's own folder.

    Reads every list and looks for every listed picture; opens no picture, writes nothing.

    Args:
        path: the data folder, or a folder such as `…/dtd` itself.
        datasets: look at these only; all 15 by default.
        split_seed: as in `load`, for datasets without a split file.

    Raises:
        DataError: `path` is no folder, or a dataset is unknown.
    """
    root = Path(path).expanduser().absolute()
    if not root.is_dir():
        raise DataError(f"'{root}' is no folder")
    keys = [find(name).key for name in datasets] if datasets is not None else list(PAPER)
    own = [key for key in keys if LAYOUTS[key].folder == root.name]
    if own and not any((root / LAYOUTS[key].folder).is_dir() for key in keys):
        root, keys = root.parent, own
    return [_report(key, root, split_seed) for key in keys]


def _report(key: str, root: Path, split_seed: int | None) -> DatasetReport:
    paper, layout = PAPER[key], LAYOUTS[key]
    folder = root / layout.folder
    pictures: dict[str, int] = {}
    missing: dict[str, int] = {}
    num_classes, problem = 0, None
    try:
        parts, _ = read_parts(layout, root, split_seed)
        lists = {part: rows for part, rows in parts._asdict().items() if rows}
        pictures = {part: len(rows) for part, rows in lists.items()}
        absent = {str(p) for p in absent_pictures(layout, root, parts)}
        missing = {
            part: sum(str(folder / row.path) in absent for row in rows)
            for part, rows in lists.items()
        }
        num_classes = len({row.label for rows in parts for row in rows})
        checked_names(layout, root, parts)
        if absent:
            problem = f"{len(absent)} listed pictures are not there, the first is '{min(absent)}'"
    except DataError as error:
        problem = str(error)
    return DatasetReport(
        key=key,
        title=paper.title,
        folder=folder,
        present=folder.is_dir(),
        problem=problem,
        pictures=pictures,
        missing=missing,
        num_classes=num_classes,
        paper_classes=paper.num_classes,
        expected=layout.describe(),
    )
