"""The command line: one verb a stage or a thing, flags made from the API's own dataclasses."""

from __future__ import annotations

import csv
import json
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from promptkd.cache_cli import Cache
from promptkd.calibrate_cli import Calibrate
from promptkd.classes_cli import Classes
from promptkd.errors import PromptKDError
from promptkd.export_cli import Export
from promptkd.hub_cli import Push, open_student
from promptkd.models_cli import Models
from promptkd.ranks import name_of_process, prints
from promptkd.reproduce_cli import Commands as PaperCommands
from promptkd.scale_cli import Commands as ScaleCommands
from promptkd.serve_cli import Serve
from promptkd.stages.distill import DistillConfig
from promptkd.stages.teach import TeachConfig

Json = Annotated[bool, tyro.conf.arg(name="json", help="Print the result as JSON on stdout.")]
Quiet = Annotated[bool, tyro.conf.arg(help="No progress on stderr.")]
TensorBoard = Annotated[
    bool, tyro.conf.arg(help="Also write TensorBoard curves to the output folder.")
]
Device = Annotated[
    str | None, tyro.conf.arg(help="'cpu', 'cuda', …; default: the GPU if there is one.")
]


@dataclass(kw_only=True)
class Demo:
    """Run both stages on the small pictures and models that come with promptkd.

    Stage 1 tunes the teacher on a few labelled pictures of the base classes, stage 2 distils it
    on unlabelled pictures of all classes; the table compares them on held-out pictures.
    """

    seeds: int = 1
    """Repeat with so many seeds, from 0; the table gives mean ± standard deviation."""
    output: Path = Path("promptkd-demo")
    """Folder for the students, the table and the picture."""
    json_: Json = False
    quiet: Quiet = False

    def run(self) -> None:
        """Print the table."""
        from promptkd.demo import run_demo

        result = run_demo(self.seeds, self.output, _progress(self.quiet))
        _print(result.as_dict() if self.json_ else result.table())


@dataclass(kw_only=True)
class Teach:
    """Stage 1: tune the prompts of a large CLIP on a few labelled pictures.

    Example: promptkd teach photos --model ViT-L-14/openai --output teacher
    """

    labelled: tyro.conf.Positional[str]
    """A folder with one sub-folder a class; a CSV, TSV, JSONL or Parquet file of path and label; or
    tar shards."""
    model: str = "ViT-L-14/openai"
    """The large CLIP: 'architecture/tag', 'hf-hub:…', 'local-dir:…' or a weights file."""
    output: Path
    """Folder for the teacher, its checkpoints and log."""
    classes: Path | None = None
    """A file of class names, one a line, or CSV, TSV, JSONL or JSON with templates and descriptions
    of each; default: the folder's classes."""
    resume: bool = False
    """Go on with the run in the output folder."""
    device: Device = None
    config: tyro.conf.OmitArgPrefixes[TeachConfig] = field(default_factory=TeachConfig)
    tensorboard: TensorBoard = False
    json_: Json = False
    quiet: Quiet = False

    def run(self) -> None:
        """Make the teacher."""
        from promptkd.stages.teach import teach

        teacher = teach(
            self.labelled,
            _class_names(self.classes),
            model=self.model,
            output=self.output,
            resume=self.resume,
            device=self.device,
            config=self.config,
            progress=_progress(self.quiet, self.tensorboard),
        )
        facts = {
            "teacher": str(self.output),
            "model": teacher.clip.name,
            "method": teacher.info.method,
            "classes": len(teacher.class_names),
            "fingerprint": teacher.fingerprint(),
        }
        _print(facts if self.json_ else f"teacher of {facts['classes']} classes in '{self.output}'")


