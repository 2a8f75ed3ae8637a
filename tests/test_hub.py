"""Students to and from the hub, against a local stand-in for its file layout; the model card."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants, metadata_load
from promptkd import DistillConfig, Student
from promptkd.cli import main
from promptkd.clip import load_clip
from promptkd.errors import CheckpointError, ModelError
from promptkd.hub import fetch
from promptkd.stages.distill import new_student
from promptkd.teacher import zero_shot_teacher
from tiny import CLASSES, Models

COMMIT = "c" * 40
REPOSITORY = "org/trees"


class Hub:
    """Repositories by name, each with its files; what was asked; whose token may write."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.requests: list[str] = []
        self.token: str | None = "right"


def handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None: ...

        def answer(self, code: int, body: bytes = b"", **headers: str) -> None:
            self.send_response(code)
            for key, value in headers.items():
                self.send_header(key.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def json(self, data: Any) -> None:
            self.answer(200, json.dumps(data).encode(), Content_Type="application/json")

        def do_GET(self) -> None:
            hub.requests.append(f"{self.command} {self.path}")
            found = re.fullmatch(r"/([\w.-]+/[\w.-]+)/resolve/([\w.-]+)/(.+)", self.path)
            files = hub.repositories.get(found[1]) if found else None
            if found is None or files is None:
                self.answer(404, X_Error_Code="RepoNotFound")
            elif found[2] not in ("main", "v1", COMMIT):
                self.answer(404, X_Error_Code="RevisionNotFound")
            elif found[3] not in files:
                self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
            else:
                body = files[found[3]]
                etag = hashlib.sha1(body).hexdigest()
                self.answer(200, body, ETag=f'"{etag}"', X_Repo_Commit=COMMIT)

        do_HEAD = do_GET  # noqa: N815 - the server's own name

        def do_POST(self) -> None:
            hub.requests.append(f"POST {self.path}")
            body = self.rfile.read(int(self.headers["Content-Length"]))
            path = self.path.partition("?")[0]
            writes = path.endswith("/repos/create") or "/commit/" in path
            if writes and self.headers.get("Authorization") != f"Bearer {hub.token}":
                self.answer(401)
            elif path == "/api/repos/create":
                asked = json.loads(body)
                name = f"{asked['organization']}/{asked['name']}"
                hub.repositories.setdefault(name, {})
                self.json({"url": f"http://{self.headers['Host']}/{name}"})
            elif path == "/api/validate-yaml":
                self.json({"errors": [], "warnings": []})
            elif "/preupload/" in path:
                files = json.loads(body)["files"]
                mode = {"uploadMode": "regular", "shouldIgnore": False}
                self.json({"files": [{"path": f["path"], **mode} for f in files]})
            else:
                name = path.removeprefix("/api/models/").partition("/commit/")[0]
                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "file":
                        content = base64.b64decode(line["value"]["content"])
                        hub.repositories[name][line["value"]["path"]] = content
                address = f"http://{self.headers['Host']}/{name}/commit/{COMMIT}"
                self.json({"commitUrl": address, "commitOid": COMMIT, "success": True})

    return Handler


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Hub, dict[str, Any]]]:
    """The stand-in, and what to pass to reach it."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(hub))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)  # as CI sets it
    yield hub, {"endpoint": f"http://127.0.0.1:{server.server_port}"}
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(scope="module")
def student(models: Models, photos: Path) -> Student:
    teacher = zero_shot_teacher(load_clip(models.teacher), CLASSES, ("a photo of a {}.",))
    made = new_student(load_clip(models.student), teacher, DistillConfig(prompt_depth=2))
    with torch.no_grad():
        made.train().project(torch.randn(16, 3, 48, 48))
    made.eval().calibrate(photos)
    return made.with_summary(num_images=34, num_holdout=2, steps=8, after={"agreement": 50.0})


def test_there_and_back(
    student: Student, photos: Path, tmp_path: Path, hub: tuple[Hub, dict[str, Any]]
) -> None:
    server, reach = hub
    results = {"test": student.evaluate(photos)}
    url = student.push_to_hub(REPOSITORY, token="right", license="mit", results=results, **reach)
    assert url == f"{reach['endpoint']}/{REPOSITORY}/commit/{COMMIT}"
    names = ["README.md", "backbone.safetensors", "student.json", "student.safetensors"]
    assert sorted(server.repositories[REPOSITORY]) == names
    for name in (REPOSITORY, f"hf://{REPOSITORY}", f"hf://{REPOSITORY}@v1"):
        loaded = Student.from_pretrained(name, cache_dir=tmp_path / "cache", **reach)
        assert torch.equal(loaded.logits(photos), student.logits(photos))
        assert loaded.fingerprint() == student.fingerprint()
    server.requests.clear()
    offline = Student.from_pretrained(
        REPOSITORY,
        cache_dir=tmp_path / "cache",
        local_files_only=True,
        endpoint="http://127.0.0.1:9",
    )
    assert offline.class_names == CLASSES
    assert not server.requests


def test_a_student_without_its_tower_asks_for_no_tower(
    student: Student, models: Models, tmp_path: Path, hub: tuple[Hub, dict[str, Any]]
) -> None:
    server, reach = hub
    student.push_to_hub(REPOSITORY, token="right", include_backbone=False, **reach)
    loaded = Student.from_pretrained(
        REPOSITORY, cache_dir=tmp_path / "cache", backbone=models.student, **reach
    )
    assert loaded.fingerprint() == student.fingerprint()
    assert not [r for r in server.requests if "backbone" in r]


def test_a_folder_is_taken_as_it_is(student: Student, photos: Path, tmp_path: Path) -> None:
    folder = student.save_pretrained(tmp_path / "s")
    loaded = Student.from_pretrained(folder)
    assert torch.equal(loaded.logits(photos), student.logits(photos))


def test_the_card_tells_of_the_run(student: Student, photos: Path, tmp_path: Path) -> None:
    results = {"test": student.evaluate(photos)}
    folder = student.save_pretrained(tmp_path / "s", license="mit", results=results)
    data: Any = metadata_load(folder / "README.md")
    assert (data["license"], data["library_name"]) == ("mit", "promptkd")
    card = (folder / "README.md").read_text(encoding="utf-8")
    for text in (
        "A student for 3 classes",
        ", ".join(CLASSES),
        f"| test: top1 (%) | {results['test'].top1:.4g} |",
        "| unlabelled pictures learned from | 34 |",
        "agreement with the teacher (%), after | 50 |",
        student.fingerprint(),
        student.info.teacher_fingerprint,
        f"| temperature of the probabilities | {student.info.temperature:.4g} |",
        "(a local model)",
    ):
        assert text in card
    assert "local-dir:" not in card  # folders of this machine are nobody's business
    plain = student.with_classes([*CLASSES, "a lemon"]).save_pretrained(tmp_path / "t")
    card = (plain / "README.md").read_text(encoding="utf-8")
    assert metadata_load(plain / "README.md")["license"] == "other"  # type: ignore[index]
    assert "Added after distilling: a lemon." in card


def test_errors_are_one_sentence(
    student: Student,
    tmp_path: Path,
    hub: tuple[Hub, dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server, reach = hub
    cache = {"cache_dir": tmp_path / "cache"}
    with pytest.raises(ModelError, match="'org/gone', or it is private: check the name, or log in"):
        fetch("org/gone", **cache, **reach)
    server.repositories["org/empty"] = {"README.md": b"nothing"}
    with pytest.raises(CheckpointError, match=r"holds no student: it has no student\.json"):
        fetch("hf://org/empty", **cache, **reach)
    with pytest.raises(ModelError, match="no such revision"):
        fetch("org/empty", revision="v9", **cache, **reach)
    with pytest.raises(CheckpointError, match="neither a student's folder nor a repository"):
        fetch("nowhere", **reach)
    with pytest.raises(ModelError, match="the hub can't be reached"):
        fetch("org/gone", endpoint="http://127.0.0.1:9", **cache)
    with pytest.raises(ModelError, match="the hub can't be reached"):
        fetch("org/gone", local_files_only=True, **cache)
    with pytest.raises(CheckpointError, match="'trees' is no repository"):
        student.push_to_hub("trees", **reach)
    monkeypatch.setattr("huggingface_hub.utils._auth._get_token_from_environment", lambda: None)
    monkeypatch.setattr("huggingface_hub.utils._auth._get_token_from_file", lambda: None)
    for token in (None, "wrong", True):
        with pytest.raises(ModelError, match="log in with 'hf auth login', or pass a token"):
            student.push_to_hub(REPOSITORY, token=token, **reach)
    with pytest.raises(ModelError, match=f"the hub can't be reached to send '{REPOSITORY}'"):
        student.push_to_hub(REPOSITORY, token="right", endpoint="http://127.0.0.1:9")
    assert REPOSITORY not in server.repositories


def test_command_line(
    student: Student,
    photos: Path,
    tmp_path: Path,
    hub: tuple[Hub, dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """promptkd push, then evaluate by the hub's address."""
    server, reach = hub
    folder = student.save(tmp_path / "s", include_backbone=True)
    template = "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", reach["endpoint"])
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", reach["endpoint"] + template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", False)
    monkeypatch.setenv("HF_TOKEN", "right")
    flags = ["--labelled", str(photos), "--license", "mit", "--json"]
    assert main(["push", str(folder), REPOSITORY, *flags]) == 0, capsys.readouterr().err
    assert json.loads(capsys.readouterr().out)["commit"].endswith(COMMIT)
    assert b"| test: top1 (%) |" in server.repositories[REPOSITORY]["README.md"]
    flags = [str(photos), "--json"]
    assert main(["evaluate", f"hf://{REPOSITORY}", *flags]) == 0, capsys.readouterr().err
    shown = json.loads(capsys.readouterr().out)
    assert shown["top1"] == pytest.approx(student.evaluate(photos).top1)
