"""The golden sets to compare with, and the miniature trees they were recorded on."""

from collections.abc import Callable
from pathlib import Path

import goldens
import make_tree
import pytest

Tree = Callable[[int, str, str], Path]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Golden sets: the committed ones, or the folder of --protocol-golden-dir alone."""
    given = metafunc.config.getoption("protocol_golden_dir", None)
    folders = [Path(given)] if given else list(goldens.COMMITTED)
    if "golden_name" in metafunc.fixturenames:
        metafunc.parametrize(
            ("golden_folder", "golden_name"),
            [
                pytest.param(folder, name, id=f"{folder.name}-{name}")
                for folder in folders
                for name in goldens.datasets(folder)
            ],
        )
    elif "golden_folder" in metafunc.fixturenames:
        metafunc.parametrize("golden_folder", folders, ids=[f.name for f in folders])


@pytest.fixture(scope="session")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Tree:
    """Build (once) the miniature tree of one dataset: tree(seed, name, "present"|"absent")."""
    built: dict[tuple[int, str, str], Path] = {}

    def build(seed: int, name: str, split: str = "present") -> Path:
        key = (seed, name, split)
        if key not in built:
            built[key] = tmp_path_factory.mktemp(f"{name}-{split}")
            make_tree.build_tree(str(built[key]), seed, [name], split)
        return built[key]

    return build
