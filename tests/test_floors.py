"""The house of DESIGN: three floors, imports point downwards only, and no file imports itself by a detour."""

import ast
import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("jforge", "torch_ref", "triton_kernels", "pallas_kernels")
MIDDLE = ("jforge.harness", "jforge.experiments", "triton_kernels.tune", "pallas_kernels.tune")
TOP = ("jforge.cli", "jforge.demo", "jforge.report", "jforge.report_bench", "jforge.report_lens",
       "jforge.report_experiments", "jforge.console", "jforge.lessons",
       "jforge.viz", "jforge.explorer", "jforge.__main__")  # fmt: skip
FREE = {"torch_ref": ("jforge", "jax", "triton_kernels", "pallas_kernels"),  # what a package must do without
        "triton_kernels": ("jforge", "jax", "pallas_kernels"),
        "pallas_kernels": ("torch", "torch_ref", "triton_kernels")}  # fmt: skip
LIGHT = {"jax", "jaxlib", "numpy", "jaxtyping", "ml_dtypes"}  # what `import jforge` may load beside Python's own


def within(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def floor(module: str) -> int:
    """0 for the ground, which the kernel packages and torch_ref share with the mechanisms; 1 the middle; 2 the top."""
    for level, names in ((2, TOP), (1, MIDDLE)):
        if any(within(module, name) for name in names):
            return level
    return 0


def files(root: Path) -> dict[str, Path]:
    """{module: file} of the product."""
    found = (path for package in PACKAGES for path in (root / package).rglob("*.py"))
    return {".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): path for path in found}


def imports(module: str, path: Path, known) -> set[str]:
    """Modules that a file imports, wherever in the file; `from package import module` is the module."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = module if path.stem == "__init__" else module.rpartition(".")[0]
            base = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            names = {f"{base}.{alias.name}" for alias in node.names}
            found |= {name if name in known else base for name in names}
    return found - {module}


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    known = files(ROOT)
    return {module: imports(module, path, known) for module, path in known.items()}


def upward(graph: dict[str, set[str]]) -> list[tuple[str, str]]:
    return [(a, b) for a, others in graph.items() for b in sorted(others & graph.keys()) if floor(b) > floor(a)]


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """A circle through every file that imports itself by a detour."""
    found, done = [], set()

    def walk(module: str, path: list[str]) -> None:
        if module in path:
            found.append(path[path.index(module) :])
        elif module not in done:
            for other in sorted(graph[module] & graph.keys()):
                walk(other, [*path, module])
            done.add(module)

    for module in graph:
        walk(module, [])
    return found


def test_no_arrow_points_upwards(graph):
    assert upward(graph) == []


def test_no_file_imports_itself_by_a_detour(graph):
    assert circles(graph) == []


@pytest.mark.parametrize("package", FREE)
def test_a_package_does_without(graph, package):
    for module, others in graph.items():
        if within(module, package):
            assert not [o for o in others if any(within(o, other) for other in FREE[package])], module


def test_the_walk_sees_arrows_and_circles(graph, tmp_path):
    """In a made-up house with one of each, one of them inside a function."""
    lines = {"core": "from jforge import ops", "ops": "def f():\n    from jforge.harness import bench",
             "harness/bench": "import jforge.core"}  # fmt: skip
    for name, text in lines.items():
        path = tmp_path / "jforge" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    known = files(tmp_path)
    made = {module: imports(module, path, known) for module, path in known.items()}
    assert upward(made) == [("jforge.ops", "jforge.harness.bench")]
    assert [sorted(circle) for circle in circles(made)] == [["jforge.core", "jforge.harness.bench", "jforge.ops"]]


def test_the_ground_imports_what_a_bare_installation_has(graph):
    """What `import jforge` reaches at the top of its files."""
    known, reached, todo = files(ROOT), set(), ["jforge"]
    while todo:
        module = todo.pop()
        if module in reached:
            continue
        reached.add(module)
        for node in ast.parse(known[module].read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [a.name for a in node.names]
                several = names if isinstance(node, ast.Import) else [f"{node.module}.{n}" for n in names]
                for name in several:
                    inner = next((n for n in (name, name.rpartition(".")[0]) if n in known), None)
                    top = name.partition(".")[0]
                    assert inner or top in sys.stdlib_module_names or top in LIGHT, f"{module} imports {name}"
                    todo += [inner] if inner else []
    assert {"jforge.laws", "jforge.cost", "jforge.attention"} <= reached
    assert importlib.util.find_spec("torch") is not None  # so that its absence among these is no accident
