"""What every test shares; without a GPU the Triton kernels run in Triton's interpreter."""

import ctypes
import os
import platform


def _count_gpus() -> int:
    """Ask the driver itself: importing torch to find out would be too late for Triton."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0
    return count.value


# Triton reads this when it is first imported, and torch imports Triton.
if _count_gpus() == 0:
    os.environ["TRITON_INTERPRET"] = "1"
    # The interpreter multiplies through NumPy. One choice of its code for every x86 processor, and
    # the one whose rounding shows what a kernel wrongly takes for granted.
    if platform.machine() in ("x86_64", "AMD64"):
        os.environ.setdefault("OPENBLAS_CORETYPE", "Haswell")

from pathlib import Path  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402
from tiny import Models, make_models, make_photos  # noqa: E402

torch.set_num_threads(1)  # the models are tiny: threads would only wait for each other


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the Triton kernels run: a GPU, or the CPU under the interpreter."""
    return torch.device("cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda")


@pytest.fixture
def generator() -> torch.Generator:
    """A random stream that is the same in every run."""
    return torch.Generator().manual_seed(20240305)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--golden-dir", help="compare both stages with this golden set")
    parser.addoption("--protocol-golden-dir", help="compare with this golden set alone")


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """A tiny teacher (64 px) and student (48 px) with random weights, in open_clip's layout."""
    return make_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """36 pictures in three class folders."""
    return make_photos(tmp_path_factory.mktemp("photos") / "photos")
