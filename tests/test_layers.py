"""Imports go down only. Read from the syntax trees, so nothing is imported to find out."""

import ast
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "python" / "promptkd"

# From the top down; a module imports from its own layer and from those below. The longest
# matching name counts, so a module of a package may lie in another layer than the package.
LAYERS: tuple[tuple[str, ...], ...] = (
    (
        "cli",
        "__main__",
        "demo",
        "cache_cli",
        "calibrate_cli",
        "scale_cli",
        "scale_tables",
        "classes_cli",
        "export_cli",
        "hub_cli",
        "models_cli",
        "reproduce_cli",
        "serve_cli",
        "benchmarks.reproduce",
    ),
    ("doctor", "throughput", "stages", "report", "export", "convert", "serve"),
    (
        "teacher",
        "student",
        "calibration",
        "classes",
        "class_vectors",
        "cache",
        "data",
        "loss",
        "evaluate",
        "hub",
        "model_card",
        "official",
        "benchmarks",
        "plan",
    ),
    (
        "clip",
        "loading",
        "families",
        "towers",
        "text_tower",
        "prompts",
        "class_names",
        "blocks",
        "attention",
        "frozen",
        "templates",
        "torchfile",
        "files",
        "ranks",
        "errors",
        "_rust",
        "kernels",
    ),
)
HEAVY = {"open_clip", "matplotlib", "triton", "tensorboard", "scipy", "timm", "torchvision"}
HEAVY |= {"onnx", "onnxruntime", "onnxscript", "gradio", "datasets", "pyarrow"}


class Import(NamedTuple):
    """One imported module, by its absolute name."""

    name: str
    line: int
    at_import_time: bool  # not inside a function
    for_types_only: bool  # under `if TYPE_CHECKING:`


def module_files() -> dict[str, Path]:
    """Every module of the package by absolute name; kernels/ is reached through its own folder."""
    files: dict[str, Path] = {}
    folders = {"promptkd": PACKAGE, "promptkd.kernels": ROOT / "kernels"}
    for prefix, folder in folders.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            if prefix == "promptkd" and parts[0] == "kernels":
                continue
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            files[".".join([prefix, *parts])] = path
    return files


FILES = module_files()
KNOWN = {*FILES, "promptkd._rust"}


def is_type_checking(test: ast.expr) -> bool:
    name = test.attr if isinstance(test, ast.Attribute) else getattr(test, "id", "")
    return name == "TYPE_CHECKING"


def imports(
    body: list[ast.stmt], module: str, *, package: bool, runs: bool = True, types: bool = False
) -> Iterator[Import]:
    """Every import statement under `body`, resolved to absolute module names."""
    for node in body:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, runs, types)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                keep = module.split(".")[: None if package else -1]
                parents = keep[: len(keep) - node.level + 1]
                base = ".".join([*parents, *([node.module] if node.module else [])])
            for alias in node.names:
                # `from promptkd import _rust` names a module, `from promptkd.x import f` doesn't.
                full = f"{base}.{alias.name}"
                yield Import(full if full in KNOWN else base, node.lineno, runs, types)
        else:
            inside = runs and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            guarded = isinstance(node, ast.If) and is_type_checking(node.test)
            for name, value in ast.iter_fields(node):
                if not isinstance(value, list):
                    continue
                statements = [
                    s
                    for item in value
                    for s in (
                        item.body
                        if isinstance(item, ast.ExceptHandler | ast.match_case)
                        else [item]
                    )
                    if isinstance(s, ast.stmt)
                ]
                yield from imports(
                    statements,
                    module,
                    package=package,
                    runs=inside,
                    types=types or (guarded and name == "body"),
                )


def read(module: str) -> list[Import]:
    path = FILES[module]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return list(imports(tree.body, module, package=path.name == "__init__.py"))


IMPORTS = {module: read(module) for module in FILES}


def layer(module: str) -> int | None:
    """The layer of a module of the package, 0 on top; None where LAYERS does not name it."""
    parts = module.split(".")[1:]
    for length in range(len(parts), 0, -1):
        name = ".".join(parts[:length])
        for number, names in enumerate(LAYERS):
            if name in names:
                return number
    return None


def ours(name: str) -> bool:
    return name == "promptkd" or name.startswith("promptkd.")


def reachable(start: str, *, at_import_time: bool) -> dict[str, str]:
    """The package's modules that `start` brings in, each with the module that imports it.

    Functions' own imports count unless `at_import_time`; imports for types never do. Importing a
    module runs its packages' `__init__` as well; that of promptkd itself holds the public names
    alone and is left out.
    """
    found: dict[str, str] = {}
    todo = [start]
    while todo:
        module = todo.pop()
        names = [
            i.name
            for i in IMPORTS.get(module, [])
            if ours(i.name) and not i.for_types_only and (i.at_import_time or not at_import_time)
        ]
        names += [".".join(n.split(".")[:k]) for n in names for k in range(2, n.count(".") + 1)]
        for name in names:
            if name not in found and name not in ("promptkd", start):
                found[name] = module
                todo.append(name)
    return found