@dataclass(kw_only=True)
class Distill:
    """Stage 2: distil a teacher into a small student on unlabelled pictures.

    Example: promptkd distill photos --classes names.txt --output student
    """

    images: tyro.conf.Positional[str]
    """A folder of pictures (labels aren't looked at), a file that lists them, or tar shards."""
    teacher: str = "ViT-L-14/openai"
    """A teacher folder made by 'promptkd teach', or a CLIP's name (zero-shot)."""
    student: str = "ViT-B-16/openai"
    """The small CLIP: 'architecture/tag', 'hf-hub:…', 'local-dir:…' or a weights file."""
    output: Path
    """Folder for the student, its checkpoints and log."""
    classes: Path | None = None
    """A file of class names, one a line, or CSV, TSV, JSONL or JSON with templates and descriptions
    of each; a teacher folder brings its own."""
    labelled: str | None = None
    """A few labelled pictures: run stage 1 first, on the teacher's CLIP."""
    validation: str | None = None
    """Labelled pictures to calibrate the probabilities on; default: the teacher's answers."""
    cache: Path | None = None
    """Folder of a teacher cache, built if absent; with it the teacher is not loaded."""
    include_backbone: bool = False
    """Store the student's frozen tower too, so that the folder needs nothing else."""
    resume: bool = False
    """Go on with the run in the output folder."""
    device: Device = None
    config: tyro.conf.OmitArgPrefixes[DistillConfig] = field(default_factory=DistillConfig)
    teach: TeachConfig = field(default_factory=TeachConfig)
    """Stage 1, when it runs first: with --labelled."""
    tensorboard: TensorBoard = False
    json_: Json = False
    quiet: Quiet = False

    def run(self) -> None:
        """Make the student; a failed one is exit code 1."""
        from promptkd.stages.distill import distill

        if self.labelled is None and self.teach != TeachConfig():
            raise PromptKDError(
                "--teach.… are settings of stage 1, which needs --labelled; a zero-shot teacher's "
                "templates are --templates"
            )
        student = distill(
            self.images,
            _class_names(self.classes),
            teacher=self.teacher,
            student=self.student,
            labelled=self.labelled,
            validation=self.validation,
            cache=self.cache,
            output=self.output,
            resume=self.resume,
            device=self.device,
            config=self.config,
            teach_config=self.teach if self.labelled is not None else None,
            progress=_progress(self.quiet, self.tensorboard),
        )
        if self.include_backbone and prints():
            student.save(self.output, include_backbone=True)
        summary = {k: v for k, v in student.info.summary.items() if k not in ("config", "history")}
        line = f"student of {len(student.class_names)} classes in '{self.output}'"
        _print({"student": str(self.output), **summary} if self.json_ else line)
        if summary["failed"]:
            raise PromptKDError("the student agrees with its teacher less than before distilling")


@dataclass(kw_only=True)
class Predict:
    """Classify pictures with a student.

    Example: promptkd predict student photos --output predictions.csv
    """

    student: tyro.conf.Positional[str]
    """A student folder, or 'hf://org/name'."""
    paths: tyro.conf.Positional[tuple[str, ...]]
    """Pictures, folders of pictures, files that list them, tar shards."""
    top_k: int = 5
    """Classes to name a picture."""
    output: Path | None = None
    """Write a .csv or .jsonl file instead of printing."""
    backbone: str | None = None
    """The student's CLIP, when its stored name is not to be found here."""
    device: Device = None
    json_: Json = False

    def run(self) -> None:
        """Print or write predictions."""
        from promptkd.data.inputs import together
        from promptkd.ranks import pick_device

        if not self.paths:
            raise PromptKDError("name at least one picture or folder")
        if self.output is not None and self.output.suffix not in (".csv", ".jsonl"):
            raise PromptKDError(f"'{self.output}' must end in .csv or .jsonl")
        student = open_student(
            self.student, backbone=self.backbone, device=pick_device(self.device)
        )
        rows = (asdict(p) for p in student.iter_predict(together(self.paths), self.top_k))
        if self.output is not None:
            count = _write_rows(self.output, rows, min(self.top_k, len(student.class_names)))
            _print(
                {"predictions": count, "output": str(self.output)}
                if self.json_
                else f"{count} predictions in '{self.output}'"
            )
        elif self.json_:
            _print(list(rows))
        else:
            for row in rows:
                pairs = zip(row["labels"], row["probabilities"], strict=True)
                best = ", ".join(f"{name} {100 * p:.1f} %" for name, p in pairs)
                odd = " (looks out of domain)" if row["out_of_domain"] else ""
                print(f"{row['path']}: {best}{odd}")


