"""Who may import whom (an abstract-syntax test: nothing is imported)."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FORBIDDEN = {"weightdiff": {"training", "analyses"}, "training": {"weightdiff", "analyses"}}
HEAVY = {"numba", "pandas", "plotly", "scipy", "sklearn", "torch", "transformers"}
HEAVY |= {"transformer_lens"}


def imports(path: Path, *, nested: bool) -> set[str]:
    """Top-level packages that a file imports; without ``nested`` those at module level only."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = ast.walk(tree) if nested else iter(tree.body)
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add((node.module or "").split(".")[0])
    return found


@pytest.mark.parametrize("package", sorted(FORBIDDEN))
def test_no_import_runs_backwards(package: str) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    wrong = {
        str(path.relative_to(ROOT)): bad
        for path in files
        if (bad := imports(path, nested=True) & FORBIDDEN[package])
    }
    assert not wrong


def test_command_modules_import_nothing_heavy() -> None:
    files = [*(ROOT / "weightdiff" / "cli").glob("*.py"), ROOT / "training/cli.py"]
    files += [ROOT / "analyses/cli.py", *(ROOT / p / "__init__.py" for p in FORBIDDEN)]
    wrong = {str(path): bad for path in files if (bad := imports(path, nested=False) & HEAVY)}
    assert not wrong


def test_relative_imports_do_not_hide_from_these_tests() -> None:
    for package in (*FORBIDDEN, "analyses"):
        for path in (ROOT / package).rglob("*.py"):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            assert not [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.level], (
                path
            )
