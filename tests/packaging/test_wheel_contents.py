"""What is in the wheel, the sdist, and the wheel built from the sdist."""

import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from building import ROOT, members
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

pytestmark = pytest.mark.long

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
VERSION = tomllib.loads((ROOT / "rust/Cargo.toml").read_text(encoding="utf-8"))["package"][
    "version"
]
# Named one by one, so that a mistake in `expected_package` can't lose them.
MUST = [
    "promptkd/__init__.py",
    "promptkd/_rust.abi3.so",
    "promptkd/_rust.pyi",
    "promptkd/py.typed",
    "promptkd/stages/distill.py",
    "promptkd/kernels/__init__.py",
    "promptkd/kernels/op.py",
    "promptkd/demo_data/split.json",
    "promptkd/demo_data/LICENSES_images.md",
    "promptkd/demo_data/LICENSES_checkpoints.md",
    "promptkd/demo_data/teacher/open_clip_model.safetensors",
    "promptkd/demo_data/student/open_clip_model.safetensors",
    f"promptkd-{VERSION}.dist-info/licenses/LICENSE",
]


def sources(checkout: Path, *folders: str) -> set[str]:
    """Files under some folders of the copied checkout; a link is not followed."""
    found = {path for folder in folders for path in (checkout / folder).rglob("*")}
    links = [path for path in found if path.is_symlink()]
    inside = {path for path in found if path.is_file() and path.suffix not in (".so", ".pyc")}
    assert not any(path.is_relative_to(link) for path in inside for link in links)
    return {path.relative_to(checkout).as_posix() for path in inside}


def expected_package(checkout: Path) -> set[str]:
    """Every file of the package in the checkout, the kernels by their real files."""
    package = {name.removeprefix("python/") for name in sources(checkout, "python")}
    kernels = {f"promptkd/{name}" for name in sources(checkout, "kernels")}
    return package | kernels | {"promptkd/_rust.abi3.so"}


@pytest.fixture(params=["wheel", "wheel_from_sdist"])
def built(request: pytest.FixtureRequest) -> Path:
    """Either wheel: both have to hold the same."""
    found: Path = request.getfixturevalue(request.param)
    return found


def test_wheel_holds_the_package_and_nothing_else(built: Path, checkout: Path) -> None:
    inside = members(built)
    assert [name for name in MUST if name not in inside] == []
    package = {name for name in inside if name.startswith("promptkd/")}
    assert package == expected_package(checkout)
    assert {name for name in inside - package if ".dist-info/" not in name} == set()
    with zipfile.ZipFile(built) as archive:
        pictures = [n for n in inside if n.startswith("promptkd/demo_data/images/")]
        assert len(pictures) > 1000
        for name in MUST:
            empty = archive.getinfo(name).file_size == 0
            assert empty == name.endswith("py.typed"), f"{name} is empty"
        # A link that came along as its own text would be a kernel of one line.
        assert "torch" in archive.read("promptkd/kernels/op.py").decode()


def test_wheel_says_what_it_is(built: Path) -> None:
    name, version, python, abi, platform = built.stem.split("-")
    assert (name, version, python, abi) == ("promptkd", VERSION, "cp311", "abi3")
    assert platform != "any"
    with zipfile.ZipFile(built) as archive:
        info = f"promptkd-{VERSION}.dist-info"
        metadata = Parser().parsestr(archive.read(f"{info}/METADATA").decode())
        scripts = archive.read(f"{info}/entry_points.txt").decode()
        licence = archive.read(f"{info}/licenses/LICENSE").decode()
    assert metadata["Requires-Python"] == PYPROJECT["project"]["requires-python"]
    assert metadata["License-Expression"] == "MIT"
    assert "MIT" in licence
    assert "promptkd.distill" in str(metadata.get_payload())  # the README
    assert "promptkd=promptkd.cli:main" in scripts.replace(" ", "")
    declared = {
        canonicalize_name(Requirement(r).name) for r in PYPROJECT["project"]["dependencies"]
    }
    required = {Requirement(r) for r in metadata.get_all("Requires-Dist") or []}
    plain = {canonicalize_name(r.name) for r in required if "extra" not in str(r.marker)}
    assert plain == declared
    assert set(metadata.get_all("Provides-Extra") or []) == set(
        PYPROJECT["project"]["optional-dependencies"]
    )


def test_sdist_holds_the_sources(sdist: Path, checkout: Path) -> None:
    inside = members(sdist)
    wanted = sources(checkout, "python", "kernels", "rust/src", "rust/shim")
    wanted |= {f"python/promptkd/{name}" for name in sources(checkout, "kernels")}
    wanted |= {"pyproject.toml", "README.md", "LICENSE", "PKG-INFO"}
    wanted |= {"rust/Cargo.toml", "rust/Cargo.lock", "rust/build.rs"}
    assert wanted - inside == set()
    assert [name for name in inside if name.endswith((".so", ".pyc")) or "/target/" in name] == []
