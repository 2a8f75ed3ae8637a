"""Verbs about the teacher cache: promptkd cache build | info | verify | extend | merge."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from promptkd.errors import CheckpointError, DataError
from promptkd.ranks import prints

Json = Annotated[bool, tyro.conf.arg(name="json", help="Print the result as JSON on stdout.")]
Quiet = Annotated[bool, tyro.conf.arg(help="No progress on stderr.")]


@dataclass(kw_only=True)
class WhichTeacher:
    """The teacher, and how it runs."""

    teacher: str = "ViT-L-14/openai"
    """A teacher folder made by 'promptkd teach', or a CLIP's name (zero-shot)."""
    classes: Path | None = None
    """A file of class names, as for 'promptkd distill'; a teacher folder brings its own."""
    templates: tuple[str, ...] = ("a photo of a {}.",)
    """Templates of a zero-shot teacher's text features."""
    precision: str = "fp32"
    """How the frozen weights are stored: fp32, bf16, fp16."""
    device: str | None = None
    """'cpu', 'cuda', …; default: the GPU if there is one."""

    def load(self) -> Any:
        """The teacher in memory."""
        from promptkd.class_names import read_class_names
        from promptkd.clip import load_clip
        from promptkd.ranks import pick_device
        from promptkd.teacher import Teacher, zero_shot_teacher

        place = pick_device(self.device)
        if (Path(self.teacher) / "teacher.json").is_file():
            if self.classes is not None:
                raise DataError("this teacher brings its class names; leave --classes out")
            return Teacher.load(self.teacher, precision=self.precision, device=place)
        if self.classes is None:
            raise DataError("give --classes: a zero-shot teacher needs class names")
        clip = load_clip(self.teacher, precision=self.precision, device=place)
        return zero_shot_teacher(clip, read_class_names(self.classes), self.templates)


@dataclass(kw_only=True)
class Build:
    """Store a teacher's answers on views of pictures; goes on where it was interrupted.

    Example: promptkd cache build photos --output cache --classes names.txt
    """

    images: tyro.conf.Positional[str]
    """A folder of pictures, a file that lists them, or tar shards."""
    output: Path
    """Folder of the cache."""
    guide: tyro.conf.OmitArgPrefixes[WhichTeacher]
    views: int = 8
    """Random views of each picture."""
    seed: int = 0
    """Of the views."""
    content: Literal["auto", "features", "statistics", "logits"] = "auto"
    """Features stay valid for other class names and temperatures, the others do not."""
    dtype: Literal["float16", "float32"] | None = None
    """Of what is stored; default: float16, statistics float32."""
    temperature: float = 1.0
    """T of statistics."""
    crop_scale: tuple[float, float] = (0.5, 1.0)
    """Share of the picture that a view covers."""
    shard_rows: int = 1024
    """Pictures a file, a multiple of 64."""
    shard: str | None = None
    """'i/n': only every n-th shard from the i-th on (from 0); default: torchrun's rank, or all."""
    json_: Json = False
    quiet: Quiet = False

    def run(self) -> None:
        """Fill the cache."""
        from promptkd.cache import build_cache
        from promptkd.stages.progress import Progress

        cache = build_cache(
            self.guide.load(),
            self.images,
            self.output,
            views=self.views,
            seed=self.seed,
            content=self.content,
            dtype=self.dtype,
            temperature=self.temperature,
            crop_scale=self.crop_scale,
            shard_rows=self.shard_rows,
            part=_part(self.shard),
            say=Progress(quiet=self.quiet or not prints()).say,
        )
        _show(cache.info(), self.json_)


@dataclass(kw_only=True)
class Info:
    """Say what a cache holds.

    Example: promptkd cache info cache
    """

    cache: tyro.conf.Positional[Path]
    """Folder of the cache."""
    json_: Json = False

    def run(self) -> None:
        """Print the facts."""
        from promptkd.cache import FeatureCache

        _show(FeatureCache.open(self.cache).info(), self.json_)


@dataclass(kw_only=True)
class Verify:
    """Check every byte of a cache; damage is exit code 1.

    Example: promptkd cache verify cache --images photos
    """

    cache: tyro.conf.Positional[Path]
    """Folder of the cache."""
    images: str | None = None
    """The pictures: compare their bytes with those that the teacher saw."""
    recompute: tyro.conf.OmitArgPrefixes[WhichTeacher] | None = None
    """Compute a sample again with this teacher (with --images)."""
    json_: Json = False

    def run(self) -> None:
        """Print what was found."""
        from promptkd.cache import FeatureCache, verify_cache

        teacher = None if self.recompute is None else self.recompute.load()
        verdict = verify_cache(FeatureCache.open(self.cache), images=self.images, teacher=teacher)
        _show(asdict(verdict), self.json_)
        if verdict.problems:
            raise CheckpointError(f"cache '{self.cache}' has {len(verdict.problems)} problems")


@dataclass(kw_only=True)
class Extend:
    """Add views or new pictures to a cache; what is there is not touched.

    Example: promptkd cache extend photos --cache cache --views 16 --teacher teacher
    """

    images: tyro.conf.Positional[str]
    """All pictures, old and new."""
    cache: Path
    """Folder of the cache."""
    guide: tyro.conf.OmitArgPrefixes[WhichTeacher]
    views: int | None = None
    """Views from now on; default: as many as there are."""
    shard: str | None = None
    """'i/n': as for build."""
    json_: Json = False
    quiet: Quiet = False

    def run(self) -> None:
        """Fill in what is new."""
        from promptkd.cache import extend_cache
        from promptkd.stages.progress import Progress

        cache = extend_cache(
            self.guide.load(),
            self.images,
            self.cache,
            views=self.views,
            part=_part(self.shard),
            say=Progress(quiet=self.quiet or not prints()).say,
        )
        _show(cache.info(), self.json_)


@dataclass(kw_only=True)
class Merge:
    """Join caches that were built apart with --shard i/n.

    Example: promptkd cache merge part0 part1 --output cache
    """

    caches: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of caches."""
    output: Path
    """Folder of the whole."""
    json_: Json = False

    def run(self) -> None:
        """Join them."""
        from promptkd.cache import merge_caches

        _show(merge_caches(self.caches, self.output).info(), self.json_)


CacheVerb = (
    Annotated[Build, tyro.conf.subcommand("build")]
    | Annotated[Info, tyro.conf.subcommand("info")]
    | Annotated[Verify, tyro.conf.subcommand("verify")]
    | Annotated[Extend, tyro.conf.subcommand("extend")]
    | Annotated[Merge, tyro.conf.subcommand("merge")]
)


@dataclass(kw_only=True)
class Cache:
    """The teacher's answers, stored once, to distil from without the teacher."""

    action: tyro.conf.OmitSubcommandPrefixes[tyro.conf.OmitArgPrefixes[CacheVerb]]

    def run(self) -> None:
        """Run the verb."""
        self.action.run()


def _part(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    index, slash, count = text.partition("/")
    if not (slash and index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise DataError(f"--shard must be i/n with 0 <= i < n, not '{text}'")
    return int(index), int(count)


def _show(facts: dict[str, Any], as_json: bool) -> None:
    if not prints():
        return
    if as_json:
        print(json.dumps(facts, indent=1, ensure_ascii=False))
        return
    for key, value in facts.items():
        print(f"{key.replace('_', ' ')}: {value}")
