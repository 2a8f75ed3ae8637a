"""Verbs about time and memory: promptkd plan | doctor | bench."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from promptkd.errors import DataError
from promptkd.scale_tables import plan_lines, print_diagnosis, speeds_table
from promptkd.stages.distill import DistillConfig

if TYPE_CHECKING:
    from promptkd.clip import Clip
    from promptkd.data.sources import ImageList
    from promptkd.teacher import Teacher
    from promptkd.throughput import Throughput

Json = Annotated[bool, tyro.conf.arg(name="json", help="Print the result as JSON on stdout.")]
Quiet = Annotated[bool, tyro.conf.arg(help="No progress on stderr.")]
_DEMO = Path(__file__).parent / "demo_data"


@dataclass(kw_only=True)
class Work:
    """What is to be distilled; by default the demo's pictures and models."""

    images: tyro.conf.Positional[str | None] = None
    """A folder of pictures, or a file that lists them; default: the demo's."""
    teacher: str | None = None
    """A teacher folder, or a CLIP's name; default: ViT-L-14/openai, or the demo's teacher."""
    student: str | None = None
    """The small CLIP; default: ViT-B-16/openai, or the demo's student."""
    classes: Path | None = None
    """A file of class names, as for 'promptkd distill'; a teacher folder brings its own."""
    device: str | None = None
    """'cpu', 'cuda', …; default: the GPU if there is one."""
    config: tyro.conf.OmitArgPrefixes[DistillConfig] = field(default_factory=DistillConfig)

    def pictures(self) -> ImageList:
        """The pictures to distil on."""
        from promptkd.data.sources import unlabelled

        return unlabelled(self.images or _DEMO / "images")

    def models(self) -> tuple[Teacher, Clip]:
        """Teacher and small CLIP in memory."""
        from promptkd.cache_cli import WhichTeacher
        from promptkd.clip import load_clip
        from promptkd.data.sources import read_split
        from promptkd.ranks import pick_device
        from promptkd.teacher import zero_shot_teacher

        precision, place = self.config.precision, pick_device(self.device)
        names = ("ViT-L-14/openai", "ViT-B-16/openai")
        if self.images is None:
            names = (f"local-dir:{_DEMO / 'teacher'}", f"local-dir:{_DEMO / 'student'}")
        small = load_clip(self.student or names[1], precision=precision, device=place, text=False)
        if self.images is None and self.teacher is None and self.classes is None:
            split = read_split(_DEMO / "split.json")
            clip = load_clip(names[0], precision=precision, device=place)
            classes = sorted({*split.base, *split.novel})
            return zero_shot_teacher(clip, classes, self.config.templates), small
        guide = WhichTeacher(
            teacher=self.teacher or names[0],
            classes=self.classes,
            templates=self.config.templates,
            precision=precision,
            device=self.device,
        )
        return guide.load(), small


@dataclass(kw_only=True)
class Bench(Work):
    """Time every part of distilling on this machine, and say which one the others wait for.

    Example: promptkd bench photos --teacher teacher --precision bf16
    """

    seconds: float = 2.0
    """Time for each part."""
    output: Path | None = None
    """Also write the figures as JSON, for 'promptkd plan --measured'."""
    json_: Json = False
    quiet: Quiet = False

    def run(self) -> None:
        """Print the table."""
        found = _measure(self, self.seconds, self.quiet)
        facts = _speeds_as_dict(found)
        if self.output is not None:
            self.output.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        if self.json_:
            print(json.dumps(facts, indent=1))
            return
        from rich.console import Console

        Console().print(speeds_table(found))


@dataclass(kw_only=True)
class Doctor(Work):
    """Before a long run: look at the machine, the pictures and the models; estimate and advise.

    Example: promptkd doctor photos --teacher teacher --test test-photos
    """

    labelled: str | None = None
    """The labelled pictures of stage 1: warn of classes without any."""
    test: str | None = None
    """Labelled pictures to evaluate on: warn of those that are among the pictures to distil on."""
    sample: int = 500
    """Pictures to look at."""
    seconds: float = 1.0
    """Time for each part's speed; 0 leaves models and speeds out."""
    json_: Json = False
    quiet: Quiet = False

    def run(self) -> None:
        """Print what was found."""
        from promptkd.doctor import diagnose, look_at_data, look_at_machine
        from promptkd.ranks import pick_device

        if self.sample < 1:
            raise DataError("--sample must be at least 1")
        images, speeds, size = self.pictures(), None, 224
        if self.seconds > 0:
            speeds, size = _measure_with_size(self, self.seconds, self.quiet)
        labels, test = self._labels(self.labelled, "train"), self._labels(self.test, "test")
        if self.images is None and test is None:
            test = self._labels(str(_DEMO / "images"), "test")
        data = look_at_data(images, size, labelled=labels, test=test, sample=self.sample)
        found = diagnose(look_at_machine(pick_device(self.device)), data, self.config, speeds)
        if self.json_:
            print(json.dumps(found.as_dict(), indent=1, ensure_ascii=False))
            return
        print_diagnosis(found)

    def _labels(self, source: str | None, part: str) -> ImageList | None:
        from promptkd.class_names import read_class_names
        from promptkd.data.sources import labelled

        if source is None:
            return None
        names = None if self.classes is None else read_class_names(self.classes)
        return labelled(source, names, part=part)


