"""Every configuration that ships compiles for three generations of GPUs, without a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton.backends.nvidia")

# Shared memory one block may ask for, in bytes.
SHARED_LIMIT = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}


@pytest.mark.long
@pytest.mark.parametrize("capability", SHARED_LIMIT)
def test_every_configuration_compiles_without_spills(capability, tmp_path):
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    script = Path(__file__).with_name("compile_kernels.py")
    done = subprocess.run(
        [sys.executable, script, str(capability)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    compiled = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(compiled) > 50
    for one in compiled:
        assert one["instructions"] > 100, one
        assert one["spills"] == 0, one
        assert one["shared_bytes"] <= SHARED_LIMIT[capability], one
        if capability == 90 and (one["rows"] or 0) >= 64 and one["dtype"] != "fp32":
            assert one["wgmma"] > 0, one
