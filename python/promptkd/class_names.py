"""Class names, some with templates and descriptions of their own, and the files that hold them."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from promptkd.errors import DataError

_COLUMNS = ("name", "templates", "descriptions")
_PART = "|"


def plain_name(name: str) -> str:
    """A class name as it stands in a sentence: underscores become blanks."""
    return name.replace("_", " ")


class ClassName(str):
    """A class name with sentences of its own; where they don't matter, the plain string.

    Attributes:
        templates: sentences with "{}" for the name, in place of the general ones.
        descriptions: sentences about the class, read beside those with its name.
    """

    __slots__ = ("descriptions", "templates")
    templates: tuple[str, ...]
    descriptions: tuple[str, ...]

    def __new__(
        cls,
        name: str,
        *,
        templates: str | Iterable[str] = (),
        descriptions: str | Iterable[str] = (),
    ) -> ClassName:
        """Check the sentences.

        Raises:
            DataError: a template without "{}", or a description with it.
        """
        self = super().__new__(cls, name)
        self.templates = _sentences(templates, f"the templates of class '{name}'")
        self.descriptions = _sentences(descriptions, f"the descriptions of class '{name}'")
        for text in self.templates:
            if text.count("{}") != 1:
                raise DataError(
                    f"the template '{text}' of class '{name}' must hold '{{}}' once, for the name; "
                    "a sentence without it is a description"
                )
        for text in self.descriptions:
            if "{}" in text:
                raise DataError(
                    f"the description '{text}' of class '{name}' holds '{{}}'; write the name out, "
                    "or put it among the templates"
                )
        return self


class PublishedNames(tuple[str, ...]):
    """The class names of a published dataset, as they are: some repeat, and labels are places.

    ImageNet's list has "missile" and "sunglasses" twice. Names of one's own must not repeat.
    """

    __slots__ = ()


def check_class_names(names: Sequence[str]) -> tuple[str, ...]:
    """Class names as a tuple; empty and blank names are an error, repeated ones unless published."""
    if isinstance(names, str) or not names:
        raise DataError("class names must be a list with at least one name")
    seen: dict[str, int] = {}
    for row, name in enumerate(names):
        if not isinstance(name, str) or not name.strip():
            raise DataError(f"class name {row + 1} of {len(names)} is empty")
        key = plain_name(name).strip()
        if key in seen and not isinstance(names, PublishedNames):
            raise DataError(
                f"class name '{name}' stands twice (places {seen[key] + 1} and {row + 1})"
            )
        seen[key] = row
    return names if isinstance(names, PublishedNames) else tuple(names)


# --- sentences


def texts_of(name: str) -> tuple[tuple[str, ...], tuple[str, ...]] | None:
    """A name's own templates and descriptions, or None for a plain one."""
    if isinstance(name, ClassName) and (name.templates or name.descriptions):
        return name.templates, name.descriptions
    return None


def texts_as_json(names: Sequence[str]) -> dict[str, dict[str, list[str]]]:
    """{place: {"templates", "descriptions"}} of those names that have some; goes through JSON."""
    found = ((row, texts_of(name)) for row, name in enumerate(names))
    return {
        str(row): {"templates": list(texts[0]), "descriptions": list(texts[1])}
        for row, texts in found
        if texts is not None
    }


def names_from_json(data: Mapping[str, Any]) -> tuple[str, ...]:
    """The names under "class_names" with their texts under "class_texts", if there are any."""
    texts = data.get("class_texts") or {}
    return tuple(
        ClassName(name, **texts[str(row)]) if str(row) in texts else name
        for row, name in enumerate(data["class_names"])
    )


def with_texts_of(name: str, known: str) -> str:
    """`name` as it is written, with the texts of `known`."""
    texts = texts_of(known)
    return name if texts is None else ClassName(name, templates=texts[0], descriptions=texts[1])


def same_names(left: Sequence[str], right: Sequence[str]) -> bool:
    """Whether two lists name the same classes in one order, texts included."""
    return tuple(left) == tuple(right) and texts_as_json(left) == texts_as_json(right)


def identity_of(names: Sequence[str]) -> list[Any]:
    """All that the class vectors take from the names, for JSON; the bare names without texts."""
    texts = texts_as_json(names)
    return [*map(str, names), texts] if texts else list(names)


# --- files