@dataclass(kw_only=True)
class Plan:
    """What distilling from very many pictures takes: bytes, hours, shards, network.

    The speeds are of one job and one rank on your machine, from 'promptkd bench --output FILE' or
    given. Example: promptkd plan --images 1e8 --measured bench.json --jobs 64 --ranks 8
    """

    images: float
    """Pictures."""
    measured: Path | None = None
    """What 'promptkd bench --output' wrote; flags go before it."""
    label_speed: float | None = None
    """Pictures a second that one job labels, decoding and storing included."""
    train_speed: float | None = None
    """Pictures a second that one rank trains on from a cache."""
    picture_bytes: float | None = None
    """Mean size of a picture's file."""
    classes: int | None = None
    """Class names."""
    feature_width: int | None = None
    """Width of the teacher's features: 768 for a ViT-L/14."""
    student_width: int = 512
    """Width of the student's features: 512 for a ViT-B/16."""
    content: Literal["features", "statistics", "logits"] = "features"
    """Of the cache."""
    views: int = 4
    """Random views of a picture in the cache."""
    epochs: float = 4
    """Passes over the pictures."""
    batch_size: int = 4096
    """Pictures a step, of all ranks together."""
    shard_rows: int = 65536
    """Pictures a file of the cache."""
    jobs: int = 1
    """Jobs that fill the cache ('cache build --shard i/n')."""
    ranks: int = 1
    """Ranks that train (torchrun)."""
    link_gbit: float = 10.0
    """Network of a machine, Gbit/s."""
    json_: Json = False

    def run(self) -> None:
        """Print the plan."""
        from promptkd.plan import Scale, make_plan

        try:
            scale = Scale(**self._numbers())
            found = make_plan(scale)
        except ValueError as error:
            raise DataError(f"this can't be planned: {error}") from error
        if self.json_:
            print(json.dumps({"scale": asdict(scale), **found.as_dict()}, indent=1))
            return
        for line in plan_lines(scale, found):
            print(line)

    def _numbers(self) -> dict[str, Any]:
        known = _read_measured(self.measured)
        given = {
            "label_speed": self.label_speed,
            "train_speed": self.train_speed,
            "picture_bytes": self.picture_bytes,
            "num_classes": self.classes,
            "feature_width": self.feature_width,
        }
        numbers = {k: known.get(k) if v is None else v for k, v in given.items()}
        missing = [k for k, v in numbers.items() if v is None]
        if missing:
            flags = ", ".join("--" + k.removeprefix("num_").replace("_", "-") for k in missing)
            raise DataError(f"give {flags}, or --measured with what 'promptkd bench' wrote")
        return {
            **numbers,
            "images": self.images,
            "views": self.views,
            "epochs": self.epochs,
            "student_width": self.student_width,
            "batch_size": self.batch_size,
            "content": self.content,
            "shard_rows": self.shard_rows,
            "jobs": self.jobs,
            "ranks": self.ranks,
            "link": self.link_gbit * 1e9 / 8,
        }


Commands = (
    Annotated[Plan, tyro.conf.subcommand("plan")]
    | Annotated[Doctor, tyro.conf.subcommand("doctor")]
    | Annotated[Bench, tyro.conf.subcommand("bench")]
)


def _read_measured(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        speeds = data["modes"]
        return {
            "label_speed": speeds["fill a cache"]["pictures_per_second"],
            "train_speed": speeds["train from a cache"]["pictures_per_second"],
            "picture_bytes": data["picture_bytes"],
            "num_classes": data["num_classes"],
            "feature_width": data["feature_width"],
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"'{path}' is not what 'promptkd bench --output' writes: {error}"
        ) from error


def _measure(work: Work, seconds: float, quiet: bool) -> Throughput:
    return _measure_with_size(work, seconds, quiet)[0]


def _measure_with_size(work: Work, seconds: float, quiet: bool) -> tuple[Throughput, int]:
    """The speeds, and the shorter side of the student's input."""
    from promptkd.stages.progress import Progress
    from promptkd.throughput import measure

    if seconds <= 0:
        raise DataError("--seconds must be positive")
    images = work.pictures()
    teacher, clip = work.models()
    say = Progress(quiet=quiet).say
    found = measure(images, teacher, clip, work.config, seconds=seconds, say=say)
    return found, min(clip.preprocess.size)


def _speeds_as_dict(found: Throughput) -> dict[str, Any]:
    modes = {
        mode: {
            "pictures_per_second": found.speed(mode),
            "bottleneck": found.bottleneck(mode),
            "seconds_per_picture": parts,
        }
        for mode, parts in found.modes().items()
    }
    return {**asdict(found), "modes": modes}
