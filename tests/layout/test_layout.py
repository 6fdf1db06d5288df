"""The house keeps its shape: one-way imports, nothing shadows the standard library, Feast scans feature_repo only."""

import ast
import configparser
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = {
    "plait": ROOT / "platform/plait",
    "trainers": ROOT / "trainers",
    "experiments": ROOT / "experiments",
    "serving": ROOT / "serving",
    "feature_repo": ROOT / "feature_repo",
}
MAY_IMPORT = {
    "plait": set(),
    "trainers": {"plait"},
    "experiments": {"plait"},
    "serving": {"plait", "experiments"},
    "feature_repo": {"plait"},
}


def imported_roots(folder):
    """First names of every import statement below the folder, those inside functions too."""
    found = {}
    for path in sorted(folder.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            for name in names:
                found.setdefault(name.split(".")[0], path.relative_to(ROOT))
    return found


@pytest.mark.parametrize("name", MAY_IMPORT)
def test_imports_point_one_way(name):
    roots = imported_roots(FOLDERS[name])
    strangers = {root: str(path) for root, path in roots.items() if root in MAY_IMPORT and root != name}
    assert set(strangers) <= MAY_IMPORT[name], strangers


def test_serving_never_imports_torch():
    assert "torch" not in imported_roots(FOLDERS["serving"])


def test_nothing_shadows_the_standard_library():
    assert not (ROOT / "platform/__init__.py").exists()
    assert not (ROOT / "tests/platform").exists()
    assert not list((ROOT / "tests").rglob("__init__.py"))
    run = subprocess.run(
        [sys.executable, "-c", "import platform; print(platform.system())"], cwd=ROOT, capture_output=True, text=True
    )
    assert run.stdout.strip() == "Linux", run.stderr


def test_every_package_is_declared():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    declared = set(config["options"]["packages"].split())
    present = set()
    for name, folder in FOLDERS.items():
        if name != "feature_repo":
            for path in folder.rglob("*.py"):
                present.add(".".join([name, *path.relative_to(folder).parts[:-1]]))
    assert declared == present


def test_every_command_is_there():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    for line in config["options.entry_points"]["plait.commands"].strip().splitlines():
        name, _, target = (part.strip() for part in line.partition("="))
        module, _, attribute = target.partition(":")
        path = FOLDERS[module.split(".")[0]].joinpath(*module.split(".")[1:]).with_suffix(".py")
        assert path.exists(), name
        assert f"def {attribute}(" in path.read_text() or f"{attribute} = " in path.read_text(), name


def test_feast_scans_the_feature_repository_only(tmp_path):
    from feast.repo_operations import get_repo_files

    for folder in ("feature_repo", "platform/plait", "tests", "fixtures", "venv/lib", ".tox"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "module.py").write_text("")
    (tmp_path / "setup.py").write_text("")
    (tmp_path / ".feastignore").write_text((ROOT / ".feastignore").read_text())
    assert [path.relative_to(tmp_path).parts[0] for path in get_repo_files(tmp_path)] == ["feature_repo"]
