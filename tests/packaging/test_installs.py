"""Installed outside the checkout, it imports, shows its help and does its job."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from building import Environment, new_environment, run

pytestmark = pytest.mark.long

LISTING = """
import json, sys
import torch
before = set(sys.modules)
import promptkd
print(json.dumps({"file": promptkd.__file__, "before": sorted(before),
                  "after": sorted(sys.modules)}))
"""
# Both stages' real code for a few steps, on the embedded models and pictures.
JOB = """
import json, tempfile
from pathlib import Path
import promptkd, promptkd.demo
data = Path(promptkd.__file__).parent / "demo_data"
names = sorted(p.name.replace("_", " ") for p in (data / "images").iterdir())
pictures = sorted((data / "images").rglob("*.png"))[::40]
config = promptkd.DistillConfig(epochs=1, min_steps=0, max_steps=3, batch_size=8, views=1)
student = promptkd.distill(
    pictures, names, teacher=f"local-dir:{data / 'teacher'}", student=f"local-dir:{data / 'student'}",
    config=config, device="cpu",
)
with tempfile.TemporaryDirectory() as folder:
    student.save(folder)
    loaded = promptkd.Student.load(folder, backbone=f"local-dir:{data / 'student'}")
prediction = loaded.predict(str(pictures[0]), top_k=3)
print(json.dumps({"labels": prediction.labels, "sum": sum(loaded.predict(
    str(pictures[0]), top_k=len(names)).probabilities)}))
"""
LOSS = """
import torch
from promptkd.loss import kd_loss, kd_loss_reference
draw = torch.Generator().manual_seed(0)
student, teacher, vectors = (torch.randn(n, 16, generator=draw) for n in (4, 4, 9))
given = dict(student_scale=20.0, teacher_scale=30.0)
loss = kd_loss(student, teacher, vectors, **given)
torch.testing.assert_close(loss, kd_loss_reference(student, teacher, vectors, **given))
print("loss", loss.item() > 0)
"""


@pytest.fixture(scope="module")
def empty(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """An environment with the wheel and what it declares, nothing else.

    pip looks at the declared versions but may fetch nothing.
    """
    made = new_environment(tmp_path_factory.mktemp("empty") / "env")
    made.pip("install", "--quiet", "--no-index", wheel)
    return made


def test_imports_what_it_needs_and_no_more(empty: Environment) -> None:
    found = json.loads(empty.python(LISTING))
    assert Path(found["file"]).is_relative_to(empty.folder)
    brought = set(found["after"]) - set(found["before"])
    assert "promptkd.stages.distill" in brought
    for heavy in ("open_clip", "matplotlib", "timm", "scipy", "tensorboard", "torchvision"):
        assert heavy not in found["after"]
    # torch may import Triton itself; promptkd must not.
    assert "triton" not in brought


def test_does_its_job_with_its_declared_dependencies(empty: Environment) -> None:
    empty.pip("check")
    for absent in ("matplotlib", "pytest", "maturin"):
        found = f"import importlib.util; print(importlib.util.find_spec('{absent}'))"
        assert empty.python(found) == "None"
    done = json.loads(empty.python(JOB, CUDA_VISIBLE_DEVICES="").splitlines()[-1])
    assert len(done["labels"]) == 3
    assert done["sum"] == pytest.approx(1, abs=1e-4)


def test_command_line_and_kernels(empty: Environment) -> None:
    shown = run(empty.bin / "promptkd", "demo", "--help", cwd=empty.folder)
    assert "--seeds" in shown
    assert "--output" in shown
    if sys.platform == "linux":
        inside = empty.python(
            "import promptkd.kernels.op, promptkd.kernels.launch; print(promptkd.kernels.__file__)"
        )
        assert Path(inside).is_relative_to(empty.folder)


def test_wheel_from_sdist_runs(wheel_from_sdist: Path, tmp_path: Path) -> None:
    other = new_environment(tmp_path / "env")
    other.pip("install", "--quiet", "--no-index", wheel_from_sdist)
    found = json.loads(other.python(LISTING))
    assert Path(found["file"]).is_relative_to(other.folder)
    assert other.python(LOSS) == "loss True"


def test_editable_install_sees_the_sources(checkout: Path, tmp_path: Path) -> None:
    """pip install -e: the package, the extension beside it, and the kernels through the link."""
    editable = new_environment(tmp_path / "env")
    editable.pip("install", "--quiet", "--no-deps", "--editable", checkout)
    code = (
        "import promptkd, promptkd._rust, promptkd.kernels as k, os;"
        "print(promptkd.__file__, os.path.realpath(k.__file__), promptkd._rust.__file__, sep='\\n')"
    )
    package, kernels, extension = editable.python(code).splitlines()
    assert Path(package) == checkout / "python/promptkd/__init__.py"
    assert Path(kernels) == (checkout / "kernels/__init__.py").resolve()
    assert Path(extension).is_relative_to(checkout)
    assert editable.python(LOSS) == "loss True"


@pytest.mark.parametrize("lost", ["link", "triton"])
def test_loss_without_kernels(unpacked: Path, tmp_path: Path, lost: str) -> None:
    """Where a checkout made a text file of the link (Windows), or Triton is absent."""
    site = tmp_path / "site"
    shutil.copytree(unpacked, site, ignore=shutil.ignore_patterns("demo_data"))
    code = LOSS
    if lost == "link":
        shutil.rmtree(site / "promptkd/kernels")
        (site / "promptkd/kernels").write_text("../../kernels", encoding="utf-8")
    else:
        code = "import sys; sys.modules['triton'] = None\n" + LOSS
    code += "import promptkd; print(promptkd.__file__)\n"
    shown = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(site)).splitlines()
    assert shown[0] == "loss True"
    assert Path(shown[1]).is_relative_to(site)


def test_the_checks_see_a_failure(tmp_path: Path) -> None:
    """`run` must not swallow one."""
    with pytest.raises(pytest.fail.Exception, match="exit code 3"):
        run(sys.executable, "-c", "raise SystemExit(3)", cwd=tmp_path)
    with pytest.raises(subprocess.SubprocessError):
        subprocess.run([sys.executable, "-c", "raise SystemExit(3)"], check=True)
