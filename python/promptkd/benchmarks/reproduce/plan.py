"""What `promptkd reproduce` is to do: one cell for every dataset and seed, with all its settings."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

from promptkd.benchmarks.dataset import BenchmarkDataset, load
from promptkd.benchmarks.paper import PAPER, PROTOCOLS, PaperDataset, find
from promptkd.data.sources import ImageList
from promptkd.errors import CheckpointError, DataError
from promptkd.stages.distill import DistillConfig
from promptkd.stages.holdout import split_holdout
from promptkd.stages.teach import TeachConfig

Selection: TypeAlias = Literal["clean", "validation", "paper"]
SOURCE = "imagenet"
"""Whose classes the cross-dataset teacher is tuned on."""
VALIDATION_SHARE = 0.1
CACHE_SEED = 0
"""Of a cache's views, whichever seed comes first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The whole run.

    Attributes:
        datasets: keys, names or aliases of the paper's datasets.
        root: the data folder, with `dtd/`, `eurosat/`, … in it.
        output: folder for cells, tables and the report.
        protocol: "base-to-novel", "cross-dataset" or "few-shot".
        seeds: one cell each.
        teacher: None: run stage 1 on `model`. Else a CLIP's name (zero-shot), a teacher folder or
            an official checkpoint of `model`; `{dataset}` and `{seed}` in it are filled in.
        model: the large CLIP.
        student: the small CLIP.
        shots: labelled pictures a class for stage 1.
        selection: "clean": the last epoch. "validation", as clean: a tenth of the training
            pictures is kept aside, and the epoch taken whose student agrees with its teacher most
            on them. "paper": the best epoch on test pictures, as in the official code.
        cache: store each teacher's answers on views of the training pictures under `output`; all
            seeds with that teacher learn from them.
        distill: fields of stage 2 that differ from the paper's.
        teach: the same for stage 1.
        device: where to train; default: the GPU if there is one.
    """

    datasets: tuple[str, ...]
    root: Path
    output: Path
    protocol: str = "base-to-novel"
    seeds: tuple[int, ...] = (1, 2, 3)
    teacher: str | None = None
    model: str = "ViT-L-14/openai"
    student: str = "ViT-B-16/openai"
    shots: int = 16
    selection: Selection = "clean"
    cache: bool = False
    distill: Mapping[str, Any] = field(default_factory=dict)
    teach: Mapping[str, Any] = field(default_factory=dict)
    device: str | None = None

    def __post_init__(self) -> None:
        if self.protocol not in PROTOCOLS:
            raise DataError(f"unknown protocol '{self.protocol}'; known are {', '.join(PROTOCOLS)}")
        if not self.datasets or not self.seeds:
            raise DataError("name at least one dataset (or --all) and one seed")
        if len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise DataError(f"seeds must differ and not be negative: {self.seeds}")
        if self.shots < 1:
            raise DataError(
                f"stage 1 needs at least one labelled picture a class, not {self.shots}"
            )
        if not self.root.expanduser().is_dir():
            raise DataError(f"the data folder '{self.root}' is no folder")
        for name in self.datasets:
            self._check_dataset(find(name))

    def _check_dataset(self, paper: PaperDataset) -> None:
        if paper.key not in trained_datasets(self.protocol):
            raise DataError(
                f"{paper.title} can't be distilled on under {self.protocol}; choose from "
                f"{', '.join(trained_datasets(self.protocol))}"
            )

    @property
    def keys(self) -> tuple[str, ...]:
        """Keys of the datasets, each once."""
        return tuple(dict.fromkeys(find(name).key for name in self.datasets))


def trained_datasets(protocol: str) -> tuple[str, ...]:
    """The paper's datasets under a protocol: 11, or the 10 targets of cross-dataset."""
    keys = tuple(PAPER)[:11]
    return tuple(k for k in keys if k != SOURCE) if protocol == "cross-dataset" else keys


