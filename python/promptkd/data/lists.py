"""Files that list pictures: text, CSV, TSV, JSONL and Parquet, with a path and perhaps a label each."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from promptkd.errors import DataError

LISTS = (".txt", ".csv", ".tsv", ".jsonl", ".parquet")
COMPRESSED = (".gz", ".tgz", ".zst", ".bz2", ".xz", ".zip")


class Entry(NamedTuple):
    """A line of a list."""

    path: str
    label: str | None
    where: str
    """Which line of which file, for messages."""


def read_list(path: Path) -> list[Entry]:
    """The entries of a list, by the ending of its name; a text file has a path a line.

    Raises:
        DataError: it can't be read, or a line of it is wrong; the message names file and line.
    """
    kind = path.suffix.lower()
    if kind in COMPRESSED:
        raise DataError(
            f"'{path}' is compressed; unpack it to .tar, or list its pictures in a file"
        )
    if kind == ".parquet":
        return [
            _entry({"path": p, "label": label}, f"row {row} of '{path}'")
            for row, (p, label) in enumerate(read_parquet(path))
        ]
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"'{path}' is no readable list of pictures: {error}") from error
    if kind == ".jsonl":
        return list(_json_lines(text, path))
    if kind in (".csv", ".tsv"):
        return list(_table(text, path, "\t" if kind == ".tsv" else ","))
    lines = enumerate(text.splitlines(), 1)
    return [Entry(t.strip(), None, f"line {n} of '{path}'") for n, t in lines if t.strip()]


def read_parquet(
    path: str | os.PathLike[str], column: str = "path", label: str = "label"
) -> list[tuple[Any, Any]]:
    """Read (path, label) pairs from a Parquet file, through pyarrow; None where there is no label.

    Raises:
        DataError: pyarrow is missing, or the file is no Parquet file or lacks the column.
    """
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise DataError("to read Parquet, install pyarrow ('pip install pyarrow')") from error
    try:
        with ParquetFile(path) as table:
            names = table.schema_arrow.names
            if column not in names:
                raise DataError(f"'{path}': no column '{column}' among {', '.join(names)}")
            columns = [column, label] if label in names else [column]
            data = table.read(columns=columns).to_pydict()
    except (OSError, ArrowException) as error:
        raise DataError(f"'{path}': it can't be read as Parquet: {error}") from error
    paths = data[column]
    return list(zip(paths, data.get(label, [None] * len(paths)), strict=True))


def _json_lines(text: str, path: Path) -> Iterator[Entry]:
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        where = f"line {number} of '{path}'"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{where} is no JSON: {error}") from error
        if not isinstance(row, dict):
            raise DataError(f'{where} is no JSON object; expected {{"path": …, "label": …}}')
        yield _entry(row, where)


def _table(text: str, path: Path, separator: str) -> Iterator[Entry]:
    table = csv.DictReader(io.StringIO(text, newline=""), delimiter=separator)
    try:
        if "path" not in (table.fieldnames or ()):
            raise DataError(
                f"'{path}' has no column 'path' in its first line, but "
                f"{', '.join(table.fieldnames or ()) or 'nothing'}; expected path and, optionally, "
                "label"
            )
        for row in table:
            yield _entry(row, f"line {table.line_num} of '{path}'")
    except csv.Error as error:
        raise DataError(f"line {table.line_num} of '{path}' is no readable row: {error}") from error


def _entry(row: Mapping[Any, Any], where: str) -> Entry:
    path, label = row.get("path"), row.get("label")
    if not isinstance(path, str) or not path.strip():
        raise DataError(f"{where} has no path")
    return Entry(path, None if label is None else str(label), where)