@pytest.mark.parametrize("module", sorted(set(FILES) - {"promptkd"}))
def test_imports_go_down_only(module: str) -> None:
    mine = layer(module)
    assert mine is not None, f"{module} has no layer; give it one in LAYERS of tests/test_layers.py"
    for found in IMPORTS[module]:
        if not ours(found.name):
            continue
        where = f"{FILES[module].relative_to(ROOT)}:{found.line}"
        assert found.name != "promptkd", f"{where}: import the module that defines it, not promptkd"
        theirs = layer(found.name)
        assert theirs is not None, f"{where}: {found.name} has no layer"
        assert theirs >= mine, f"{where}: {module} may not import {found.name}, which lies above it"


def test_no_import_cycles() -> None:
    """Nor within a layer, imports inside functions included."""
    graph = {
        module: {i.name for i in found if ours(i.name) and not i.for_types_only} - {module}
        for module, found in IMPORTS.items()
        if module != "promptkd"
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"import cycle: {' → '.join(reversed(error.args[1]))}")


def test_public_face_holds_no_logic() -> None:
    tree = ast.parse(FILES["promptkd"].read_text(encoding="utf-8"))
    allowed = (ast.ImportFrom, ast.Assign, ast.Expr)
    odd = [ast.unparse(n) for n in tree.body if not isinstance(n, allowed)]
    assert not odd, f"promptkd/__init__.py holds names only, not: {odd}"


def test_kernels_import_torch_and_triton_alone() -> None:
    allowed = {"torch", "triton", *sys.stdlib_module_names}
    kernels = [m for m in FILES if m.startswith("promptkd.kernels")]
    assert len(kernels) > 1
    for module in kernels:
        for found in IMPORTS[module]:
            inside = found.name.startswith("promptkd.kernels")
            assert inside or found.name.split(".")[0] in allowed, f"{module} imports {found.name}"


def test_open_clip_is_imported_by_few() -> None:
    importers = {m for m, found in IMPORTS.items() for i in found if i.name.startswith("open_clip")}
    assert importers == {f"promptkd.{name}" for name in ("clip", "loading", "families")}


def test_student_needs_no_teacher_and_no_triton() -> None:
    """Not even inside a function: a student is loaded and used without either.

    But for predictions among many classes, which take the kernels of `promptkd.loss.top_k` where
    Triton is installed.
    """
    found = reachable("promptkd.student", at_import_time=False)
    assert "promptkd.clip" in found  # the walk walks
    for name in found:
        path = [name]
        while path[-1] != "promptkd.student":
            path.append(found[path[-1]])
        chain = " → ".join(reversed(path))
        assert name != "promptkd.teacher", chain
        if name.startswith("promptkd.kernels"):
            assert "promptkd.student → promptkd.loss → promptkd.kernels" in chain, chain
        else:
            assert not any(i.name.split(".")[0] == "triton" for i in IMPORTS.get(name, [])), chain
    at_once = reachable("promptkd.student", at_import_time=True)
    assert not any(name.startswith(("promptkd.kernels", "promptkd.loss")) for name in at_once)


@pytest.mark.parametrize("start", ["promptkd", "promptkd.cli"])
def test_heavy_packages_wait_until_needed(start: str) -> None:
    """`import promptkd` and the command line's help bring in none of HEAVY by themselves."""
    for module in [start, *reachable(start, at_import_time=True)]:
        for found in IMPORTS.get(module, []):
            heavy = found.at_import_time and found.name.split(".")[0] in HEAVY
            assert not heavy, f"{module}:{found.line} imports {found.name} at once"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import promptkd.clip", ("promptkd.clip", True, False)),
        ("from promptkd import _rust", ("promptkd._rust", True, False)),
        ("from ..clip import load_clip", ("promptkd.clip", True, False)),
        ("from .. import clip", ("promptkd.clip", True, False)),
        ("from . import loader", ("promptkd.data.loader", True, False)),
        ("def f():\n    import promptkd.clip", ("promptkd.clip", False, False)),
        ("if TYPE_CHECKING:\n    import promptkd.clip", ("promptkd.clip", True, True)),
        (
            "try:\n    pass\nexcept OSError:\n    import promptkd.clip",
            ("promptkd.clip", True, False),
        ),
        (
            "class A:\n    with b:\n        import promptkd.clip",
            ("promptkd.clip", True, False),
        ),
    ],
)
def test_the_reader_itself(source: str, expected: tuple[str, bool, bool]) -> None:
    [found] = imports(ast.parse(source).body, "promptkd.data.sources", package=False)
    assert (found.name, found.at_import_time, found.for_types_only) == expected