@dataclass(kw_only=True)
class Evaluate:
    """Measure a student on labelled pictures.

    Example: promptkd evaluate student test-photos
    """

    student: tyro.conf.Positional[str]
    """A student folder, or 'hf://org/name'."""
    labelled: tyro.conf.Positional[str]
    """A folder with one sub-folder a class (of a split its `test` part), a list, or tar shards."""
    split: Path | None = None
    """A split.json that names base and novel classes, when none lies beside the folder."""
    backbone: str | None = None
    """The student's CLIP, when its stored name is not to be found here."""
    device: Device = None
    json_: Json = False

    def run(self) -> None:
        """Print accuracies."""
        from promptkd.ranks import pick_device

        student = open_student(
            self.student, backbone=self.backbone, device=pick_device(self.device)
        )
        found = student.evaluate(self.labelled, split=self.split, together=True)
        _print(asdict(found) if self.json_ else found.table())


Command = (
    Annotated[Demo, tyro.conf.subcommand("demo")]
    | Annotated[Teach, tyro.conf.subcommand("teach")]
    | Annotated[Distill, tyro.conf.subcommand("distill")]
    | Annotated[Predict, tyro.conf.subcommand("predict")]
    | Annotated[Evaluate, tyro.conf.subcommand("evaluate")]
    | Annotated[Cache, tyro.conf.subcommand("cache")]
    | Annotated[Calibrate, tyro.conf.subcommand("calibrate")]
    | Annotated[Classes, tyro.conf.subcommand("classes")]
    | Annotated[Export, tyro.conf.subcommand("export")]
    | Annotated[Models, tyro.conf.subcommand("models")]
    | Annotated[Push, tyro.conf.subcommand("push")]
    | Annotated[Serve, tyro.conf.subcommand("serve")]
    | PaperCommands
    | ScaleCommands
)


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line: 0 done, 1 failed, 130 interrupted; wrong use exits with 2."""
    try:
        try:
            command: Any = tyro.cli(
                Command,
                prog="promptkd",
                description="Turn a large CLIP into a small, fast classifier for your own "
                "pictures, without labels.",
                args=args,
                config=(tyro.conf.FlagCreatePairsOff,),
            )
            command.run()
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # whoever read our output has enough, as `promptkd … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except PromptKDError as error:
        if not error.told:
            print(f"{name_of_process()}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        if prints():
            print("promptkd: interrupted; go on with --resume", file=sys.stderr)
        return 130
    return 0


def _progress(quiet: bool, tensorboard: bool = False) -> Any:
    from promptkd.stages.progress import Progress

    return Progress(quiet=quiet, tensorboard=tensorboard)


def _class_names(path: Path | None) -> tuple[str, ...] | None:
    from promptkd.class_names import read_class_names

    return None if path is None else read_class_names(path)


def _write_rows(path: Path, rows: Iterable[dict[str, Any]], top_k: int) -> int:
    count = 0
    with path.open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        if path.suffix == ".csv":
            heads = [f"{what}{k}" for k in range(1, top_k + 1) for what in ("label", "probability")]
            table.writerow(["path", *heads, "out_of_domain"])
        for row in rows:
            count += 1
            if path.suffix == ".jsonl":
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
            else:
                pairs = zip(row["labels"], row["probabilities"], strict=True)
                cells = (v for name, p in pairs for v in (name, f"{p:.6f}"))
                table.writerow([row["path"], *cells, row["out_of_domain"]])
    return count


def _print(result: Any) -> None:
    """A string or table for people, anything else as JSON; in a job, from the first rank."""
    if not prints():
        return
    if isinstance(result, dict | list):
        print(json.dumps(result, indent=1, ensure_ascii=False))
    elif isinstance(result, str):
        print(result)
    else:
        from rich.console import Console

        Console().print(result)


if __name__ == "__main__":
    sys.exit(main())
