"""The rules of the tree itself: where things stand, how long they are, who imports what."""

import ast
import importlib
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

_TOP = Path(__file__).parents[2]
_PACKAGES = ("vstore", "vrun")
_TOP_LEVEL = {".ci", ".gitignore", "Makefile", "README.md", "pyproject.toml"} | {
    "bench",
    "tests",
    "vrun",
    "vstore",
}
_IMPORTERS = {
    "click": ("vstore/cli.py", "vstore/commands/", "vrun/commands/"),
    "tqdm": ("vstore/render.py",),
    "ctypes": (
        *("vstore/syscalls.py", "vrun/syscalls.py"),
        *("vrun/mountcalls.py", "vrun/cow/kernel.py"),
    ),
    "paramiko": ("vstore/copy/session.py",),
}
_NO_NAMES = frozenset({"utils", "helpers", "common", "misc", "manager"})
_MODULE_LINES = 500
_FUNCTION_LINES = 60


def _modules(*folders: str) -> Iterator[Path]:
    for folder in folders:
        yield from sorted((_TOP / folder).rglob("*.py"))


def _name(path: Path) -> str:
    return path.relative_to(_TOP).as_posix()


def _imported(path: Path) -> Iterator[str]:
    """The first part of every module that `path` imports, at its top or inside a function."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (item.name.partition(".")[0] for item in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module.partition(".")[0]


def test_the_top_level_holds_only_what_it_should() -> None:
    if not (_TOP / ".git").exists() or not shutil.which("git"):
        pytest.skip("not a git checkout")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=_TOP,
        capture_output=True,
        check=True,
        text=True,
    )
    first_parts = {name.partition("/")[0] for name in listed.stdout.split("\0") if name}
    assert first_parts <= _TOP_LEVEL


def test_no_module_is_longer_than_a_reader_can_hold() -> None:
    lengths = {
        _name(path): len(path.read_text().splitlines())
        for path in _modules(*_PACKAGES, "tests", "bench")
    }
    assert {name: lines for name, lines in lengths.items() if lines > _MODULE_LINES} == {}


def test_no_function_is_longer_than_a_screen() -> None:
    too_long = {}
    for path in _modules(*_PACKAGES):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > _FUNCTION_LINES:
                    too_long[f"{_name(path)}: {node.name}"] = lines
    assert too_long == {}


@pytest.mark.parametrize("library", sorted(_IMPORTERS))
def test_a_library_is_imported_in_its_own_place_alone(library: str) -> None:
    elsewhere = [
        _name(path)
        for path in _modules(*_PACKAGES)
        if library in _imported(path) and not _name(path).startswith(_IMPORTERS[library])
    ]
    assert elsewhere == []


def test_vstore_never_imports_vrun() -> None:
    assert [_name(path) for path in _modules("vstore") if "vrun" in _imported(path)] == []


def test_every_module_is_named_after_a_thing() -> None:
    modules = _modules(*_PACKAGES, "tests", "bench")
    assert [_name(path) for path in modules if path.stem in _NO_NAMES] == []


def test_a_package_file_holds_a_docstring_and_at_most_the_version() -> None:
    for path in _modules(*_PACKAGES):
        if path.name == "__init__.py":
            tree = ast.parse(path.read_text())
            assert ast.get_docstring(tree), _name(path)
            assert all(isinstance(node, ast.Expr | ast.Assign) for node in tree.body), _name(path)


def _console_scripts() -> dict[str, str]:
    scripts = tomllib.loads((_TOP / "pyproject.toml").read_text())["project"]["scripts"]
    return {str(name): str(target) for name, target in scripts.items()}


@pytest.mark.parametrize("command", sorted(_console_scripts()))
def test_each_command_has_a_module_of_its_name(command: str) -> None:
    module, _, function = _console_scripts()[command].partition(":")
    package = module.partition(".")[0]
    assert package in _PACKAGES
    assert module == f"{package}.commands.{command.replace('-', '_')}"
    assert callable(getattr(importlib.import_module(module), function))


def test_ci_runs_the_test_command_of_the_readme() -> None:
    assert "make test" in (_TOP / "README.md").read_text()
    last_line = (_TOP / ".ci" / "run").read_text().splitlines()[-1]
    assert last_line == "exec make test"
