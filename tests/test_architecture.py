"""The arrows between folders go one way, no modules import each other in a circle, and folders keep to their libraries."""

import ast
import graphlib
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "vitoats"
ORDER = (  # each may import those before it; those of one line do not import each other unless they stand in this order
    *("common",),
    *("data", "format"),
    *("models", "methods", "runtime"),
    *("calibration", "loading", "export"),
    *("evaluation", "allocation", "benchmark"),
    *("compression", "report", "comparison"),
    *("api", "cli", "__main__"),
)
THIRD_PARTY = {  # of folders that keep to few; the standard library and vitoats apart
    "methods": {"torch"},
    "runtime": {"numpy", "onnxruntime", "onnx", "tokenizers"},  # the last two only where they are installed
}
STANDARD = __import__("sys").stdlib_module_names


def modules() -> dict[str, Path]:
    """All modules of the package by dotted name."""
    return {
        ".".join(("vitoats", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): path
        for path in PACKAGE.rglob("*.py")
    }


def imports(path: Path) -> set[str]:
    """What a file imports anywhere in it, also within functions and for type checkers."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


MODULES = modules()
GRAPH = {name: (imports(path) & MODULES.keys()) - {name} for name, path in MODULES.items()}


def folder(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def test_every_folder_has_its_place():
    assert {folder(name) for name in MODULES} - {""} == set(ORDER)


def test_imports_go_one_way():
    wrong = [
        f"{name} imports {other}"
        for name, others in GRAPH.items()
        for other in others
        if folder(name) and folder(other) and ORDER.index(folder(other)) > ORDER.index(folder(name))
    ]
    assert wrong == []


def test_no_modules_import_each_other_in_a_circle():
    packages = {name for name, path in MODULES.items() if path.name == "__init__.py"}
    graph = {name: others - packages for name, others in GRAPH.items() if name not in packages}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, with the circle


@pytest.mark.parametrize("name", THIRD_PARTY)
def test_a_folder_keeps_to_its_libraries(name):
    used = {
        module.partition(".")[0]
        for path in (PACKAGE / name).glob("*.py")
        for module in imports(path)
        if module.partition(".")[0] not in STANDARD | {"vitoats"}
    }
    assert used <= THIRD_PARTY[name]


@pytest.mark.parametrize("name", ORDER[: ORDER.index("cli")])
def test_flags_stay_in_the_command_line(name):
    """Below cli nothing parses flags, and no error speaks of them."""
    for path in [*(PACKAGE / name).glob("*.py"), *PACKAGE.glob(f"{name}.py")]:
        assert "argparse" not in imports(path), path
