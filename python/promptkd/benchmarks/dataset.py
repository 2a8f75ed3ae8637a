"""One dataset of the paper: its lists, few-shot samples, base and novel halves, protocols."""

from __future__ import annotations

import logging
import math
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from promptkd.benchmarks import readers
from promptkd.benchmarks.layouts import LAYOUTS, Layout
from promptkd.benchmarks.lists import absent_pictures, checked_names, read_parts
from promptkd.benchmarks.paper import PaperDataset, find
from promptkd.benchmarks.readers import Parts, Row
from promptkd.class_names import PublishedNames
from promptkd.data.sources import ImageList
from promptkd.errors import DataError

_log = logging.getLogger(__name__)

CONTEXT = "a photo of a"
"""The words that PromptKD's learned text prompts start from, the same for every dataset."""


class Sample(NamedTuple):
    """A picture's absolute path and its label, an index into `class_names`."""

    path: str
    label: int


@dataclass(frozen=True, slots=True)
class ProtocolLists:
    """What the official code trains and scores on in one run.

    Attributes:
        class_names: names by label of `train`.
        train: pictures to distil on (PromptKD ignores their labels).
        val: where the official code picks its best epoch; *test* pictures in every protocol,
            None for the ImageNet variants.
        test: pictures the result is measured on.
    """

    class_names: tuple[str, ...]
    train: tuple[Sample, ...]
    val: tuple[Sample, ...] | None
    test: tuple[Sample, ...]


@dataclass(frozen=True, slots=True)
class BenchmarkDataset:
    """A dataset as read from disk; methods return changed copies.

    Attributes:
        paper: its row in the paper's table (key, sizes, settings, published numbers).
        root: the data folder; paths of the samples start with it.
        class_names: names by label. ImageNet has two classes called "missile".
        template: CoOp's zero-shot prompt, e.g. "{} texture.".
        train: training pictures; empty for the four ImageNet variants.
        val: the split's own validation part; empty where there is none (ImageNet).
        test: test pictures.
        half: "base" or "novel" after `base()` or `novel()`.
        split_seed: seed of a split that was drawn because its file is missing.
    """

    paper: PaperDataset
    root: Path
    class_names: tuple[str, ...]
    template: str
    train: tuple[Sample, ...]
    val: tuple[Sample, ...]
    test: tuple[Sample, ...]
    half: Literal["base", "novel"] | None = None
    split_seed: int | None = None
    _after_split: tuple[Any, ...] | None = None

    @property
    def layout(self) -> Layout:
        """Where it lies on disk."""
        return LAYOUTS[self.paper.key]

    @property
    def test_only(self) -> bool:
        """Whether it is an ImageNet variant, with nothing to train on."""
        return self.layout.test_only

    def prompts(self, template: str | None = None) -> list[str]:
        """One prompt a class, underscores as blanks; `template` as in `self.template`."""
        chosen = self.template if template is None else template
        return [chosen.format(name.replace("_", " ")) for name in self.class_names]

    def images(self, part: Literal["train", "val", "test"]) -> ImageList:
        """One list as pictures to train on or to score, with labels and class names.

        Their names, which random views depend on, are relative to the data folder, so that
        moving it changes no view.
        """
        samples: tuple[Sample, ...] = getattr(self, part)
        top = f"{self.root}/"
        return ImageList(
            tuple(s.path for s in samples),
            tuple(s.path.removeprefix(top) for s in samples),
            np.array([s.label for s in samples], dtype=np.int64),
            PublishedNames(self.class_names),
        )

    def few_shot(self, shots: int, seed: int, *, first_start: bool = False) -> BenchmarkDataset:
        """`shots` training pictures of every class, the ones the official code samples.

        Classes are drawn in order of first appearance; a class with fewer pictures keeps them
        all, and draws nothing. The val part is sampled too, with min(shots, 4).

        Args:
            shots: pictures a class, at least 1.
            seed: 0 or more; the sample is the same whatever was drawn elsewhere.
            first_start: go on with the random stream that drew the split, as the official code
                does in the run that writes the missing split file. Needs `split_seed == seed`.

        Raises:
            DataError: shots or seed is out of range, there is nothing to sample from, or the
                base or novel half was taken before (both share one sample: sample first).
        """
        if shots < 1 or seed < 0:
            raise DataError(f"shots must be 1 or more and seed 0 or more, not {shots} and {seed}")
        if self.test_only:
            raise DataError(f"{self.paper.title} is a test set: it has no training pictures")
        if self.half is not None:
            raise DataError(f"sample before taking the {self.half} half: few_shot(...).base()")
        rng = random.Random(seed)
        if first_start:
            if self._after_split is None or self.split_seed != seed:
                raise DataError(f"first_start needs a split drawn with seed {seed}: load(...)")
            rng.setstate(self._after_split)
        train = _sample(self.train, shots, rng)
        val = _sample(self.val, min(shots, 4), rng)
        short = sum(n < shots for n in Counter(s.label for s in train).values())
        if short:
            _log.warning(
                "%s: %d of %d classes have fewer than %d training pictures",
                self.paper.title, short, len(self.class_names), shots,
            )  # fmt: skip
        return replace(self, train=train, val=val)

    def base(self) -> BenchmarkDataset:
        """The first ceil(n/2) classes, in all three lists."""
        return self._half("base")

    def novel(self) -> BenchmarkDataset:
        """The other classes, labels counted from 0 again, in all three lists."""
        return self._half("novel")

    def _half(self, half: Literal["base", "novel"]) -> BenchmarkDataset:
        if self.half is not None or self.test_only:
            what = f"already the {self.half} half" if self.half else "a test set only"
            raise DataError(f"{self.paper.title} is {what}: no {half} half can be taken")
        middle = math.ceil(len(self.class_names) / 2)
        kept = slice(0, middle) if half == "base" else slice(middle, None)
        shift = kept.start
        labels = range(*kept.indices(len(self.class_names)))

        def cut(samples: Iterable[Sample]) -> tuple[Sample, ...]:
            return tuple(Sample(s.path, s.label - shift) for s in samples if s.label in labels)

        return replace(
            self,
            class_names=self.class_names[kept],
            train=cut(self.train),
            val=cut(self.val),
            test=cut(self.test),
            half=half,
        )

    def protocol(
        self,
        name: str,
        *,
        shots: int = 0,
        seed: int = 1,
        classes: str = "all",
        first_start: bool = False,
    ) -> ProtocolLists:
        """The lists of one official run, selection on test pictures included.

        The ImageNet variants ignore shots, classes and protocol, and are their own training
        set, as in the official code; a base or novel figure on them means nothing.

        Args:
            name: "standard" (any other trainer), "base-to-novel" or "cross-dataset".
            shots: pictures a class; 0 keeps the whole training split.
            seed: of the few-shot sample.
            classes: "all", "base" or "novel"; base-to-novel ignores it.
            first_start: as in `few_shot`.

        Raises:
            DataError: the protocol or `classes` is unknown.
        """
        if name not in ("standard", "base-to-novel", "cross-dataset"):
            known = "standard, base-to-novel, cross-dataset"
            raise DataError(f"unknown protocol '{name}'; known are {known}")
        if classes not in ("all", "base", "novel"):
            raise DataError(f"classes is 'all', 'base' or 'novel', not '{classes}'")
        if self.test_only:
            return ProtocolLists(self.class_names, self.test, None, self.test)
        data = self.few_shot(shots, seed, first_start=first_start) if shots else self
        if name == "base-to-novel":
            return ProtocolLists(data.class_names, data.train, data.base().test, data.novel().test)
        if classes != "all":
            data = data.base() if classes == "base" else data.novel()
        return ProtocolLists(data.class_names, data.train, data.test, data.test)

    def split_json(self) -> str:
        """The text of a CoOp split file of these lists, to keep a split that was drawn."""
        top = f"{self.root / self.layout.folder}/"
        parts = (
            [Row(s.path.removeprefix(top), s.label, self.class_names[s.label]) for s in samples]
            for samples in (self.train, self.val, self.test)
        )
        return readers.write_split(Parts(*parts), self.layout.images)


