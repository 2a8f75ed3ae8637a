"""How the packaging tests build, look into archives and make environments."""

import os
import subprocess
import tarfile
import venv
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

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


def known_files(*folders: str) -> list[Path]:
    """Files under `folders` that git tracks or would track, relative to the checkout."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", *folders]
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
        return run(self.bin / "python", "-m", "pip", *arguments, cwd=self.folder)

    def borrow_dependencies(self) -> None:
        """See the packages of this environment too: their folder, but none of its .pth files.

        So an editable promptkd there stays out of sight, and 5 GB of torch need no second copy.
        """
        mine = Path(pytest.__file__).parents[1]
        (self.site_packages / "borrowed.pth").write_text(f"{mine}\n", encoding="utf-8")


def new_environment(folder: Path) -> Environment:
    venv.create(folder, with_pip=True, symlinks=os.name != "nt")
    return Environment(folder)


def members(archive: Path) -> set[str]:
    """Names of the files in a wheel or, without its top folder, an sdist."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as opened:
            return {name for name in opened.namelist() if not name.endswith("/")}
    with tarfile.open(archive) as opened:
        assert all(m.isfile() or m.isdir() for m in opened), "an sdist holds no links"
        return {m.name.split("/", 1)[1] for m in opened if m.isfile()}
