"""The shell completes names of guests where a command takes one."""

import importlib
from pathlib import Path

import click
import pytest
from click.shell_completion import ShellComplete

from tests.fixtures.guestconfig import Configuration, configure

_WITH_NAMES = {
    "bulkoptions": ["start"],
    "chcontext": ["--ctx"],
    "unifying": [],
    "vapt_get": [],
    "vattribute": ["--get", "-c"],
    "vdlimit": ["--xid"],
    "vhalt": [],
    "vkill": ["-c"],
    "vlimit": ["--all", "--xid"],
    "vmount": [],
    "vpstree": ["--xid"],
    "vreboot": [],
    "vrpm": [],
    "vsched": ["-c"],
    "vserver_all": ["--running"],
    "vserver_info": [],
}
"""Modules of commands, with what stands before the name."""


@pytest.fixture
def etc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Configuration:
    made = configure(tmp_path, monkeypatch)
    for name in ("db", "web", "web2"):
        made.add_guest(name)
    return made


def _completed(
    module: str, typed: list[str], incomplete: str, command: str = "command"
) -> list[str]:
    found: click.Command = getattr(importlib.import_module(f"vrun.commands.{module}"), command)
    shell = ShellComplete(found, {}, "vtest", "_VTEST_COMPLETE")
    return [item.value for item in shell.get_completions(typed, incomplete)]


@pytest.mark.usefixtures("etc")
@pytest.mark.parametrize("module", sorted(_WITH_NAMES))
def test_names_of_guests_complete(module: str) -> None:
    assert _completed(module, _WITH_NAMES[module], "we") == ["web", "web2"]


@pytest.mark.usefixtures("etc")
def test_vserver_completes_a_guest_and_then_a_command() -> None:
    def completed(typed: list[str], incomplete: str) -> list[str]:
        return _completed("guestcommands", typed, incomplete, "_command")

    assert completed([], "d") == ["db"]
    assert completed(["--silent"], "") == ["db", "web", "web2"]
    assert completed(["db"], "st") == ["start", "stop", "status"]
    assert completed(["db", "exec"], "s") == []
