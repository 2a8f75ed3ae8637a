"""`check` says what is missing; `download` fetches from a stand-in of the hub, and unpacks safely."""

import hashlib
import io
import json
import re
import shutil
import stat
import tarfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import file_download
from promptkd import benchmarks
from promptkd.benchmarks import catalogue, check, download
from promptkd.benchmarks.hub import unpack
from promptkd.benchmarks.layouts import LAYOUTS
from promptkd.errors import DataError

SEED = 9
REPOSITORY = "someone/some_datasets"
COMMIT = "a" * 40


# ---------------------------------------------------------------- check
@pytest.fixture
def root(tree: Any, tmp_path: Path) -> Path:
    """A data folder with three datasets, one of them a test set."""
    folder = tmp_path / "data"
    for name in ("DescribableTextures", "FGVCAircraft", "ImageNetR"):
        shutil.copytree(tree(SEED, name), folder, dirs_exist_ok=True)
    return folder


def test_check_counts_what_is_there_and_what_is_missing(root: Path) -> None:
    data = benchmarks.load("dtd", root)
    gone = [Path(data.train[0].path), Path(data.train[3].path), Path(data.test[1].path)]
    for path in gone:
        path.unlink()
    reports = {r.key: r for r in check(root)}
    assert list(reports) == list(benchmarks.PAPER)
    assert {k for k, r in reports.items() if r.present} == {"dtd", "fgvc_aircraft", "imagenet_r"}
    assert {k for k, r in reports.items() if r.usable} == {"fgvc_aircraft", "imagenet_r"}
    dtd = reports["dtd"]
    counts = {"train": len(data.train), "val": len(data.val), "test": len(data.test)}
    assert dtd.pictures == counts
    assert dtd.missing == {"train": 2, "val": 0, "test": 1}
    assert str(dtd.problem).startswith("3 listed pictures are not there")
    assert str(min(gone)) in str(dtd.problem)
    assert dtd.num_classes == len(data.class_names)
    aircraft, variant = reports["fgvc_aircraft"], reports["imagenet_r"]
    assert aircraft.missing == {"train": 0, "val": 0, "test": 0}
    assert list(variant.pictures) == ["test"]
    assert aircraft.note == f"{aircraft.num_classes} classes, the paper's has 100"
    absent = reports["sun397"]
    assert (absent.pictures, absent.num_classes, absent.note) == ({}, 0, None)
    assert "sun397' is not there" in str(absent.problem)
    assert "sun397/split_zhou_SUN397.json" in absent.expected


def test_check_of_one_dataset_of_its_folder_and_of_none(root: Path) -> None:
    assert [r.key for r in check(root, ["DTD", "pets"])] == ["dtd", "oxford_pets"]
    own = check(root / "dtd")
    assert [(r.key, r.usable) for r in own] == [("dtd", True)]
    (root / "dtd" / "split_zhou_DescribableTextures.json").unlink()
    assert "DescribableTextures.json' is missing" in str(check(root, ["dtd"])[0].problem)
    assert check(root, ["dtd"], split_seed=1)[0].usable
    with pytest.raises(DataError, match="is no folder"):
        check(root / "nowhere")
    with pytest.raises(DataError, match="unknown dataset 'mnist'"):
        check(root, ["mnist"])


def test_lists_as_images(root: Path) -> None:
    """Views depend on names: they don't change when the data folder moves."""
    data = benchmarks.load("dtd", root).few_shot(4, 1).novel()
    for part in ("train", "val", "test"):
        images = data.images(part)
        assert [*zip(images.paths, images.labels.tolist(), strict=True)] == list(
            getattr(data, part)
        )
        assert [str(root / name) for name in images.names] == list(images.paths)
        assert images.class_names == data.class_names
    moved = root.rename(root.with_name("moved"))
    there = benchmarks.load("dtd", moved).few_shot(4, 1).novel()
    assert there.images("train").digest() == data.images("train").digest()
    assert len(benchmarks.load("imagenet-r", moved).images("train")) == 0


def test_the_catalogue_tells_what_can_be_read_and_fetched(tree: Any) -> None:
    entries = catalogue()
    assert [e.key for e in entries] == list(benchmarks.PAPER)
    assert [e.key for e in entries if not e.downloadable] == ["imagenet"]
    assert [e.folder for e in entries if e.test_only] == [
        "imagenetv2", "imagenet-sketch", "imagenet-adversarial", "imagenet-rendition",
    ]  # fmt: skip
    for entry in (e for e in entries if e.key in ("dtd", "fgvc_aircraft", "imagenet_r")):
        data = benchmarks.load(entry.title, tree(SEED, benchmarks.PAPER[entry.key].name))
        assert (data.paper.key, data.template) == (entry.key, entry.template)
        assert f"  {entry.folder}/" in entry.expected


