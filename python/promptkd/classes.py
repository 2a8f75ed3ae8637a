"""The classes of a student, edited after training: a subset, another order, new names."""

from __future__ import annotations

import difflib
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from promptkd.class_names import (
    PublishedNames,
    check_class_names,
    names_from_json,
    plain_name,
    texts_as_json,
    texts_of,
    with_texts_of,
)
from promptkd.class_vectors import TextSide, is_folder_of
from promptkd.clip import Clip, hash_tensors
from promptkd.errors import CheckpointError, DataError
from promptkd.files import BACKBONE_FILE, STUDENT, TEACHER, copy_file, read_folder, write_folder


@dataclass(frozen=True, slots=True, eq=False)
class ClassList:
    """Names, their vectors, and what makes the vectors of other names.

    Attributes:
        names: C names, in the order of the logits.
        vectors: (C, D), unit rows.
        text_side: of the teacher; None where it was not stored.
        added: those of the names that came after distilling.
        regrouped: whether `select` added or took away classes.
    """

    names: tuple[str, ...]
    vectors: Tensor = field(repr=False)
    text_side: TextSide | None
    added: tuple[str, ...] = ()
    regrouped: bool = False

    def select(self, names: Sequence[str], teacher: Any = None) -> ClassList:
        """These classes in this order: known ones keep their vectors, to the bit.

        Args:
            names: what to tell apart from now on; "_" and blanks count as the same. A known name
                that comes with other texts (`ClassName`) than it had is a new one.
            teacher: where the vectors of new names come from: a teacher folder, a `Teacher`, or
                the CLIP (name, path or object) whose text tower the stored prompts belong to;
                default: that CLIP by its stored name.

        Raises:
            DataError: an empty or repeated name, or new names without a text side.
            CheckpointError: another teacher than the one that the student learned from.
            ModelError: the text tower is not to be had.
        """
        rows = self._rows(names)
        new = [name for name, row in zip(names, rows, strict=True) if row is None]
        made = self._vectors_of(new, teacher).to(self.vectors) if new else self.vectors[:0]
        places = iter(range(len(self.names), len(self.names) + len(new)))
        picked = [next(places) if row is None else row for row in rows]
        vectors = torch.cat([self.vectors, made])[picked]
        names = [
            name if row is None else with_texts_of(name, self.names[row])
            for name, row in zip(names, rows, strict=True)
        ]
        late = {*new, *(name for name, row in zip(names, rows, strict=True) if self._late(row))}
        return replace(
            self,
            names=tuple(names),
            vectors=vectors,
            added=tuple(name for name in names if name in late),
            regrouped=self.regrouped or bool(new) or len(names) != len(self.names),
        )

    def without(self, names: Sequence[str]) -> ClassList:
        """All classes but these.

        Raises:
            DataError: a name that is not there, or none left.
        """
        gone = {plain_name(self.names[self._place(name)]) for name in names}
        rest = [name for name in self.names if plain_name(name) not in gone]
        if not rest:
            raise DataError("no class would be left; a student needs at least one")
        return self.select(rest)

    def renamed(self, changes: Mapping[str, str]) -> ClassList:
        """Other names for the same vectors: {old: new}.

        Raises:
            DataError: an old name that is not there, a new one that is empty or taken.
        """
        names = list(self.names)
        for old, new in changes.items():
            place = self._place(old)
            names[place] = with_texts_of(new, self.names[place])
        self._check(names)
        late = {names[row] for row in range(len(names)) if self._late(row)}
        return replace(self, names=tuple(names), added=tuple(n for n in names if n in late))

    def digest(self) -> str:
        """Digest of names and vectors: what belongs together."""
        texts = texts_as_json(self.names)
        key = repr(self.names) + (repr(texts) if texts else "")
        return hash_tensors({"class_vectors": self.vectors}, key)

    def store(self, tensors: dict[str, Tensor], data: dict[str, Any]) -> None:
        """Put the classes into a student folder's tensors and JSON data, in place of others."""
        tensors["class_vectors"] = self.vectors
        side = self.text_side
        if side is not None:
            tensors |= side.tensors()
        data["class_names"] = [str(name) for name in self.names]
        data["class_texts"] = texts_as_json(self.names)
        data["added_classes"] = list(self.added)
        data["classes_digest"] = self.digest()
        data["text_side"] = None if side is None else side.as_json()

    @classmethod
    def stored(cls, tensors: dict[str, Tensor], data: Mapping[str, Any], path: Any) -> ClassList:
        """The classes of a student folder.

        Raises:
            CheckpointError: names and vectors that were not written together.
        """
        side = data.get("text_side")
        try:
            found = cls(
                names_from_json(data),
                tensors["class_vectors"],
                None if side is None else TextSide.read(side, tensors, path),
                tuple(data.get("added_classes", ())),
            )
        except KeyError as error:
            raise CheckpointError(f"'{path}' lacks the part {error} of a student") from error
        if data.get("classes_digest", found.digest()) != found.digest():
            raise CheckpointError(
                f"the {len(found.names)} class names in '{path}' were not written together with its "
                f"{len(found.vectors)} class vectors (edited by hand, or a write was cut short); "
                "restore student.json and student.safetensors, and edit with 'promptkd classes'"
            )
        return found

    # --- names

    def _rows(self, names: Sequence[str]) -> list[int | None]:
        """The place of each name, None where it is new."""
        self._check(names)
        places: dict[str, list[int]] = defaultdict(list)
        for row, name in enumerate(self.names):
            places[plain_name(name)].append(row)
        rows: list[int | None] = []
        for name in names:
            left = places[plain_name(name)]
            known = bool(left) and _same_texts(name, self.names[left[0]])
            rows.append(left.pop(0) if known else None)
        return rows

    def _check(self, names: Sequence[str]) -> None:
        """Names must not repeat, but for those that repeated before (a published list's)."""
        repeats = Counter(map(plain_name, self.names))
        if max(repeats.values()) == 1:
            check_class_names(names)
            return
        check_class_names(PublishedNames(names))
        for name, count in Counter(map(plain_name, names)).items():
            if count > max(1, repeats[name]):
                raise DataError(f"class name '{name}' stands {count} times")

    def _place(self, name: str) -> int:
        for row, known in enumerate(self.names):
            if plain_name(known) == plain_name(name):
                return row
        near = difflib.get_close_matches(name, self.names, n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise DataError(f"the student has no class '{name}' among its {len(self.names)}{hint}")

    def _late(self, row: int | None) -> bool:
        return row is not None and self.names[row] in self.added

    # --- vectors

    def _vectors_of(self, names: list[str], teacher: Any) -> Tensor:
        side = self.text_side
        if teacher is not None and (found := _classes_of(teacher)) is not None:
            theirs, clip = found
            self._check_same(theirs)
            return theirs._vectors_here(names, clip)
        if side is None:
            raise DataError(
                f"'{names[0]}' is new, and the student holds no text side to make its vector; pass "
                "its teacher as teacher (--teacher): the teacher's folder or a Teacher"
            )
        return side.compute(side.load_clip(teacher, device=self.vectors.device), names)

    def _vectors_here(self, names: Sequence[str], clip: Clip | None) -> Tensor:
        """A teacher's vectors: stored ones where it knows the name, else computed."""
        places = {plain_name(name): row for row, name in enumerate(self.names)}
        rows = [places.get(plain_name(name)) for name in names]
        rows = [
            row if row is not None and _same_texts(name, self.names[row]) else None
            for name, row in zip(names, rows, strict=True)
        ]
        new = [name for name, row in zip(names, rows, strict=True) if row is None]
        known = self.vectors[[row for row in rows if row is not None]]
        if not new:
            return known
        side = self.text_side
        assert side is not None
        made = side.compute(clip or side.load_clip(device=self.vectors.device), new).to(known)
        lots = {True: iter(known), False: iter(made)}
        return torch.stack([next(lots[row is not None]) for row in rows])

    def _check_same(self, teacher: ClassList) -> None:
        """The vectors must be made by what made the student's own."""
        mine, theirs = self.text_side, teacher.text_side
        assert theirs is not None
        if mine is not None:
            same = mine.fingerprint() == theirs.fingerprint()
        else:
            rows = {plain_name(name): row for row, name in enumerate(teacher.names)}
            both = [
                (r, rows[plain_name(n)]) for r, n in enumerate(self.names) if plain_name(n) in rows
            ]
            ours = self.vectors[[r for r, _ in both]]
            same = bool(both) and torch.equal(ours, teacher.vectors[[r for _, r in both]].to(ours))
        if not same:
            raise CheckpointError(
                f"this teacher (on '{theirs.model}') is not the one whose class vectors the student "
                "learned; new vectors of another teacher would mean nothing to it"
            )


def _same_texts(asked: str, known: str) -> bool:
    """Whether a name is asked for as it is known: a bare one takes whatever texts it has."""
    return texts_of(asked) in (None, texts_of(known))


def read_classes(path: str | os.PathLike[str]) -> ClassList:
    """The classes of a student folder; its image tower is not opened.

    Raises:
        CheckpointError: no student folder, or a damaged one.
    """
    tensors, data = read_folder(path, "student", STUDENT)
    return ClassList.stored(tensors, data, path)


def edit_folder(
    path: str | os.PathLike[str],
    edit: Callable[[ClassList], ClassList],
    output: str | os.PathLike[str] | None = None,
) -> ClassList:
    """Write a student folder with other classes; its image tower is not opened.

    Args:
        path: the student's folder.
        edit: gives the new classes for those that are there.
        output: where the new student goes; default: in place of the old one.

    Returns:
        The new classes.

    Raises:
        CheckpointError: no student folder, a damaged one, or an output that holds a student.
    """
    source = Path(path).expanduser()
    target = source if output is None else Path(output).expanduser()
    tensors, data = read_folder(source, "student", STUDENT)
    if target.resolve() != source.resolve() and (target / "student.json").exists():
        raise CheckpointError(f"'{target}' already holds a student; give another output folder")
    classes = edit(ClassList.stored(tensors, data, path))
    classes.store(tensors, data)
    if classes.regrouped and data.get("calibration") is not None:
        data["calibration"]["threshold"] = None  # it held for the old classes
    if data["embedded"] and target.resolve() != source.resolve():
        copy_file(source / BACKBONE_FILE, target / BACKBONE_FILE)
    write_folder(target, "student", tensors, data)
    return classes


def _classes_of(teacher: Any) -> tuple[ClassList, Clip | None] | None:
    """A teacher's classes, and its CLIP if it has a text tower loaded; None for a CLIP alone."""
    if is_folder_of("teacher", teacher):
        tensors, data = read_folder(teacher, "teacher", TEACHER)
        side = TextSide.read(data, tensors, teacher)
        return ClassList(names_from_json(data), tensors["class_vectors"], side), None
    if hasattr(teacher, "text_side"):
        classes = ClassList(teacher.class_names, teacher.class_vectors, teacher.text_side())
        return classes, None if teacher.clip.text is None else teacher.clip
    return None
