"""Exported students: the same logits in onnxruntime and torch.export, and whose file it is."""

import json
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import tiny_families
import torch
from promptkd import DistillConfig, Student
from promptkd.cli import main
from promptkd.clip import load_clip
from promptkd.errors import CheckpointError, DataError, ModelError
from promptkd.export import (
    TOLERANCES,
    compare,
    export,
    feed_of,
    open_export,
    read_export,
    verify_export,
)
from promptkd.stages.distill import new_student
from promptkd.teacher import zero_shot_teacher
from tiny import CLASSES, Models, model_cfg, save_model
from tiny_families import PROMPTED

TOLERANCE = TOLERANCES["fp32"]
QUICK_FAMILIES = ("eva02", "siglip")


def student_on(backbone: str, models: Models, seed: int = 0) -> Student:
    """Untrained, but with BatchNorm statistics of its own."""
    teacher = zero_shot_teacher(load_clip(models.teacher), CLASSES, ("a photo of a {}.",))
    made = new_student(load_clip(backbone), teacher, DistillConfig(prompt_depth=2, seed=seed))
    height, width = made.clip.preprocess.size
    with torch.no_grad():
        made.train().project(torch.randn(16, 3, height, width))
    made.info = replace(made.info, temperature=1.7)
    return made.eval()


@pytest.fixture(scope="module")
def student(models: Models) -> Student:
    return student_on(models.student, models)


