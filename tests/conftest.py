"""What every test shares; without a GPU the Triton kernels run in Triton's interpreter."""

import ctypes
import os


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

import pytest  # noqa: E402
import torch  # noqa: E402


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the Triton kernels run: a GPU, or the CPU under the interpreter."""
    return torch.device("cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda")


@pytest.fixture
def generator() -> torch.Generator:
    """A random stream that is the same in every run."""
    return torch.Generator().manual_seed(20240305)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--protocol-golden-dir", help="compare with this golden set alone")
