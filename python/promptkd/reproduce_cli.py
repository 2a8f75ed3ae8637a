"""Verbs about the paper's datasets: reproduce, report, convert, data."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from promptkd.errors import DataError

Json = Annotated[bool, tyro.conf.arg(name="json", help="Print the result as JSON on stdout.")]
Quiet = Annotated[bool, tyro.conf.arg(help="No progress on stderr.")]
Device = Annotated[
    str | None, tyro.conf.arg(help="'cpu', 'cuda', …; default: the GPU if there is one.")
]


@dataclass(kw_only=True)
class Changes:
    """Settings of a stage that are to differ from the paper's; every table then says so."""

    epochs: int | None = None
    """Passes over the pictures."""
    max_steps: int | None = None
    """Stop after so many steps."""
    batch_size: int | None = None
    """Pictures a step."""
    lr: float | None = None
    """Peak learning rate."""
    prompt_depth: int | None = None
    """Prompted layers."""
    templates: tuple[str, ...] | None = None
    """Templates of zero-shot text features, with '{}' for the name."""
    precision: str | None = None
    """How frozen weights are stored: fp32, bf16, fp16."""

    def given(self) -> dict[str, Any]:
        """Those that were set."""
        found = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in found.items() if value is not None}


@dataclass(kw_only=True)
class StudentChanges(Changes):
    """The same for stage 2, which has settings of its own."""

    views: int | None = None
    """Views of a picture that the teacher sees; 0, the paper's: fresh ones for ever."""
    kd_weight: float | None = None
    """Factor of the KL averaged over the batch (the paper's KD_WEIGHT divided by the classes)."""


@dataclass(kw_only=True)
class Reproduce:
    """Run the paper's protocol on its datasets; print its numbers beside one's own.

    Every dataset and seed is a cell that is run once: call again to go on or to add cells.

    Example: promptkd reproduce dtd eurosat --root data --protocol base-to-novel --seeds 1 2 3
    """

    datasets: tyro.conf.Positional[tuple[str, ...]] = ()
    """Datasets by name, for example dtd; see 'promptkd data list'."""
    root: Path
    """The data folder, with dtd/, eurosat/, … in it."""
    output: Path = Path("promptkd-reproduce")
    """Folder for students, tables and report.html."""
    protocol: Literal["base-to-novel", "cross-dataset", "few-shot"] = "base-to-novel"
    """base-to-novel: labels of the first half of the classes; cross-dataset: labels of ImageNet
    only; few-shot: labels of all classes."""
    seeds: tuple[int, ...] = (1, 2, 3)
    """One run each; tables give mean ± standard deviation."""
    all: bool = False
    """All datasets of the protocol."""
    teacher: str | None = None
    """Instead of stage 1: a CLIP's name (zero-shot), a teacher folder or an official checkpoint
    ('model-best.pth.tar') of --model; '{dataset}' and '{seed}' are filled in."""
    model: str = "ViT-L-14/openai"
    """The large CLIP."""
    student: str = "ViT-B-16/openai"
    """The small CLIP."""
    shots: int = 16
    """Labelled pictures a class for stage 1."""
    selection: Literal["clean", "validation", "paper"] = "clean"
    """clean: the last epoch. validation: the best one on a tenth of the training pictures, kept
    aside. paper: the best one on TEST pictures, as the official code; marked in every table."""
    cache: bool = False
    """Store each teacher's answers in the output folder; all seeds with it learn from them."""
    distill: StudentChanges = field(default_factory=StudentChanges)
    teach: Changes = field(default_factory=Changes)
    device: Device = None
    json_: Json = False
    quiet: Quiet = False

    def run(self) -> None:
        """Print the table."""
        from promptkd.benchmarks.reproduce import Plan, reproduce, terminal_table, trained_datasets
        from promptkd.stages.progress import Progress

        if self.all and self.datasets:
            raise DataError("name datasets or give --all, not both")
        plan = Plan(
            datasets=trained_datasets(self.protocol) if self.all else self.datasets,
            root=self.root,
            output=self.output,
            protocol=self.protocol,
            seeds=self.seeds,
            teacher=self.teacher,
            model=self.model,
            student=self.student,
            shots=self.shots,
            selection=self.selection,
            cache=self.cache,
            distill=self.distill.given(),
            teach=self.teach.given(),
            device=self.device,
        )
        summary = reproduce(plan, Progress(quiet=self.quiet))
        _print(summary if self.json_ else terminal_table(summary))
        if not self.json_:
            print(f"report: {self.output / 'report.html'}")