@pytest.fixture(scope="module")
def exported(student: Student, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("exported") / "student.onnx"
    export(student, path)
    return path


def test_onnx_from_bytes_gives_the_students_logits(
    student: Student, exported: Path, photos: Path
) -> None:
    paths = sorted(photos.rglob("*.*"))[:7]
    info = read_export(exported)
    session = onnxruntime.InferenceSession(str(exported), providers=["CPUExecutionProvider"])
    assert [i.shape[1:] for i in session.get_inputs()] == [[48, 48, 3]]
    expected = student.logits(paths)
    for count in (1, 7):  # neither is the batch that the exporter saw
        images = feed_of(student, info, paths[:count]).numpy()
        logits, probabilities = session.run(None, {"images": images})
        np.testing.assert_allclose(logits, expected[:count], rtol=0, atol=TOLERANCE)
        soft = (expected[:count] / 1.7).softmax(dim=-1)
        np.testing.assert_allclose(probabilities, soft, rtol=0, atol=TOLERANCE)
    model = onnx.load(exported)
    assert {o.version for o in model.opset_import if o.domain == ""} == {info.opset} == {20}
    assert (info.class_names, info.size, info.temperature) == (CLASSES, (48, 48), 1.7)
    assert info.fingerprint == student.fingerprint()


@pytest.mark.parametrize(
    "change",
    [
        "quick_gelu",
        "pool_after",
        *(pytest.param(c, marks=pytest.mark.long) for c in ("no_ln_pre", "average")),
    ],
)
def test_every_kind_of_tower_exports(
    change: str, models: Models, photos: Path, tmp_path: Path
) -> None:
    cfg = model_cfg(48, 32, 24)
    vision: dict[str, Any] = cfg["vision_cfg"]
    if change == "quick_gelu":
        cfg["quick_gelu"] = True
    elif change == "no_ln_pre":
        vision["no_ln_pre"] = True
    else:
        vision["pool_type"] = "avg"
        vision["final_ln_after_pool"] = change == "pool_after"
    folder = save_model(tmp_path / "m", cfg, 3, mean=[0.4, 0.4, 0.4], std=[0.3, 0.3, 0.3])
    student = student_on(f"local-dir:{folder}", models)
    export(student, tmp_path / "s.onnx", feed="pixels")
    pixels = student.preprocess(sorted(photos.rglob("*.png"))[:5])
    found = open_export(tmp_path / "s.onnx")(pixels)
    torch.testing.assert_close(found, student.logits(pixels), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    "family",
    [pytest.param(n, marks=() if n in QUICK_FAMILIES else pytest.mark.long) for n in PROMPTED],
)
def test_every_family_exports(
    family: str, models: Models, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their tokenizers need a download: stubs stand in, which an export doesn't touch."""
    monkeypatch.setattr("open_clip.factory.HFTokenizer", tiny_families.StubTokenizer)
    student = student_on(tiny_families.save(tmp_path / "m", family, 3), models)
    paths = sorted(photos.rglob("*.png"))[:5]
    expected = student.logits(paths)
    for name, how in {"s.onnx": "onnx", "s.pt2": "torch-export"}.items():
        info = export(student, tmp_path / name, format=how)  # type: ignore[arg-type]
        found = open_export(tmp_path / name)(feed_of(student, info, paths))
        torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", TOLERANCE), ("fp16", 0.1)])
def test_torch_export(
    student: Student, photos: Path, tmp_path: Path, precision: Any, tolerance: float
) -> None:
    path = tmp_path / "s.pt2"
    export(student, path, format="torch-export", precision=precision)
    info = verify_export(path, student)
    assert (info.format, info.precision, info.opset) == ("torch-export", precision, 0)
    paths = sorted(photos.rglob("*.png"))[:5]
    found = open_export(path)(feed_of(student, info, paths))
    torch.testing.assert_close(found, student.logits(paths), rtol=0, atol=tolerance)


def test_half_and_int8_are_smaller_and_close(
    student: Student, exported: Path, photos: Path, tmp_path: Path
) -> None:
    found = {}
    for name, how in {"fp16": {"precision": "fp16"}, "int8": {"int8": True}}.items():
        info = export(student, tmp_path / f"{name}.onnx", **how)  # type: ignore[arg-type]
        assert info.precision == name
        assert (tmp_path / f"{name}.onnx").stat().st_size < 0.8 * exported.stat().st_size
        found[name] = compare(tmp_path / f"{name}.onnx", student, photos)
        assert found[name].num_images == 36
        assert found[name].accuracy is not None
        assert found[name].agreement > 80
    assert 0 < found["fp16"].max_difference < 0.1
    assert found["fp16"].max_difference < found["int8"].max_difference < 2
    graph = onnx.load(tmp_path / "int8.onnx").graph
    stored = {i.name: i.data_type for i in graph.initializer}
    assert onnx.TensorProto.INT8 in stored.values()
    # Every matrix product with a weight is one of integers; attention's have none.
    plain = {i for n in graph.node if n.op_type in ("MatMul", "Gemm") for i in n.input}
    assert not plain & set(stored)
    kinds = Counter(n.op_type for n in graph.node)
    assert kinds["MatMulInteger"] > kinds["MatMul"] > 0
    before = {i: n for n in graph.node for i in n.output}
    folded = [before[i].op_type for i in plain if i in before and before[i].input[0] in stored]
    assert "Transpose" not in folded


def test_the_comparison_counts(student: Student, exported: Path, photos: Path) -> None:
    found = compare(exported, student, photos)
    expected = student.evaluate(photos)
    assert found.student_accuracy == pytest.approx(expected.top1)
    assert (found.accuracy, found.agreement) == (found.student_accuracy, 100.0)
    assert found.max_difference <= TOLERANCE
    unlabelled = compare(exported, student, photos / CLASSES[0])
    assert (unlabelled.num_images, unlabelled.accuracy) == (12, None)


def test_another_students_file_is_known(
    student: Student, exported: Path, models: Models, tmp_path: Path
) -> None:
    other = student_on(models.student, models, seed=1)
    verify_export(exported, student)
    for stranger in (
        other,
        student.with_classes(CLASSES[::-1]),
        student.rename_classes({CLASSES[0]: "x"}),
    ):
        with pytest.raises(CheckpointError, match="was exported from another student: its finger"):
            verify_export(exported, stranger)
    with pytest.raises(DataError, match="was exported from another student"):
        export(other, exported)
    before = exported.read_bytes()
    export(student, exported)  # its own file may be written again
    assert len(exported.read_bytes()) == len(before)


def test_settings_that_do_not_go_together(
    student: Student, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DataError, match=r"must end in \.onnx"):
        export(student, tmp_path / "s.pt")
    with pytest.raises(DataError, match="int8 weights are for"):
        export(student, tmp_path / "s.onnx", int8=True, precision="fp16")
    (tmp_path / "s.onnx").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="is damaged or was not exported"):
        read_export(tmp_path / "s.onnx")
    (tmp_path / "s.pt2").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="is damaged or was not exported"):
        read_export(tmp_path / "s.pt2")
    with pytest.raises(CheckpointError, match="is no file"):
        read_export(tmp_path / "gone.onnx")
    foreign = onnx.helper.make_model(onnx.helper.make_graph([], "empty", [], []))
    onnx.save_model(foreign, tmp_path / "foreign.onnx")
    with pytest.raises(CheckpointError, match="was not exported by promptkd"):
        read_export(tmp_path / "foreign.onnx")
    monkeypatch.setattr("promptkd.export._PROTOBUF_BYTES", 1000)
    with pytest.raises(ModelError, match="more than an ONNX file may hold"):
        export(student, tmp_path / "large.onnx")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"needs onnx, .*pip install 'promptkd\[export\]'"):
        export(student, tmp_path / "t.onnx")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["foreign.onnx", "s.onnx", "s.pt2"]