def read_class_names(path: str | os.PathLike[str]) -> tuple[str, ...]:
    """Class names from a file, in its order.

    Args:
        path: a text file with one name a line; a CSV or TSV with the columns `name` and,
            optionally, `templates` and `descriptions`, where "|" parts several in a cell; a JSONL
            file with an object of these keys a line; or a JSON file with a list of such objects
            (or names), or an object {name: [description, …]} or {name: {"templates": […],
            "descriptions": […]}}.

    Raises:
        DataError: it can't be read, or a line of it is wrong; the message names file and line.
    """
    place = Path(path).expanduser()
    try:
        text = place.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"class names can't be read from '{path}': {error}") from error
    kind = place.suffix.lower()
    rows: Iterable[tuple[Any, str]]
    if kind in (".csv", ".tsv"):
        rows = _table(text, place, "\t" if kind == ".tsv" else ",")
    elif kind in (".jsonl", ".json"):
        rows = _json_lines(text, place) if kind == ".jsonl" else _json(text, place)
    else:
        lines = text.splitlines()
        rows = [(t.strip(), f"line {n} of '{place}'") for n, t in enumerate(lines, 1) if t.strip()]
    names = [_entry(row, where) for row, where in rows]
    try:
        return check_class_names(names)
    except DataError as error:
        raise DataError(f"'{place}': {error}") from error


def _table(text: str, path: Path, separator: str) -> Iterator[tuple[Any, str]]:
    table = csv.DictReader(io.StringIO(text, newline=""), delimiter=separator, restkey="more")
    try:
        if "name" not in (table.fieldnames or ()):
            raise DataError(
                f"'{path}' has no column 'name' in its first line; expected name, templates, "
                "descriptions (a file with one name a line and nothing else ends in .txt)"
            )
        for row in table:
            where = f"line {table.line_num} of '{path}'"
            if "more" in row:
                raise DataError(f"{where} has more cells than the first line; quote the commas")
            parts = {key: (row[key] or "").split(_PART) for key in row if key != "name"}
            yield {"name": row["name"], **parts}, where
    except csv.Error as error:
        raise DataError(f"line {table.line_num} of '{path}' is no readable row: {error}") from error


def _json_lines(text: str, path: Path) -> Iterator[tuple[Any, str]]:
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            where = f"line {number} of '{path}'"
            yield _parse(line, where), where


def _json(text: str, path: Path) -> Iterator[tuple[Any, str]]:
    data = _parse(text, f"'{path}'")
    if isinstance(data, dict):
        for name, value in data.items():
            texts = value if isinstance(value, dict) else {"descriptions": value}
            yield {"name": name, **texts}, f"class '{name}' in '{path}'"
    elif isinstance(data, list):
        yield from ((row, f"entry {n} of '{path}'") for n, row in enumerate(data, 1))
    else:
        raise DataError(f"'{path}' must hold a list of classes or an object {{name: …}}")


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise DataError(f"{where} is no JSON: {error}") from error


def _entry(row: Any, where: str) -> str:
    """A name, or one with its texts, from a row of any form."""
    if isinstance(row, str):
        return row.strip()
    if not isinstance(row, dict) or not isinstance(row.get("name"), str):
        raise DataError(f'{where} gives no class name; expected {{"name": …, "descriptions": […]}}')
    odd = sorted(str(key) for key in set(row) - set(_COLUMNS))
    if odd:
        raise DataError(f"{where} has '{odd[0]}', which is none of {', '.join(_COLUMNS)}")
    name = row["name"].strip()
    try:
        made = ClassName(
            name, templates=row.get("templates", ()), descriptions=row.get("descriptions", ())
        )
    except DataError as error:
        raise DataError(f"{where}: {error}") from error
    return name if texts_of(made) is None else made


def _sentences(texts: Any, what: str) -> tuple[str, ...]:
    """Stripped sentences, each once; one alone may come as a string, empty ones are left out."""
    items = [texts] if isinstance(texts, str) else texts
    if not isinstance(items, Iterable) or isinstance(items, bytes | Mapping):
        raise DataError(f"{what} must be a sentence or a list of them, not {texts!r:.60}")
    found = list(items)
    wrong = next((t for t in found if not isinstance(t, str)), None)
    if wrong is not None:
        raise DataError(f"{what} must be sentences, not {wrong!r:.60}")
    return tuple(dict.fromkeys(t.strip() for t in found if t.strip()))
