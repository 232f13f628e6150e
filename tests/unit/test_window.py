"""The immutable flag is lifted in one place of the sources: the window."""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import vstore
from vstore.window import parse_intent

_SOURCES: Final = Path(vstore.__file__).parent
_SETTERS: Final = {0x40086602, 0x401C5820}  # FS_IOC_SETFLAGS, FS_IOC_FSSETXATTR of linux/fs.h
_NAMES: Final = {"FS_IOC_SETFLAGS", "FS_IOC_FSSETXATTR"}


def _functions(source: Path) -> Iterator[tuple[str, ast.AST]]:
    """Every function and method of a module by name, and the rest of it as an empty name."""
    module = ast.parse(source.read_text())
    for node in ast.walk(module):
        if isinstance(node, ast.FunctionDef):
            yield node.name, node


def _calls_setter(function: ast.AST) -> bool:
    for node in ast.walk(function):
        if isinstance(node, ast.Name) and node.id in _NAMES:
            return True
        if isinstance(node, ast.Attribute) and node.attr in _NAMES:
            return True
        if isinstance(node, ast.Constant) and node.value in _SETTERS:
            return True
    return False


def test_flags_are_written_by_the_window_and_by_what_cannot_clear_the_flag() -> None:
    found = {
        f"{source.relative_to(_SOURCES)}: {name}"
        for source in _SOURCES.rglob("*.py")
        for name, function in _functions(source)
        if _calls_setter(function)
    }
    assert found <= {
        "inode.py: put_flags",
        "inode.py: put_project_id",
        "inode.py: set_immutable",
        "window.py: _clear_immutable",
        "window.py: put_back",
    }


def test_only_window_py_calls_what_clears_the_flag() -> None:
    for source in _SOURCES.rglob("*.py"):
        text = source.read_text()
        assert source.name == "window.py" or "_clear_immutable" not in text, source
        assert "chattr" not in _code_of(text), source


def _code_of(text: str) -> str:
    """The words of a module that are no docstrings and no comments."""
    words = []
    module = ast.parse(text)
    docstrings = {
        id(node.value)
        for node in ast.walk(module)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    for node in ast.walk(module):
        if isinstance(node, ast.Constant) and id(node) not in docstrings:
            words.append(str(node.value))
    return " ".join(word for word in words if " " not in word)


def test_an_intent_that_was_torn_names_what_can_be_read_of_it() -> None:
    assert parse_intent(b"12,345") == [12, 345]
    assert parse_intent(b"12,,x,-5,345") in ([12, 345], [12, -5, 345])
    assert parse_intent(b"") == []