def test_a_file_with_other_logits_is_not_kept(
    student: Student, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TOLERANCES, "fp32", -1.0)
    with pytest.raises(CheckpointError, match="gives logits that differ by"):
        export(student, tmp_path / "s.pt2", format="torch-export")
    assert not list(tmp_path.iterdir())


def test_command_line(
    student: Student, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = student.save(tmp_path / "s", include_backbone=True)
    flags = ["--pictures", str(photos), "--int8"]
    assert main(["export", str(folder), *flags]) == 0
    shown = capsys.readouterr().out
    assert "onnx opset 20, int8, takes uint8" in shown
    assert "on 36 pictures: logits differ by at most" in shown
    assert "accuracy" in shown
    assert main(["export", str(folder), "--verify", str(folder / "student.onnx"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["fingerprint"] == student.fingerprint()
    assert main(["export", str(folder), "--int8", "--output", str(tmp_path / "t.onnx")]) == 1
    assert "name --pictures to measure it on" in capsys.readouterr().err
    assert main(["classes", "remove", str(folder), CLASSES[0]]) == 0
    assert main(["export", str(folder), "--verify", str(folder / "student.onnx")]) == 1
    assert "was exported from another student" in capsys.readouterr().err
    assert "onnxruntime" in sys.modules


@pytest.mark.long
def test_the_demos_student_on_real_pictures(tmp_path: Path) -> None:
    """The demo's own models and drawings, every way to export."""
    from promptkd.data.sources import labelled, read_split
    from promptkd.demo import DATA

    split = read_split(DATA / "split.json")
    names = sorted({*split.base, *split.novel})
    teacher = zero_shot_teacher(
        load_clip(f"local-dir:{DATA / 'teacher'}"), names, ("a photo of a {}.",)
    )
    made = new_student(load_clip(f"local-dir:{DATA / 'student'}"), teacher, DistillConfig())
    test = labelled(DATA / "images", names, part="test").select(range(0, 598, 10))
    with torch.no_grad():
        made.train().project(made.preprocess(list(test.paths)))
    student = made.eval()
    for feed in ("uint8", "pixels"):
        for name in (f"{feed}.onnx", f"{feed}.pt2"):
            how: Any = {"feed": feed, "format": "onnx" if name[-1] == "x" else "torch-export"}
            export(student, tmp_path / name, **how)
            found = compare(tmp_path / name, student, test)
            assert found.num_images == 60
            assert found.max_difference <= TOLERANCE
