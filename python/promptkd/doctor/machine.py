"""Devices, versions, and which of the fast paths are in use."""

from __future__ import annotations

import os
import platform
import shutil
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from promptkd import _rust, frozen

_PACKAGES = ("promptkd", "torch", "open_clip_torch", "triton", "numpy", "pillow")


def look_at_machine(device: torch.device) -> dict[str, Any]:
    """Devices, versions, and which of the fast paths are in use."""
    gpu = device.type == "cuda"
    return {
        "python": platform.python_version(),
        **{name: _version(name) for name in _PACKAGES},
        "processor": f"{os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}",
        "device": torch.cuda.get_device_name(device) if gpu else "cpu",
        "memory_bytes": memory_bytes(device),
        "loss_kernels": _kernels(gpu),
        "decoder": f"{decoder_level()} instructions",
        "packed_weights": [n for n in ("float32", "bfloat16") if frozen.packs(getattr(torch, n))],
        "pinned_memory": gpu,
        "free_disk_bytes": shutil.disk_usage(Path.cwd()).free,
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _kernels(gpu: bool) -> str:
    if find_spec("promptkd.kernels") is None:
        return "off: promptkd.kernels can't be imported; the plain loss is used"
    if not gpu:
        return "fused, for the processor"
    return "fused, Triton" if _version("triton") else "off: Triton is missing"


def decoder_level() -> str:
    """The instructions that resizing uses on this processor."""
    try:
        for level in ("avx512", "avx2"):
            try:
                _rust.configure(simd=level)
            except ValueError:
                continue
            return level
        return "portable"
    finally:
        _rust.configure()


def memory_bytes(device: torch.device) -> int:
    """Memory of the device: a GPU's own, or the machine's (as far as this process may use it)."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii").strip()
    except OSError:
        return total
    return min(total, int(limit)) if limit.isdecimal() else total
