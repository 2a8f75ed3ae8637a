"""How the packaging tests build, look into archives and make environments."""

import os
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from dataclasses import dataclass
from importlib.metadata import Distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
MAX_SECONDS = 600


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """The output of a command outside the checkout; its error output when it fails."""
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    # Rust is compiled once for all builds, apart from what the developers' build holds.
    kept |= {"CARGO_TARGET_DIR": str(ROOT / "rust/target/packaging"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=kept | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=MAX_SECONDS,
    )
    if done.returncode != 0:
        line = " ".join(str(part) for part in command)
        pytest.fail(f"{line}\nexit code {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done.stdout


def known_files() -> list[Path]:
    """Files that git tracks or would track, relative to the checkout."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout
    paths = {Path(name) for name in listed.decode().split("\0") if name}
    return sorted(path for path in paths if os.path.lexists(ROOT / path))


@dataclass(frozen=True)
class Environment:
    """A virtual environment outside the checkout."""

    folder: Path

    @property
    def bin(self) -> Path:
        return self.folder / ("Scripts" if os.name == "nt" else "bin")

    @property
    def site_packages(self) -> Path:
        [found] = [p for p in self.folder.rglob("site-packages") if p.is_dir()][:1]
        return found

    def python(self, code: str, **environment: str) -> str:
        """What a program prints, run with no trace of the checkout on the module path."""
        return run(self.bin / "python", "-c", code, cwd=self.folder, **environment).strip()

    def pip(self, *arguments: str | Path) -> str:
        """Run pip on this environment; it holds none of its own."""
        pip = [sys.executable, "-m", "pip", "--python", self.bin / "python"]
        return run(*pip, *arguments, cwd=self.folder)


def new_environment(folder: Path) -> Environment:
    """An environment that holds what promptkd declares, and what that declares, nothing else.

    The files are links to those of this environment, so 5 GB of torch need no second copy.
    """
    venv.create(folder, with_pip=False, symlinks=os.name != "nt")
    made = Environment(folder)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for distribution in closure(project["dependencies"]):
        for name in {file.parts[0] for file in distribution.files or []} - {"..", "__pycache__"}:
            link = made.site_packages / name
            if not link.exists():
                link.symlink_to(Path(str(distribution.locate_file(name))))
    return made


def closure(requirements: list[str]) -> list[Distribution]:
    """The installed distributions that `requirements` ask for, directly or not."""
    found: dict[str, Distribution] = {}
    seen: set[tuple[str, str]] = set()
    todo = [(Requirement(text), "") for text in requirements]
    while todo:
        requirement, extra = todo.pop()
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        for wanted in ("", *requirement.extras):
            if (requirement.name, wanted) not in seen:
                seen.add((requirement.name, wanted))
                distribution = found[requirement.name] = Distribution.from_name(requirement.name)
                todo += [(Requirement(text), wanted) for text in distribution.requires or []]
    return list(found.values())


def members(archive: Path) -> set[str]:
    """Names of the files in a wheel or, without its top folder, an sdist."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as opened:
            return {name for name in opened.namelist() if not name.endswith("/")}
    with tarfile.open(archive) as opened:
        assert all(m.isfile() or m.isdir() for m in opened), "an sdist holds no links"
        return {m.name.split("/", 1)[1] for m in opened if m.isfile()}
