"""The house: which folder may import from which, and what a name of the package loads."""

import ast
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "hf_gatelora"
# From the ground up: a folder imports only from those before it. `hub`, `loop` and `engines` forward to moved modules.
FLOORS = ["config", "records", "gates", "adapters", "evaluation", "card", "training", "cli"]
FORWARDING = ["hub", "loop", "engines"]
# Whoever saves writes the card and whoever pushes the folder; the controller meets both only then.
LATE = {("training/controller.py", "card")}


def imports(path: Path) -> list[tuple[str, bool]]:
    """What a module imports of the package, as parts of its name, and whether it does so as it is loaded."""
    tree, found = ast.parse(path.read_text()), []
    home = ("hf_gatelora", *path.relative_to(PACKAGE).parent.parts)
    late = {id(n) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for n in ast.walk(f)}
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.ImportFrom):
            base = home[: len(home) - node.level + 1] if node.level else ()
            base = (*base, *(node.module or "").split(".")) if node.module else base
            names = [(*base, alias.name) for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [tuple(alias.name.split(".")) for alias in node.names]
        found += [(name, id(node) not in late) for name in names if name[0] == "hf_gatelora"]
    return found


def test_imports_run_down():
    files = [path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE or path.stem in FLOORS]
    assert len(files) > 40
    seen = set()
    for path in files:
        place = path.relative_to(PACKAGE)
        here = place.parts[0].removesuffix(".py")
        if here in FORWARDING:
            continue
        for name, at_load in imports(path):
            there = name[1]
            if there in ("__version__", here):
                continue
            seen.add((here, there))
            if (place.as_posix(), there) in LATE and not at_load:
                continue
            assert FLOORS.index(there) < FLOORS.index(here), f"{place} imports {'.'.join(name)}, which lies above it"
    assert ("training", "gates") in seen
    assert ("cli", "adapters") in seen


def test_every_folder_has_its_floor():
    folders = {path.parent.relative_to(PACKAGE).parts[0] for path in PACKAGE.glob("*/*.py")}
    modules = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}
    assert folders | modules == {*FLOORS, *FORWARDING}


def test_gates_load_neither_cards_nor_evaluation_nor_the_command_line():
    code = "import sys; from hf_gatelora import attach_gates; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    ours = {name for name in loaded if name.startswith("hf_gatelora.")}
    assert "hf_gatelora.training.controller" in ours
    above = ("card", "evaluation", "cli", "hub")
    assert not [name for name in ours if name.split(".")[1] in above]


def test_names_are_the_same_for_a_type_checker():
    """The lazy exports, those under TYPE_CHECKING and `__all__`."""
    import hf_gatelora

    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If) and not isinstance(node.test, ast.UnaryOp)]
    checked = {alias.name: node.module for node in block.body for alias in node.names}
    assert checked == hf_gatelora._HOME
    assert set(hf_gatelora.__all__) == {*checked, "__version__"}
    for name in hf_gatelora.__all__:
        assert getattr(hf_gatelora, name) is not None
    assert (PACKAGE / "py.typed").is_file()