@dataclass(kw_only=True)
class Report:
    """Write one HTML file about runs; it needs no network and nothing beside it.

    Example: promptkd report promptkd-reproduce --output report.html
    """

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Folders made by 'promptkd reproduce' or 'promptkd distill'."""
    output: Path = Path("report.html")
    """The file to write."""
    json_: Json = False

    def run(self) -> None:
        """Write the file."""
        from promptkd.report import write_report

        path = write_report(self.runs, self.output)
        _print(
            {"report": str(path), "bytes": path.stat().st_size} if self.json_ else f"report: {path}"
        )


@dataclass(kw_only=True)
class Convert:
    """Turn a checkpoint of the official code into a teacher or student folder.

    A student's file holds no class vectors: convert its teacher first.

    Example: promptkd convert model-best.pth.tar --model ViT-L-14/openai --classes names.txt
    --output teacher
    """

    checkpoint: tyro.conf.Positional[Path]
    """A PromptSRC teacher or PromptKD student, for example model.pth.tar-20."""
    model: str
    """The CLIP it was tuned on: 'ViT-L-14/openai' for the paper's teachers, 'ViT-B-16/openai'
    for its students."""
    output: Path
    """The folder to write."""
    classes: Path | None = None
    """For a teacher: a file of class names in label order, one a line."""
    dataset: str | None = None
    """For a teacher, instead of --classes: one of the paper's datasets, read from --root."""
    root: Path | None = None
    """The data folder of --dataset."""
    teacher: Path | None = None
    """For a student: the folder of its teacher."""
    device: Device = None
    json_: Json = False

    def run(self) -> None:
        """Write the folder."""
        from promptkd.convert import convert
        from promptkd.ranks import pick_device

        made = convert(
            self.checkpoint,
            self.output,
            model=self.model,
            class_names=self._names(),
            teacher=self.teacher,
            device=pick_device(self.device),
        )
        kind = type(made).__name__.lower()
        facts = {"kind": kind, "output": str(self.output), "classes": len(made.class_names)}
        line = f"{kind} of {len(made.class_names)} classes in '{self.output}'"
        _print(facts if self.json_ else line)

    def _names(self) -> tuple[str, ...] | None:
        from promptkd.benchmarks import load
        from promptkd.class_names import PublishedNames, read_class_names

        if (self.dataset is None) != (self.root is None) or (self.dataset and self.classes):
            raise DataError("give --classes, or --dataset and --root together")
        if self.dataset is not None and self.root is not None:
            return PublishedNames(load(self.dataset, self.root).class_names)
        return None if self.classes is None else read_class_names(self.classes)


@dataclass(kw_only=True)
class DataList:
    """List the datasets that can be read: classes, folder, whether they can be downloaded."""

    json_: Json = False

    def run(self) -> None:
        """Print them."""
        from rich.table import Table

        from promptkd.benchmarks import catalogue

        entries = catalogue()
        if self.json_:
            _print([asdict(e) for e in entries])
            return
        table = Table("name", "classes", "folder", "download", "use")
        for column in table.columns:
            column.no_wrap = True
        for e in entries:
            use = "test" if e.test_only else "train, test"
            download = "yes" if e.downloadable else "no"
            table.add_row(e.key, str(e.num_classes), f"{e.folder}/", download, use)
        _print(table)


@dataclass(kw_only=True)
class DataCheck:
    """Say what is there and what is missing, with counts; exit code 1 if a named one is unusable.

    Example: promptkd data check data --datasets dtd eurosat
    """

    path: tyro.conf.Positional[Path]
    """The data folder, or one dataset's own folder."""
    datasets: tuple[str, ...] = ()
    """Look at these only; default: all that have a folder."""
    json_: Json = False

    def run(self) -> None:
        """Print a row a dataset, then what is wrong."""
        from promptkd.benchmarks import check

        reports = check(self.path, self.datasets or None)
        shown = [r for r in reports if self.datasets or r.present]
        if not shown:
            raise DataError(
                f"'{self.path}' holds none of the {len(reports)} datasets; 'promptkd data list' "
                "names the folders that are looked for"
            )
        if self.json_:
            _print([{**asdict(r), "folder": str(r.folder), "usable": r.usable} for r in shown])
        else:
            _print(_check_table(shown))
            for report in shown:
                if not report.usable:
                    print(f"{report.title}: {report.problem}\nexpected:\n{report.expected}")
        wrong = [r.title for r in shown if not r.usable]
        if wrong:
            raise DataError(f"can't be used: {', '.join(wrong)}")


@dataclass(kw_only=True)
class DataDownload:
    """Fetch datasets into the data folder, check and unpack them; call again to go on.

    Example: promptkd data download dtd eurosat --root data
    """

    names: tyro.conf.Positional[tuple[str, ...]]
    """Datasets by name."""
    root: Path
    """The data folder; made if it isn't there."""
    endpoint: str | None = None
    """Another hub, for example a mirror."""
    keep_archive: bool = False
    """Don't delete the archive afterwards."""
    json_: Json = False

    def run(self) -> None:
        """Download one after the other."""
        from promptkd.benchmarks import download

        if not self.names:
            raise DataError("name at least one dataset")
        reports = [
            download(name, self.root, endpoint=self.endpoint, keep_archive=self.keep_archive)
            for name in self.names
        ]
        if self.json_:
            _print([{**asdict(r), "folder": str(r.folder), "usable": r.usable} for r in reports])
        else:
            _print(_check_table(reports))


@dataclass(kw_only=True)
class Data:
    """The paper's datasets on this disk."""

    action: tyro.conf.OmitSubcommandPrefixes[
        Annotated[DataList, tyro.conf.subcommand("list")]
        | Annotated[DataCheck, tyro.conf.subcommand("check")]
        | Annotated[DataDownload, tyro.conf.subcommand("download")]
    ]

    def run(self) -> None:
        """Do what was asked for."""
        self.action.run()


Commands = (
    Annotated[Reproduce, tyro.conf.subcommand("reproduce")]
    | Annotated[Report, tyro.conf.subcommand("report")]
    | Annotated[Convert, tyro.conf.subcommand("convert")]
    | Annotated[Data, tyro.conf.subcommand("data")]
)


def _check_table(reports: list[Any]) -> Any:
    from rich.table import Table

    table = Table("dataset", "train", "val", "test", "missing", "classes", "state")
    for r in reports:
        counts = [str(r.pictures.get(part, "")) for part in ("train", "val", "test")]
        state = (r.note or "usable") if r.usable else "unusable"
        table.add_row(r.title, *counts, str(sum(r.missing.values())), str(r.num_classes), state)
    return table


def _print(result: Any) -> None:
    """A string or table for people, anything else as JSON."""
    import json

    if isinstance(result, dict | list):
        print(json.dumps(result, indent=1, ensure_ascii=False))
    elif isinstance(result, str):
        print(result)
    else:
        from rich.console import Console

        Console().print(result)
