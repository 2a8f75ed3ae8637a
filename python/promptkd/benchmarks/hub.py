"""`promptkd data download`: a dataset's archive from the Hugging Face hub, unpacked with care.

The archive goes to a hidden folder beside the datasets and is continued there after a break; its
size and sha256 are compared with the hub's; it is unpacked aside and moved into place whole.
"""

from __future__ import annotations

import hashlib
import logging
import lzma
import re
import shutil
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

from promptkd.benchmarks.layouts import LAYOUTS
from promptkd.benchmarks.paper import find
from promptkd.benchmarks.presence import DatasetReport, check
from promptkd.errors import DataError

REPOSITORY = "zhengli97/prompt_learning_dataset"
"""The dataset repository that the official README names: all but ImageNet."""

_STAGING = ".promptkd-download"
_SUFFIX = re.compile(r"\.(zip|tar|tar\.gz|tgz|tar\.xz|tar\.bz2)$", re.IGNORECASE)
_CHUNK = 1 << 20
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Remote:
    """One file of the hub's repository."""

    name: str
    commit: str
    size: int | None
    sha256: str | None


def download(
    name: str,
    root: str | Path,
    *,
    repository: str = REPOSITORY,
    endpoint: str | None = None,
    keep_archive: bool = False,
) -> DatasetReport:
    """Fetch one dataset into the data folder, and check it.

    A dataset that is there and usable is left alone. A broken download is continued by
    calling again.

    Args:
        name: key, official name, title or alias.
        root: the data folder; made if it isn't there.
        repository: dataset repository on the hub, one archive a dataset.
        endpoint: another hub, e.g. a mirror.
        keep_archive: don't delete the archive afterwards.

    Raises:
        DataError: the dataset isn't offered there, the download or its checksum failed, the
            archive is not what it should be, or the folder exists with something else in it.
    """
    paper = find(name)
    layout = LAYOUTS[paper.key]
    root = Path(root).expanduser().absolute()
    root.mkdir(parents=True, exist_ok=True)
    target = root / layout.folder
    if target.exists():
        report = check(root, [paper.key])[0]
        if report.usable:
            return report
        raise DataError(
            f"'{target}' exists but can't be used ({report.problem}); move it away to download "
            f"{paper.title} again"
        )
    if paper.key == "imagenet":
        raise DataError(
            "ImageNet can't be downloaded here; get it from image-net.org and lay it out as\n"
            + layout.describe()
        )
    staging = root / _STAGING / paper.key
    staging.mkdir(parents=True, exist_ok=True)
    remote = _find_archive(paper.key, repository, endpoint)
    archive = _fetch(remote, staging, repository, endpoint)
    unpacked = staging / "unpacked"
    shutil.rmtree(unpacked, ignore_errors=True)
    unpack(archive, unpacked)
    _dataset_folder(unpacked, layout.folder).rename(target)
    shutil.rmtree(unpacked, ignore_errors=True)
    if not keep_archive:
        shutil.rmtree(staging)
        if not any(staging.parent.iterdir()):
            staging.parent.rmdir()
    return check(root, [paper.key])[0]


def _dataset_folder(unpacked: Path, folder: str) -> Path:
    """The dataset inside an unpacked archive: in its own folder, or all of it."""
    entries = [p for p in unpacked.iterdir() if not p.name.startswith(".")]
    if len(entries) == 1 and entries[0].is_dir() and _plain(entries[0].name) == _plain(folder):
        return entries[0]
    return unpacked


# ---------------------------------------------------------------- the hub
def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _find_archive(key: str, repository: str, endpoint: str | None) -> _Remote:
    """The one archive of the repository whose name is the dataset's."""
    from huggingface_hub import HfApi

    paper, layout = find(key), LAYOUTS[key]
    with _hub_errors(f"ask the hub for '{repository}'"):
        info = HfApi(endpoint=endpoint).dataset_info(repository, files_metadata=True)
    files = {s.rfilename: s for s in info.siblings or ()}
    known = {_plain(n) for n in (key, layout.folder, paper.name, paper.title, *paper.aliases)}
    found = [
        f
        for f in files
        if _SUFFIX.search(f) and _plain(_SUFFIX.sub("", PurePosixPath(f).name)) in known
    ]
    if len(found) != 1:
        raise DataError(
            f"'{repository}' has {'no' if not found else 'more than one'} archive of "
            f"{paper.title}; it holds {', '.join(sorted(files)) or 'nothing'}"
        )
    sibling = files[found[0]]
    lfs: Any = sibling.lfs
    return _Remote(
        name=found[0],
        commit=str(info.sha),
        size=sibling.size,
        sha256=lfs.sha256 if lfs is not None else None,
    )


