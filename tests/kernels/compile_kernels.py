"""Compiles every configuration for one compute capability; prints a JSON line for each.

A process of its own: Triton compiles nothing where it has been imported as an interpreter.
Usage: python compile_kernels.py CAPABILITY
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)

import triton
import triton.backends.nvidia
from promptkd.kernels import configs, hybrid, small, split, topk
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

BIN = Path(triton.backends.nvidia.__file__).parent / "bin"
TYPES = {"bf16": 2, "fp16": 2, "fp32": 4}
IN_DTYPE_OF_VECTORS = ("student_ptr", "teacher_ptr", "features_ptr", "vectors_ptr", "scratch_ptr")


def configurations():
    """Yield (kernel, dtype, tile or None, values of its compile-time arguments).

    float16 takes the code of bfloat16 but for the conversions, so one teacher stands for all.
    """
    for dtype, size in TYPES.items():
        teachers = ("features",) if dtype == "fp16" else ("features", "logits", "none")
        for classes in configs.SMALL_TILES[size]:
            tile = configs.small_tile(classes, size)
            for teacher in teachers[:2]:
                yield small.small_kernel, dtype, tile, {"TEACHER_LOGITS": teacher == "logits"}
        for width, tile in configs.SPLIT_TILES[size].items():
            first, second = configs.split_width(width)
            for teacher in teachers:
                values = {"TEACHER": teacher, "D0": first, "D1": second}
                yield split.attend_kernel, dtype, tile, values
        for teacher in teachers:
            values = {"TEACHER": teacher}
            yield hybrid.statistics_kernel, dtype, configs.HYBRID_TILES[size], values
            values = {"TEACHER": teacher, "LOW_PART": teacher == "none" and size == 2}
            yield hybrid.difference_kernel, dtype, configs.HYBRID_TILES[size], values
        for k in (8,) if dtype == "fp16" else (2, 8, configs.TOP_K_LARGEST):
            yield topk.top_k_kernel, dtype, configs.TOP_K_TILES[size], {"K": k}
    for given in (False, True):  # the ends of a row hardly depend on the dtype
        values = {"BLOCK_S": 512, "BLOCK_D": 1024, "statistics": given}
        yield split.merge_kernel, "bf16", None, values
        values = {"BLOCK_P": 8, "BLOCK_D": 2048, "statistics": given}
        yield hybrid.finish_kernel, "bf16", None, values
    yield split.merge_statistics_kernel, "bf16", None, {"BLOCK_S": 512, "BLOCK_D": 1024}


def signature(kernel, dtype, tile, values):
    """Return Triton's types of the arguments, and the values of the compile-time ones."""
    constants = {
        "NEED_GRADIENT": True,
        "NEED_MEAN": True,
        "PRECISION": "ieee",
        "UPCAST": False,
        **values,
    }
    if tile:
        constants |= {"ROWS": tile.rows, "CLASSES": tile.classes, "WIDTH": tile.width}
    if values.get("TEACHER") == "none":
        constants["teacher_ptr"] = None
    if values.get("TEACHER", "features") != "features" or values.get("TEACHER_LOGITS"):
        constants["teacher_scale_ptr"] = None
    if values.get("statistics") is False:
        constants |= {"mu_ptr": None, "h_ptr": None}
    types = {}
    for name in kernel.arg_names:
        if name in constants:
            types[name] = "constexpr"
        elif name == "key_ptr":
            types[name] = "*i64"
        elif name in IN_DTYPE_OF_VECTORS:
            types[name] = f"*{dtype}"
        elif name.endswith("_ptr"):
            types[name] = "*fp32"
        else:
            number = name in ("student_scale", "teacher_scale", "scale", "temperature", "weight")
            types[name] = "fp32" if number else "i32"
    return types, {name: constants[name] for name in types if types[name] == "constexpr"}


def compile_one(kernel, dtype, tile, values, capability):
    types, constants = signature(kernel, dtype, tile, values)
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if types[name].startswith("*") or name == "D"
    }
    compiled = triton.compile(
        ASTSource(kernel, signature=types, constexprs=constants, attrs=aligned),
        target=GPUTarget("cuda", capability, 32),
        options={
            "num_warps": tile.num_warps if tile else 4,
            "num_stages": tile.num_stages if tile else 3,
            "enable_fp_fusion": False,
        },
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        code = subprocess.run(
            [BIN / "nvdisasm", "-c", file.name], capture_output=True, text=True, check=True
        ).stdout
    return {
        "kernel": kernel.__name__,
        "dtype": dtype,
        "rows": tile.rows if tile else None,
        "values": values,
        "spills": len(re.findall(r"\b(?:STL|LDL)\b", code)),
        "shared_bytes": compiled.metadata.shared,
        "wgmma": len(re.findall(r"\bHGMMA\b", code)),
        "instructions": code.count(";"),
    }


if __name__ == "__main__":
    for configuration in configurations():
        print(json.dumps(compile_one(*configuration, int(sys.argv[1]))), flush=True)
