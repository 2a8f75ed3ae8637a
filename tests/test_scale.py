"""promptkd plan, doctor and bench: what they say against what is there."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from promptkd import DistillConfig
from promptkd.cache import build_cache
from promptkd.cli import main
from promptkd.clip import load_clip
from promptkd.data.sources import labelled, unlabelled
from promptkd.doctor import advise, decoder_level, diagnose, look_at_data, look_at_machine
from promptkd.plan import Scale, make_plan
from promptkd.teacher import zero_shot_teacher
from promptkd.throughput import Throughput
from safetensors import safe_open
from tiny import CLASSES, Models, make_photos

SCALE = Scale(
    images=1e8,
    picture_bytes=100e3,
    views=4,
    epochs=4,
    num_classes=1000,
    feature_width=768,
    student_width=512,
    batch_size=4096,
    content="features",
    shard_rows=65536,
    jobs=64,
    ranks=8,
    label_speed=1000,
    train_speed=2000,
    link=1.25e9,
)
SPEEDS = Throughput(
    decode=1000,
    decode_both=500,
    decode_teacher=800,
    teacher=10,
    student=100,
    loss=1e5,
    cache_fill=400,
    cache_read=1e6,
    batch_size=64,
    num_classes=100,
    feature_width=768,
    picture_bytes=1e5,
    graph_bytes=100_000_000,
    weight_bytes=(10**9, 10**9),
    overlaps=False,
)


# --- plan


def test_plan_multiplies() -> None:
    plan = make_plan(SCALE)
    assert plan.pictures_bytes == pytest.approx(1e13)
    assert plan.label_machine_hours == pytest.approx(1e8 * 5 / 1000 / 3600)
    assert plan.label_hours * 64 == pytest.approx(plan.label_machine_hours)
    assert plan.train_hours == pytest.approx(1e8 * 4 / 2000 / 8 / 3600)
    assert plan.steps == 4e8 // 4096
    assert plan.shards == 5 * 1526
    assert plan.label_read == pytest.approx(1e8)
    double = make_plan(replace(SCALE, ranks=16))
    assert double.train_hours == pytest.approx(plan.train_hours / 2)
    assert make_plan(replace(SCALE, ranks=1)).exchange == 0


@pytest.mark.parametrize("content", ["features", "statistics", "logits"])
def test_plan_knows_the_size_of_a_cache(
    models: Models, photos: Path, tmp_path: Path, content: Any
) -> None:
    teacher = zero_shot_teacher(load_clip(models.teacher), CLASSES, ("a {}.",))
    build_cache(teacher, photos, tmp_path, views=2, content=content)
    stored = 0
    for path in tmp_path.glob("view-*/*.safetensors"):
        with safe_open(path, "pt") as file:
            stored += sum(file.get_tensor(k).nbytes for k in file.keys())  # noqa: SIM118
    names = unlabelled(photos).names
    name_bytes = round(sum(len(json.dumps([n])) for n in names) / len(names))
    plan = make_plan(
        replace(
            SCALE,
            images=36,
            views=2,
            num_classes=3,
            feature_width=40,
            content=content,
            name_bytes=name_bytes,
        )
    )
    assert plan.cache_bytes == pytest.approx(stored, rel=0.02)


@pytest.mark.parametrize(
    ("changes", "warning"),
    [
        ({"shard_rows": 1024}, "many files"),
        ({"link": 1e7}, "faster than its link"),
        ({"batch_size": 64, "train_speed": 1e5, "link": 1e8}, "exchanging features"),
        ({}, "takes 26 GB of memory"),
        ({"content": "logits"}, "larger than features"),
        ({"epochs": 2}, "see 2 of 4 views"),
    ],
)
def test_plan_warns(changes: dict[str, Any], warning: str) -> None:
    assert any(warning in text for text in make_plan(replace(SCALE, **changes)).warnings)


# --- doctor


@pytest.fixture
def sick(tmp_path: Path) -> Path:
    """Pictures with all that can be wrong with them."""
    folder = make_photos(tmp_path / "sick", per_class=4)
    (folder / "red_thing" / "03.jpg").write_bytes(b"broken")
    whole = (folder / "red_thing" / "01.jpg").read_bytes()
    (folder / "green thing" / "03.jpg").write_bytes(whole[: len(whole) // 2])
    Image.new("RGB", (9, 200)).save(folder / "blue thing" / "tiny.png")
    return folder


def test_doctor_finds_what_is_wrong(sick: Path, tmp_path: Path) -> None:
    test = make_photos(tmp_path / "test", per_class=2)  # the same pictures again
    Image.new("RGB", (64, 64), "red").save(test / "red_thing" / "00.png")
    found = look_at_data(
        unlabelled(sick),
        48,
        labelled=labelled(sick, [*CLASSES, "nothing"]),
        test=labelled(test, CLASSES),
    )
    assert (found.num_images, found.looked_at) == (13, 13)
    assert found.tiny == ("blue thing/tiny.png",)
    assert sorted(Path(m.split("'")[1]).parent.name for m in found.corrupt) == [
        "green thing",
        "red_thing",
    ]
    assert found.empty_classes == ("nothing",)
    assert {a for a, _ in found.in_train_and_test} == {a for _, a in found.in_train_and_test}
    assert ("red_thing/01.jpg", "red_thing/01.jpg") in found.in_train_and_test
    assert all(a != "red_thing/00.png" for a, _ in found.in_train_and_test)
    assert len(found.warnings()) == 4


def test_doctor_on_healthy_pictures(photos: Path) -> None:
    found = look_at_data(unlabelled(photos), 48, sample=10)
    assert found.looked_at == 9
    assert found.warnings() == []
    machine = look_at_machine(torch.device("cpu"))
    assert machine["decoder"].startswith(decoder_level())
    assert machine["memory_bytes"] > 0
    config = DistillConfig(min_steps=0, epochs=2, batch_size=16)
    assert diagnose(machine, found, config, None).advice is None


def test_advice_fits_memory_and_disk() -> None:
    config = DistillConfig(epochs=10, min_steps=0, views=8, batch_size=64)
    plenty = advise(SPEEDS, 10_000, config, memory=64 * 10**9, disk=10**12)
    assert (plenty.batch_size, plenty.micro_batch) == (64, 0)
    assert (plenty.views, plenty.content) == (8, "features")
    assert plenty.graph_bytes[64] == 64 * SPEEDS.graph_bytes
    assert plenty.hours["train with the teacher"] > plenty.hours["train from a cache"]
    assert plenty.hours["fill a cache"] == pytest.approx(
        10_000 * 9 * (1 / 10 + max(1 / 400, 1 / 800)) / 3600
    )
    little = advise(SPEEDS, 10_000, config, memory=6 * 10**9, disk=10**12)
    assert little.micro_batch == 16
    small_disk = advise(SPEEDS, 10_000, config, memory=64 * 10**9, disk=120 * 10**6)
    assert small_disk.content == "logits"
    assert small_disk.cache_bytes < 60e6
    assert small_disk.views == 8
    assert advise(SPEEDS, 10_000, config, memory=64 * 10**9, disk=80 * 10**6).views < 8


def test_modes_name_their_bottleneck() -> None:
    assert SPEEDS.bottleneck("fill a cache") == "teacher"
    assert SPEEDS.bottleneck("train from a cache") == "student"
    alone = SPEEDS.speed("train from a cache")
    assert alone == pytest.approx(1 / (1 / 1000 + 1 / 1e6 + 1 / 100 + 1 / 1e5))
    assert replace(SPEEDS, overlaps=True).speed("train from a cache") > alone
    slow = replace(SPEEDS, overlaps=True, decode=20)
    assert slow.speed("train from a cache") == pytest.approx(20)
    assert slow.bottleneck("train from a cache") == "decode"


# --- the command line


def run(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    code = main([str(a) for a in args])
    shown = capsys.readouterr()
    return code, shown.out, shown.err


def test_bench_then_plan_then_doctor(
    models: Models, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names, measured = tmp_path / "names.txt", tmp_path / "bench.json"
    names.write_text("\n".join(CLASSES))
    work = [photos, "--teacher", models.teacher, "--student", models.student]
    work += ["--classes", names, "--batch-size", 8, "--seconds", 0.01]
    code, out, err = run(capsys, "bench", *work, "--output", measured)
    assert code == 0, err
    assert out.count("bottleneck: ") == 3
    assert "teacher:" in err
    facts = json.loads(measured.read_text())
    assert facts["num_classes"] == 3
    assert facts["graph_bytes"] > 0
    assert all(facts[part] > 0 for part in ("decode", "teacher", "student", "loss", "cache_read"))
    code, out, err = run(
        capsys, "plan", "--images", "1e8", "--measured", measured, "--jobs", 64, "--json"
    )
    assert code == 0, err
    plan = json.loads(out)
    speed = facts["modes"]["fill a cache"]["pictures_per_second"]
    assert plan["label_hours"] == pytest.approx(1e8 * 5 / speed / 64 / 3600)
    code, out, err = run(capsys, "plan", "--images", "1e8", "--measured", measured)
    assert "100,000,000 pictures, 3 classes" in out
    code, out, err = run(capsys, "doctor", *work, "--json", "--quiet", "--labelled", photos)
    assert code == 0, err
    found = json.loads(out)
    assert found["data"]["num_images"] == 36
    assert found["advice"]["graph_bytes"]["8"] > 0
    assert err == ""
    code, out, err = run(capsys, "doctor", *work, "--quiet")
    assert "student memory" in out


def test_wrong_use_says_the_way_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "plan", "--images", "1e8")
    assert code == 1
    assert "--label-speed" in err
    (tmp_path / "x.json").write_text("{}")
    code, _, err = run(capsys, "plan", "--images", "1e8", "--measured", tmp_path / "x.json")
    assert "is not what 'promptkd bench --output' writes" in err
    code, _, err = run(capsys, "bench", "--seconds", 0)
    assert "--seconds must be positive" in err


@pytest.mark.long
@pytest.mark.parametrize("verb", ["bench", "doctor"])
def test_on_the_demo(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, verb, "--seconds", 0.1, "--quiet")
    assert code == 0, err
    assert "train from a cache" in out