def _fetch(remote: _Remote, staging: Path, repository: str, endpoint: str | None) -> Path:
    """Download into `staging`, going on where an earlier call stopped, and verify."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.file_download import http_get

    # Named by its content, so that parts of two versions are never joined.
    stem = remote.sha256 or remote.commit
    done = staging / f"{stem}{_suffix(remote.name)}"
    if done.is_file():
        return done
    part = staging / f"{stem}.part"
    url = hf_hub_url(
        repository, remote.name, repo_type="dataset", revision=remote.commit, endpoint=endpoint
    )
    what = f"download '{remote.name}' (what came so far is kept; call again to go on)"
    with _hub_errors(what), part.open("ab") as file:
        have = file.tell()
        if remote.size is not None and have > remote.size:
            have = file.truncate(0)
        if remote.size is None or have < remote.size:
            http_get(url, file, resume_size=have, expected_size=remote.size)
    _verify(part, remote)
    return part.rename(done)


def _suffix(name: str) -> str:
    match = _SUFFIX.search(name)
    return match[0].lower() if match else ""


def _verify(part: Path, remote: _Remote) -> None:
    """Compare size and sha256 with the hub's; a wrong file is deleted."""
    size = part.stat().st_size
    problem = f"{size} bytes, not {remote.size}" if remote.size not in (None, size) else None
    if problem is None and remote.sha256 is not None:
        with part.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != remote.sha256:
            problem = f"sha256 {digest}, not {remote.sha256}"
    if problem is not None:
        part.unlink()
        raise DataError(f"'{remote.name}' came damaged: {problem}; it was deleted, call again")
    if remote.sha256 is None:
        _log.warning("the hub gives no sha256 of '%s'; only its size was compared", remote.name)


@contextmanager
def _hub_errors(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # the hub's client raises those of several HTTP libraries
        reason = str(error).strip().splitlines()
        raise DataError(
            f"could not {what}: {type(error).__name__}{': ' + reason[0] if reason else ''}"
        ) from error


# ---------------------------------------------------------------- unpacking
def unpack(archive: Path, folder: Path) -> None:
    """Unpack a zip or tar file into a folder that is made for it, whole or not at all.

    Files and folders only: an archive with a link, a device, or a path that leaves the folder
    is refused before anything is written. macOS's own entries are skipped.

    Raises:
        DataError: the archive is refused, damaged, or larger than the free space.
    """
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        with _members(archive) as (members, read):
            files = {name: m for m in members if (name := _safe(archive, m)) is not None}
            total, free = sum(m.size for m in files.values()), shutil.disk_usage(partial).free
            if total > free:
                raise DataError(
                    f"'{archive}' unpacks to {total / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free"
                )
            for name, member in files.items():
                path = partial / name
                path.parent.mkdir(parents=True, exist_ok=True)
                with read(member) as source, path.open("xb") as target:
                    shutil.copyfileobj(source, target, _CHUNK)
        partial.rename(folder)
    except (zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, struct.error,
            EOFError, OSError, RuntimeError, ValueError) as error:  # fmt: skip
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"'{archive}' can't be unpacked: {type(error).__name__}: {error}"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@dataclass(frozen=True, slots=True)
class _Member:
    """One entry of either kind of archive."""

    name: str
    kind: str
    """"file", "folder" or "special"."""
    size: int
    inner: Any


def _safe(archive: Path, member: _Member) -> str | None:
    """The entry's path inside the folder, None to skip it."""
    path = PurePosixPath(member.name)
    if path.is_absolute() or ".." in path.parts or re.search(r"[\\\0]|^\w:", member.name):
        raise DataError(f"'{archive}' is refused: its entry '{member.name}' leaves the folder")
    if member.kind == "special":
        raise DataError(f"'{archive}' is refused: its entry '{member.name}' is no plain file")
    junk = "__MACOSX" in path.parts or path.name.startswith("._")
    return None if member.kind == "folder" or junk or not path.parts else str(path)


@contextmanager
def _members(archive: Path) -> Iterator[tuple[list[_Member], Any]]:
    """Entries of a zip or tar file and the function that opens one."""
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as zipped:
            yield [_zip_member(info) for info in zipped.infolist()], lambda m: zipped.open(m.inner)
        return
    with tarfile.open(archive) as tarred:

        def read(member: _Member) -> IO[bytes]:
            file = tarred.extractfile(member.inner)
            if file is None:
                raise DataError(f"'{archive}' has no content for '{member.name}'")
            return file

        yield [_tar_member(info) for info in tarred.getmembers()], read


def _zip_member(info: zipfile.ZipInfo) -> _Member:
    mode = info.external_attr >> 16
    kind = "folder" if info.is_dir() else "file"
    if stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR):
        kind = "special"
    return _Member(info.filename, kind, info.file_size, info)


def _tar_member(info: tarfile.TarInfo) -> _Member:
    kind = "file" if info.isfile() else "folder" if info.isdir() else "special"
    return _Member(info.name, kind, info.size, info)