# ---------------------------------------------------------------- a stand-in of the hub
class Hub:
    """What the hub answers: the list of files with their checksums, and their bytes by range."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.sha256: dict[str, str] = {}
        self.requests: list[tuple[str, str | None]] = []
        self.break_after: int | None = None
        """Cut the connection after so many bytes of a body, once."""
        self.down = False

    def add(self, name: str, content: bytes) -> None:
        self.files[name] = content
        self.sha256[name] = hashlib.sha256(content).hexdigest()

    def listing(self) -> dict[str, Any]:
        siblings = [
            {
                "rfilename": name,
                "size": len(content),
                "blobId": "b" * 40,
                "lfs": {"sha256": self.sha256[name], "size": len(content), "pointerSize": 130},
            }
            for name, content in self.files.items()
        ]
        return {"id": REPOSITORY, "sha": COMMIT, "siblings": siblings, "tags": [],
                "private": False, "downloads": 0, "likes": 0, "gated": False,
                "disabled": False}  # fmt: skip


def handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None: ...

        def do_GET(self) -> None:
            hub.requests.append((self.path, self.headers.get("Range")))
            path = self.path.partition("?")[0]
            if hub.down:
                self.send_error(503)
            elif path == f"/api/datasets/{REPOSITORY}":
                self.answer(200, json.dumps(hub.listing()).encode())
            elif path.startswith(f"/datasets/{REPOSITORY}/resolve/{COMMIT}/"):
                self.send_response(302)  # the hub sends on to another server
                self.send_header("Location", f"/cdn/{path.partition(COMMIT + '/')[2]}")
                self.send_header("Content-Length", "0")
                self.end_headers()
            elif path.startswith("/cdn/"):
                self.send_part(hub.files[path.removeprefix("/cdn/")])
            else:
                self.send_error(404)

        def send_part(self, content: bytes) -> None:
            asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
            start = int(asked[1]) if asked else 0
            end = len(content)
            headers = {"Content-Range": f"bytes {start}-{end - 1}/{end}"} if asked else {}
            self.answer(206 if asked else 200, content[start:], headers)

        def answer(self, code: int, body: bytes, headers: dict[str, str] | None = None) -> None:
            self.send_response(code)
            for key, value in (headers or {}).items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if hub.break_after is not None and self.path.startswith("/cdn/"):
                body, hub.break_after, hub.down = body[: hub.break_after], None, True
                self.close_connection = True
            self.wfile.write(body)

    return Handler


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Hub, str]]:
    """The stand-in and its address."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(hub))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr(file_download.time, "sleep", lambda _: None)
    # The client writes whole chunks only: 10 MB each, more than these archives have.
    monkeypatch.setattr(file_download.constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    yield hub, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def zipped(folder: Path, top: str) -> bytes:
    """A zip of a dataset's folder, below `top` ("" for none), with what macOS adds."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                file.write(path, f"{top}{path.relative_to(folder)}")
        file.writestr("__MACOSX/._junk", b"x")
    return buffer.getvalue()


def fetch(name: str, root: Path, address: str) -> Any:
    return download(name, root, repository=REPOSITORY, endpoint=address)


@pytest.mark.parametrize(
    ("key", "archive", "top"),
    [("dtd", "dtd.zip", "dtd/"), ("food101", "food101.zip", "food-101/"),
     ("imagenet_a", "imagenet-adversarial.zip", ""), ("oxford_flowers", "x/Flowers102.ZIP", "")],
)  # fmt: skip
def test_download(
    key: str, archive: str, top: str, tree: Any, tmp_path: Path, hub: tuple[Hub, str]
) -> None:
    source = tree(SEED, benchmarks.PAPER[key].name) / LAYOUTS[key].folder
    hub[0].add(archive, zipped(source, top))
    hub[0].add("README.md", b"# data")
    root = tmp_path / "new" / "data"
    report = fetch(key, root, hub[1])
    assert report.usable
    copied = {p.relative_to(root / source.name) for p in (root / source.name).rglob("*")}
    assert copied == {p.relative_to(source) for p in source.rglob("*")}
    assert [p.name for p in root.iterdir()] == [source.name]  # nothing else is left
    asked = len(hub[0].requests)
    assert fetch(key, root, hub[1]) == report
    assert len(hub[0].requests) == asked, "asked the hub for a dataset that is there"


def test_a_broken_download_goes_on_where_it_stopped(
    tree: Any, tmp_path: Path, hub: tuple[Hub, str]
) -> None:
    content = zipped(tree(SEED, "DescribableTextures") / "dtd", "dtd/")
    hub[0].add("dtd.zip", content)
    hub[0].break_after = 5000
    with pytest.raises(DataError, match="call again to go on"):
        fetch("dtd", tmp_path, hub[1])
    part = next(tmp_path.rglob("*.part"))
    assert part.read_bytes() == content[:5000]
    assert not (tmp_path / "dtd").exists()
    hub[0].down = False
    hub[0].requests.clear()
    assert fetch("dtd", tmp_path, hub[1]).usable
    assert [r for path, r in hub[0].requests if path.startswith("/cdn/")] == ["bytes=5000-"]


def test_a_wrong_checksum_is_refused_and_deleted(
    tree: Any, tmp_path: Path, hub: tuple[Hub, str]
) -> None:
    hub[0].add("dtd.zip", zipped(tree(SEED, "DescribableTextures") / "dtd", "dtd/"))
    right = hub[0].sha256["dtd.zip"]
    hub[0].sha256["dtd.zip"] = "0" * 64
    with pytest.raises(DataError, match=f"sha256 {right}, not 0000"):
        fetch("dtd", tmp_path, hub[1])
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


def test_what_is_not_offered_or_in_the_way(tmp_path: Path, hub: tuple[Hub, str]) -> None:
    hub[0].add("dtd.zip", b"no zip")
    wrong = [
        ("imagenet", "get it from image-net.org"),
        ("eurosat", "no archive of EuroSAT; it holds dtd.zip"),
        ("dtd", "can't be unpacked"),
    ]
    for key, message in wrong:
        with pytest.raises(DataError, match=message):
            fetch(key, tmp_path, hub[1])
    (tmp_path / "sun397").mkdir()
    with pytest.raises(DataError, match=r"exists but can't be used .* move it away"):
        fetch("sun397", tmp_path, hub[1])
    hub[0].add("DTD.tar.gz", b"")
    with pytest.raises(DataError, match="more than one archive of DTD"):
        fetch("dtd", tmp_path, hub[1])
    hub[0].down = True
    with pytest.raises(DataError, match="could not ask the hub"):
        fetch("dtd", tmp_path, hub[1])


# ---------------------------------------------------------------- unpacking
def tar(path: Path, mode: str, *entries: tuple[str, str, bytes]) -> None:
    """Entries are (name, kind, content or link target)."""
    kinds = {"file": tarfile.REGTYPE, "folder": tarfile.DIRTYPE, "symlink": tarfile.SYMTYPE,
             "hardlink": tarfile.LNKTYPE, "device": tarfile.CHRTYPE}  # fmt: skip
    with tarfile.open(path, mode) as file:  # type: ignore[call-overload]
        for name, kind, content in entries:
            info = tarfile.TarInfo(name)
            info.type = kinds[kind]
            if kind == "file":
                info.size = len(content)
                file.addfile(info, io.BytesIO(content))
            else:
                info.linkname = content.decode()
                file.addfile(info)


@pytest.mark.parametrize("suffix", ["tar", "tar.gz", "tar.xz"])
def test_tar_files_unpack(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"dtd.{suffix}"
    mode = "w:" + suffix.removeprefix("tar").removeprefix(".")
    tar(path, mode, ("./dtd", "folder", b""), ("./dtd/a.jpg", "file", b"abc"))
    unpack(path, tmp_path / "out")
    assert {p.name: p.is_dir() or p.read_bytes() for p in (tmp_path / "out").rglob("*")} == {
        "dtd": True,
        "a.jpg": b"abc",
    }


def zip_entry(name: str, mode: int = 0) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("fine.jpg", b"x")
            info = zipfile.ZipInfo("placeholder")
            info.filename = name  # as it is: the constructor would tidy it
            info.external_attr = mode << 16
            file.writestr(info, b"../../secret")

    return make


def tar_entry(name: str, kind: str, content: bytes = b"x") -> Callable[[Path], None]:
    return lambda path: tar(path, "w", ("fine.jpg", "file", b"x"), (name, kind, content))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (zip_entry("../out-of-it.jpg"), "leaves the folder"),
        (zip_entry("a/../../out-of-it.jpg"), "leaves the folder"),
        (zip_entry("/tmp/out-of-it.jpg"), "leaves the folder"),
        (zip_entry("..\\out-of-it.jpg"), "leaves the folder"),
        (zip_entry("C:/out-of-it.jpg"), "leaves the folder"),
        (zip_entry("link", stat.S_IFLNK | 0o777), "no plain file"),
        (zip_entry("fine.jpg/inside"), "can't be unpacked"),
        (tar_entry("../out-of-it.jpg", "file"), "leaves the folder"),
        (tar_entry("/tmp/out-of-it.jpg", "file"), "leaves the folder"),
        (tar_entry("link", "symlink", b"/etc/passwd"), "no plain file"),
        (tar_entry("link", "hardlink", b"../secret"), "no plain file"),
        (tar_entry("null", "device"), "no plain file"),
        (lambda p: p.write_bytes(b"<html>not found</html>"), "can't be unpacked"),
        (lambda p: p.write_bytes(b""), "can't be unpacked"),
    ],
)
def test_archives_that_are_refused(make: Callable[[Path], Any], said: str, tmp_path: Path) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    archive = inner / "archive"
    make(archive)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(DataError, match=said) as raised:
        unpack(archive, inner / "out")
    assert str(archive) in str(raised.value)
    assert sorted(tmp_path.rglob("*")) == before, "something was written"


def test_an_archive_larger_than_the_disk_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "dtd.zip"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a", b"x" * 2000)
    used = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: used._replace(free=1000))
    with pytest.raises(DataError, match=r"unpacks to 0\.0 GB, and 0\.0 GB are free"):
        unpack(path, tmp_path / "out")
