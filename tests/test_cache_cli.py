"""The verbs of `promptkd cache`."""

import json
from pathlib import Path

import pytest
from promptkd.cli import main
from tiny import CLASSES, Models


def test_every_verb(
    models: Models, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*args: object) -> tuple[int, str]:
        code = main(["cache", *map(str, args)])
        return code, capsys.readouterr().out

    names = tmp_path / "names.txt"
    names.write_text("\n".join(CLASSES))
    guide = ["--teacher", models.teacher, "--classes", names, "--device", "cpu"]
    parts = [tmp_path / "p0", tmp_path / "p1"]
    for number, path in enumerate(parts):
        shard = ["--shard", f"{number}/2", "--views", 1]
        code, _ = run("build", photos, "--output", path, "--quiet", *shard, *guide)
        assert code == 0
    cache = tmp_path / "whole"
    code, _ = run("merge", *parts, "--output", cache)
    assert code == 0
    code, text = run("info", cache, "--json")
    facts = json.loads(text)
    assert (code, facts["num_images"], facts["num_views"]) == (0, 36, 1)
    assert (facts["missing_shards"], facts["failed_images"]) == (0, 0)
    code, _ = run("extend", photos, "--cache", cache, "--views", 2, "--quiet", *guide)
    assert code == 0
    code, text = run("verify", cache, "--images", photos, "--json")
    assert (code, json.loads(text)["num_pictures"]) == (0, 36)
    shard = next((cache / "view-001").glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    code, text = run("verify", cache)
    assert code == 1
    assert "view-001/shard-00000.safetensors" in text