def load(name: str, root: str | Path, *, split_seed: int | None = None) -> BenchmarkDataset:
    """Read one of the 15 datasets from a folder laid out as CoOp's instructions say.

    Nothing is written, and the result doesn't depend on the order of folder listings.

    Args:
        name: key, official name, title or alias, e.g. "dtd" or "DescribableTextures".
        root: the data folder, with `dtd/`, `eurosat/`, … in it.
        split_seed: where the split file is missing, draw the split that the official code
            would draw with this seed. Without it a missing split file is an error.

    Raises:
        DataError: the dataset is unknown, or its files are not what they should be; the
            message names the file at fault and the expected layout.
    """
    paper = find(name)
    root = Path(root).expanduser().absolute()
    layout = LAYOUTS[paper.key]
    try:
        parts, after_split = read_parts(layout, root, split_seed)
        absent = absent_pictures(layout, root, parts)
        if absent:
            more = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
            raise DataError(f"'{absent[0]}'{more}: listed, but not there")
        class_names = checked_names(layout, root, parts)
    except DataError as error:
        raise DataError(
            f"{paper.title}: {error}\nexpected under '{root}':\n{layout.describe()}"
        ) from error
    top = root / layout.folder
    train, val, test = (tuple(Sample(f"{top}/{r.path}", r.label) for r in p) for p in parts)
    return BenchmarkDataset(
        paper,
        root,
        class_names,
        layout.template,
        train,
        val,
        test,
        split_seed=None if after_split is None else split_seed,
        _after_split=after_split,
    )


def _sample(samples: Sequence[Sample], shots: int, rng: random.Random) -> tuple[Sample, ...]:
    groups: dict[int, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(sample.label, []).append(sample)
    chosen: list[Sample] = []
    for group in groups.values():
        chosen += rng.sample(group, shots) if len(group) >= shots else group
    return tuple(chosen)
