"""Folders of safetensors and JSON, written whole or not at all, read without trust."""

from __future__ import annotations

import json
import os
import shutil
import socket
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from promptkd.errors import CheckpointError

TEACHER = "promptkd teacher"
STUDENT = "promptkd student"
BACKBONE_FILE = "backbone.safetensors"
"""A student's image tower, where it is stored with it."""


def temporary_for(path: Path) -> Path:
    """A name beside `path` that no other writer uses, on this machine or another."""
    mine = f"{socket.gethostname()}.{os.getpid()}.{threading.get_ident()}"
    return path.with_name(f".{path.name}.{mine}.tmp")


def sweep(folder: Path) -> None:
    """Delete what killed processes of this machine left half written, in `folder` and one below."""
    host = socket.gethostname()
    for path in [*folder.glob(".*.tmp"), *folder.glob("*/.*.tmp")]:
        parts = path.name.removesuffix(".tmp").rsplit(".", 2)
        if len(parts) == 3 and parts[0].endswith(f".{host}") and not _alive(parts[1]):
            path.unlink(missing_ok=True)


def _alive(process: str) -> bool:
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return False
    except (OSError, ValueError):
        return True
    return True


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file so that a kill leaves either the old one or the new one."""
    temporary = temporary_for(path)
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def copy_file(source: Path, target: Path) -> None:
    """Copy a file of any size so that a kill leaves no half of it; folders are made.

    Raises:
        CheckpointError: the source can't be read.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_for(target)
    try:
        shutil.copyfile(source, temporary)
        temporary.replace(target)
    except OSError as error:
        raise CheckpointError(f"'{source}' can't be copied to '{target}': {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, data: Any) -> None:
    """Write JSON, indented, in one step."""
    write_bytes(path, (json.dumps(data, indent=1, ensure_ascii=False) + "\n").encode())


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file in one step."""
    plain = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
    write_bytes(path, save(plain, dict(metadata) if metadata else None))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a safetensors file and its metadata.

    Raises:
        CheckpointError: missing, cut short, or not safetensors.
    """
    try:
        with safe_open(path, "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except FileNotFoundError as error:
        raise CheckpointError(f"'{path}' is missing") from error
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"'{path}' is damaged or no safetensors file: {error}") from error


def write_folder(
    path: str | os.PathLike[str], stem: str, tensors: Mapping[str, Tensor], data: dict[str, Any]
) -> Path:
    """Write `stem`.safetensors and `stem`.json into a folder; the JSON, written last, seals it."""
    folder = Path(path).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / f"{stem}.safetensors", tensors)
    write_json(folder / f"{stem}.json", data)
    return folder


def read_folder(
    path: str | os.PathLike[str], stem: str, kind: str
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `write_folder` wrote.

    Raises:
        CheckpointError: no such folder, another kind of folder, or damaged files.
    """
    folder = Path(path).expanduser()
    sheet = folder / f"{stem}.json"
    if not sheet.is_file():
        raise CheckpointError(f"'{folder}' is no {kind} folder: it holds no {stem}.json")
    try:
        data = json.loads(sheet.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"'{sheet}' is damaged: {error}") from error
    if not isinstance(data, dict) or data.get("kind") != kind:
        raise CheckpointError(f"'{sheet}' does not describe a {kind}")
    return read_tensors(folder / f"{stem}.safetensors")[0], data