@dataclass(frozen=True, slots=True)
class Cell:
    """One dataset with one seed."""

    plan: Plan
    data: BenchmarkDataset
    seed: int

    @property
    def folder(self) -> Path:
        """Where its student, checkpoints and result go."""
        return self.plan.output.expanduser() / "cells" / self.data.paper.key / f"seed{self.seed}"

    @property
    def halves(self) -> bool:
        """Whether base and novel classes are scored apart."""
        return self.plan.protocol == "base-to-novel"

    @property
    def distill_config(self) -> DistillConfig:
        """Stage 2: the paper's settings with the plan's changes."""
        return DistillConfig.paper(
            self.data.paper.key,
            protocol=self.plan.protocol,
            num_classes=len(self.data.class_names),
            **{"seed": self.seed, **self.plan.distill},
        )

    @property
    def teach_config(self) -> TeachConfig:
        """Stage 1: the paper's settings with the plan's changes."""
        small = "ViT-B" in self.plan.model
        recipe = asdict(self.data.paper.teacher(self.plan.protocol, small=small))
        changes = {"shots": self.plan.shots, "seed": self.seed, **self.plan.teach}
        return TeachConfig.paper(self.plan.protocol, **{**recipe, **changes})

    @property
    def teacher_source(self) -> str | None:
        """The plan's teacher, `{dataset}` and `{seed}` filled in."""
        given = self.plan.teacher
        if given is None:
            return None
        return given.replace("{dataset}", self.data.paper.key).replace("{seed}", str(self.seed))

    @property
    def validates(self) -> bool:
        """Whether a part of the training pictures chooses the epoch."""
        return self.plan.selection == "validation"

    def to_learn_from(self) -> ImageList:
        """The pictures of stage 2: the training part, less those that choose the epoch."""
        images = self.data.images("train")
        return images.select(self._split()[0]) if self.validates else images

    def kept_aside(self) -> ImageList:
        """Pictures that stage 2 isn't trained on, labels dropped, to see whether it worked.

        Those that choose the epoch, or the dataset's own validation part; ImageNet has none, there
        test pictures.
        """
        if self.validates:
            found = self.data.images("train").select(self._split()[1])
        else:
            found = self.data.images("val" if self.data.val else "test")
        return ImageList(found.paths, found.names)

    def _split(self) -> tuple[list[int], list[int]]:
        return split_holdout(len(self.data.train), VALIDATION_SHARE, self.seed)

    def settings(self) -> dict[str, Any]:
        """All that the result depends on, as plain data."""
        plan, source = self.plan, self.teacher_source
        given = None if source is None else {"name": source, "files": _stamp(source)}
        distill = asdict(self.distill_config)
        distill.pop("checkpoint_minutes")
        teach = asdict(self.teach_config) if source is None else None
        settings = {
            "dataset": self.data.paper.key,
            "protocol": plan.protocol,
            "seed": self.seed,
            "selection": plan.selection,
            "cache": plan.cache,
            "model": {"name": plan.model, "files": _stamp(plan.model)},
            "student": {"name": plan.student, "files": _stamp(plan.student)},
            "teacher": given,
            "lists": {p: self.data.images(p).digest() for p in ("train", "val", "test")},
            "distill": distill,
            "teach": teach,
        }
        plain: dict[str, Any] = json.loads(json.dumps(settings))
        return plain


def make_cells(plan: Plan) -> list[Cell]:
    """Every cell of a plan; the datasets are read, and wrong settings found, before any work.

    Raises:
        DataError: a dataset that can't be read, or settings that make no sense.
    """
    cells = [Cell(plan, load(key, plan.root), seed) for key in plan.keys for seed in plan.seeds]
    for cell in cells:
        try:
            cell.settings()
        except (TypeError, ValueError) as error:
            raise DataError(f"{cell.data.paper.title}: {error}") from error
    return cells


def fingerprint(settings: Mapping[str, Any]) -> str:
    """32 hex digits over settings."""
    text = json.dumps(settings, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def finished(cell: Cell) -> dict[str, Any] | None:
    """The stored result of a cell, None where it is still to be run.

    Raises:
        CheckpointError: a result of other settings, or no readable one.
    """
    path = cell.folder / "result.json"
    if not path.is_file():
        return None
    try:
        result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        found, stored = result["settings"], result["fingerprint"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"'{path}' is damaged ({error}); delete it") from error
    wanted = cell.settings()
    if stored != fingerprint(wanted):
        name, old, new = _first_difference(found, wanted)
        raise CheckpointError(
            f"'{path}' has other settings: its {name} is {old}, now {new}; give another --output, "
            f"or delete '{cell.folder}'"
        )
    return result


def _first_difference(old: Any, new: Any, name: str = "") -> tuple[str, str, str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*new, *old]:
            if old.get(key) != new.get(key):
                return _first_difference(old.get(key), new.get(key), f"{name} {key}".strip())
    return name or "fingerprint", json.dumps(old)[:80], json.dumps(new)[:80]


def _stamp(name: str) -> list[list[Any]]:
    """Name, size and time of the files behind a model or teacher on this disk; else nothing."""
    place = Path(name.removeprefix("local-dir:")).expanduser()
    if not place.exists():
        return []
    files = sorted(p for p in place.iterdir() if p.is_file()) if place.is_dir() else [place]
    return [[p.name, p.stat().st_size, p.stat().st_mtime_ns] for p in files]
