"""What the code imports is declared, what is declared is used, and each is justified."""

import ast
import sys
import tomllib
from pathlib import Path

from building import ROOT
from packaging.requirements import Requirement

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
CARGO = tomllib.loads((ROOT / "rust/Cargo.toml").read_text(encoding="utf-8"))
# Distributions whose module has another name.
MODULES = {"open_clip_torch": "open_clip", "pillow": "PIL"}
# Imported through another package: torch.utils.tensorboard needs tensorboard.
INDIRECT = {
    "torch.utils.tensorboard": "tensorboard",
    "torch.onnx": "onnxscript",
    "open_clip.model": "transformers",  # tokenizers and text towers of Hugging Face
}


def names(requirements: list[str]) -> set[str]:
    return {Requirement(r).name for r in requirements}


def imported_modules() -> dict[str, Path]:
    """Every module that the package names, by import statement or importlib, with a file."""
    found: dict[str, Path] = {}
    for folder in (ROOT / "python/promptkd", ROOT / "kernels"):
        for path in sorted(folder.rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Import):
                    found |= {alias.name: path for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
                    found[node.module] = path
                elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(
                    "import_module"
                ):
                    argument = node.args[0]
                    if isinstance(argument, ast.Constant):
                        found[str(argument.value)] = path
    return found


def third_party() -> dict[str, Path]:
    """Top-level modules from elsewhere, each with a file that imports it."""
    own = {"promptkd", "__future__", *sys.stdlib_module_names}
    found = imported_modules()
    direct = {name.split(".")[0]: path for name, path in found.items()}
    indirect = {INDIRECT[name]: path for name, path in found.items() if name in INDIRECT}
    return {name: path for name, path in (direct | indirect).items() if name not in own}


def test_imports_are_declared_and_declarations_used() -> None:
    extras = PROJECT["project"]["optional-dependencies"].values()
    declared = names(PROJECT["project"]["dependencies"]).union(*map(names, extras))
    modules = {MODULES.get(name, name) for name in declared}
    imported = third_party()
    undeclared = {name: str(path) for name, path in imported.items() if name not in modules}
    assert undeclared == {}, "declare these in pyproject.toml"
    assert modules - set(imported) == set(), (
        "nothing imports these; take them out of pyproject.toml"
    )


def test_contributing_justifies_every_dependency() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    everything = names(PROJECT["project"]["dependencies"])
    for extra in PROJECT["project"]["optional-dependencies"].values():
        everything |= names(extra)
    everything |= names([r for r in PROJECT["dependency-groups"]["dev"] if isinstance(r, str)])
    everything |= set(CARGO["dependencies"]) | set(CARGO["build-dependencies"])
    missing = [name for name in sorted(everything) if f"`{name}`" not in text]
    assert missing == [], "give each one a line in CONTRIBUTING.md"
