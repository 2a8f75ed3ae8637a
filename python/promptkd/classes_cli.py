"""Verbs about a student's classes: promptkd classes list | add | remove | rename."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from promptkd.errors import DataError

if TYPE_CHECKING:
    from promptkd.classes import ClassList

Json = Annotated[bool, tyro.conf.arg(name="json", help="Print the result as JSON on stdout.")]
Output = Annotated[
    Path | None, tyro.conf.arg(help="Folder for the new student; default: change this one.")
]


@dataclass(kw_only=True)
class List:
    """Print the classes of a student in the order of its logits.

    Example: promptkd classes list student
    """

    student: tyro.conf.Positional[Path]
    """A student folder."""
    json_: Json = False

    def run(self) -> None:
        """Print them, one a line."""
        from promptkd.classes import read_classes

        classes = read_classes(self.student)
        if self.json_:
            print(json.dumps(_facts(self.student, classes), indent=1, ensure_ascii=False))
        else:
            print("\n".join(classes.names))


@dataclass(kw_only=True)
class Add:
    """Teach a student new class names, without training.

    Their vectors come from the teacher's text prompts, which the student holds, and the text tower
    of its CLIP.

    Example: promptkd classes add student 'silver birch' larch
    """

    student: tyro.conf.Positional[Path]
    """A student folder."""
    names: tyro.conf.Positional[tuple[str, ...]] = ()
    """The new names."""
    classes: Path | None = None
    """A file of new names, as for 'promptkd distill'."""
    teacher: str | None = None
    """The teacher's folder, or the place of its CLIP, when that is not found by its stored name."""
    output: Output = None
    json_: Json = False

    def run(self) -> None:
        """Write the student."""
        from promptkd.class_names import read_class_names

        names = (*self.names, *(read_class_names(self.classes) if self.classes else ()))
        if not names:
            raise DataError("name at least one class to add")
        _edit(
            self.student,
            self.output,
            lambda old: old.select((*old.names, *names), self.teacher),
            self.json_,
        )


@dataclass(kw_only=True)
class Remove:
    """Take classes out of a student; the others keep their vectors and order.

    Example: promptkd classes remove student larch
    """

    student: tyro.conf.Positional[Path]
    """A student folder."""
    names: tyro.conf.Positional[tuple[str, ...]]
    """The names to take out."""
    output: Output = None
    json_: Json = False

    def run(self) -> None:
        """Write the student."""
        if not self.names:
            raise DataError("name at least one class to remove")
        _edit(self.student, self.output, lambda old: old.without(self.names), self.json_)


@dataclass(kw_only=True)
class Rename:
    """Give a class another name; its vector stays.

    Example: promptkd classes rename student larch 'European larch'
    """

    student: tyro.conf.Positional[Path]
    """A student folder."""
    old: tyro.conf.Positional[str]
    """The name it has."""
    new: tyro.conf.Positional[str]
    """The name it is to have."""
    output: Output = None
    json_: Json = False

    def run(self) -> None:
        """Write the student."""
        _edit(self.student, self.output, lambda old: old.renamed({self.old: self.new}), self.json_)


@dataclass(kw_only=True)
class Classes:
    """Edit what a student tells apart, after training."""

    action: tyro.conf.OmitSubcommandPrefixes[
        Annotated[List, tyro.conf.subcommand("list")]
        | Annotated[Add, tyro.conf.subcommand("add")]
        | Annotated[Remove, tyro.conf.subcommand("remove")]
        | Annotated[Rename, tyro.conf.subcommand("rename")]
    ]

    def run(self) -> None:
        """Do what was asked for."""
        self.action.run()


def _edit(
    student: Path,
    output: Path | None,
    edit: Callable[[ClassList], ClassList],
    as_json: bool,
) -> None:
    """Write the edited student and say what it knows now."""
    from promptkd.classes import edit_folder

    place = student if output is None else output
    classes = edit_folder(student, edit, output)
    if as_json:
        print(json.dumps(_facts(place, classes), indent=1, ensure_ascii=False))
    else:
        print(f"student of {len(classes.names)} classes in '{place}'")


def _facts(place: Path, classes: ClassList) -> dict[str, Any]:
    return {"student": str(place), "classes": classes.names, "added": classes.added}
