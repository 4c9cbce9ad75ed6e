"""The house of CONTRIBUTING.md: which part may import which, how large files, classes and the top folder may be."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from hf_ssam import TwoPass

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "hf_ssam"
FILES = sorted(PACKAGE.rglob("*.py"))
MAY_IMPORT = {
    "rules": set(),
    "methods": {"rules"},
    "engine": {"rules", "methods"},
    "sharpness": {"rules", "methods", "engine"},
    "plots": {"rules", "methods", "engine", "sharpness", "run_folder"},
    "hub": {"rules", "methods", "engine", "sharpness", "plots", "run_folder"},
    "trainer": {"rules", "methods", "engine", "sharpness", "plots", "hub", "run_folder"},
    "run_folder": set(),
    "saved": set(),
    "cli": {"methods", "engine", "sharpness", "plots", "hub", "run_folder", "saved"},
    "__main__": {"cli"},
}
"""What each part may import of the others, at the top of a file or inside a function."""


def imported(tree: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """Every import statement but those for the type checker."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
            yield from imported(node)


def package_of(path: Path) -> tuple[str, ...]:
    return ("hf_ssam", *path.relative_to(PACKAGE).parent.parts)


def modules_of(source: str, package: tuple[str, ...]) -> set[str]:
    """Absolute names of what a file of `package` imports: each module, and each name taken from one."""
    found = set()
    for node in imported(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
            continue
        above = package[: len(package) - node.level + 1] if node.level else ()
        module = ".".join([*above, *([node.module] if node.module else [])])
        found |= {f"{module}.{alias.name}" for alias in node.names}
    return found


def parts_imported(path: Path) -> set[str]:
    """The parts of hf_ssam that a file imports."""
    names = modules_of(path.read_text("utf-8"), package_of(path))
    return {name.split(".")[1] for name in names if name.startswith("hf_ssam.")}


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("part", MAY_IMPORT)
def test_imports_run_one_way(part):
    files = [path for path in FILES if part_of(path) == part]
    assert files
    wrong = {
        f"{path.relative_to(PACKAGE)} imports {other}"
        for path in files
        for other in parts_imported(path) - {part} - MAY_IMPORT[part]
    }
    assert not wrong


def test_imports_are_found_wherever_they_stand():
    source = (
        "import a.b\nfrom . import c\nfrom ..rules.space import d\n"
        "if TYPE_CHECKING:\n    from ..trainer import e\ndef f():\n    from .g import h\n"
    )
    assert modules_of(source, ("hf_ssam", "hub")) == {
        "a.b",
        "hf_ssam.hub.c",
        "hf_ssam.rules.space.d",
        "hf_ssam.hub.g.h",
    }


def test_imports_make_no_circle_of_files():
    names = {path: ".".join(("hf_ssam", *path.relative_to(PACKAGE).with_suffix("").parts)) for path in FILES}
    known = {name.removesuffix(".__init__"): path for path, name in names.items()}
    graph = {}
    for path in FILES:
        found = modules_of(path.read_text("utf-8"), package_of(path))
        files = {known.get(name) or known.get(name.rpartition(".")[0]) for name in found}
        graph[path] = files - {None, path}
    TopologicalSorter(graph).prepare()


def test_files_and_classes_are_short():
    long = [
        f"{path.relative_to(ROOT)}: {n} lines" for path in FILES if (n := len(path.read_text().splitlines())) > 300
    ]
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.ClassDef) and (n := node.end_lineno - node.lineno + 1) > 250:
                long.append(f"{path.relative_to(ROOT)}: class {node.name}, {n} lines")
    assert not long


def test_top_of_the_package_has_few_entries():
    beside = [
        path.name for path in PACKAGE.iterdir() if path.name != "__pycache__" and not (path / "__init__.py").exists()
    ]
    assert len(beside) <= 7, beside


def test_import_of_the_package_leaves_the_trainer_alone():
    code = "import sys, hf_ssam; from hf_ssam import TwoPass; sys.exit('transformers.trainer' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def files_entered(function: Callable[[], object]) -> set[str]:
    """Files of hf_ssam of which code runs in a call, but for the constructors that dataclasses write themselves."""
    found: set[Path] = set()
    before = sys.getprofile()
    sys.setprofile(lambda frame, event, _: found.add(Path(frame.f_code.co_filename)) if event == "call" else None)
    try:
        function()
    finally:
        sys.setprofile(before)
    return {path.relative_to(PACKAGE).as_posix() for path in found if path.is_relative_to(PACKAGE)}


def test_plain_step_enters_few_files():
    """What a reader of a step of `TwoPass("ssam")` has to open; the first one also measures what rounding leaves."""
    model = nn.Linear(4, 2)
    engine = TwoPass(model, "ssam", 0.05)

    def run():
        loss = model(torch.ones(2, 4)).square().mean()
        loss.backward()
        return loss

    engine.step(run)
    model.zero_grad()
    entered = files_entered(lambda: engine.step(run))
    assert "engine/two_pass.py" in entered
    assert len(entered) <= 12, sorted(entered)


def test_version_of_the_citation_is_that_of_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))["version"] == project["version"]


def test_what_is_imported_is_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    requirements = [
        *project["dependencies"],
        *(r for extra in project["optional-dependencies"].values() for r in extra),
    ]
    declared = {r.partition(">")[0].partition("[")[0].replace("-", "_").lower() for r in requirements}
    names = {name.split(".")[0] for path in FILES for name in modules_of(path.read_text("utf-8"), package_of(path))}
    names = {{"PIL": "pillow"}.get(name, name) for name in names}
    assert names - sys.stdlib_module_names - {"hf_ssam"} <= declared


def test_laws_that_docstrings_name_are_written_down():
    laws = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    tests = {name.rpartition("/")[2] for line in laws.splitlines() for name in line.split("`") if name.endswith(".py")}
    assert all(f"| {n} | **" in laws for n in range(1, 10))
    assert {name for name in tests if name.startswith("test_")} <= {
        path.name for path in (ROOT / "tests").rglob("*.py")
    }
