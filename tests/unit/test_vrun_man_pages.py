"""The man pages of vserver say what its click commands and its words say."""

import importlib
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from tests.fixtures import manpages
from tests.fixtures.manpages import section, subsection, subsections
from vrun import enter, names
from vrun.commands import (
    build,
    bulkoptions,
    entry,
    guestcommands,
    newvserver,
    plain,
    vapt_get,
    vhalt,
    vmount,
    vreboot,
    vrpm,
    vserver_all,
    vserver_info,
    vservers,
)
from vrun.config_init import STYLES

_PAGES = Path(__file__).parents[2] / "vrun/man"
_VSERVER = _PAGES / "vserver.8"
_BUILD = _PAGES / "vserver-build.8"
_VSERVERS = _PAGES / "vservers.8"

_WITH_WORDS = {"vserver", "vserver-build", "vservers"}
_ONE_COMMAND = {
    name: module
    for name, module in (
        (script, importlib.import_module(target.partition(":")[0]))
        for script, target in tomllib.loads((_PAGES.parents[1] / "pyproject.toml").read_text())[
            "project"
        ]["scripts"].items()
        if target.startswith("vrun.")
    )
    if hasattr(module, "command")
}
"""Commands without words of their own, by name, with their modules."""

_CODES = {
    0,
    1,
    guestcommands.EXIT_OPTIONS,
    guestcommands.EXIT_USAGE,
    guestcommands.EXIT_STOPPED,
    names.NoConfiguration.exit_code,
    enter.JoinFailed.exit_code,
    enter.CannotExecute.exit_code,
    enter.CommandNotFound.exit_code,
    plain.EXIT_INTERRUPTED,
}

each_page = pytest.mark.parametrize("page", sorted(_PAGES.glob("*.8")), ids=lambda page: page.stem)


def commands_of(module: object) -> dict[str, click.Command]:
    """The click commands of a module, by name."""
    found = [value for value in vars(module).values() if isinstance(value, click.Command)]
    return {command.name or "": command for command in found}


def options_of(command: click.Command) -> set[str]:
    return {
        option
        for parameter in command.params
        if isinstance(parameter, click.Option)
        for option in (*parameter.opts, *parameter.secondary_opts)
    }


def unsaid(text: str, options: set[str]) -> list[str]:
    return sorted(option for option in options if not manpages.says_option(text, option))


# --- both pages


@each_page
def test_page_has_its_sections(page: Path) -> None:
    text = manpages.plain(page)
    commands = ("COMMANDS",) if page.stem in _WITH_WORDS else ()
    titles = (*manpages.SECTIONS, *commands, "OPTIONS", "SEE ALSO")
    assert [title for title in titles if not section(text, title).strip()] == []
    assert section(text, "NAME").strip().startswith(f"{page.stem} - ")
    assert section(text, "SYNOPSIS").strip().startswith(page.stem.removesuffix("-build"))


@pytest.mark.parametrize("page", sorted(_PAGES.iterdir()), ids=lambda page: page.name)
def test_page_is_good_roff(page: Path) -> None:
    assert manpages.complaints(page) == ""


# --- vserver(8)


def test_vserver_explains_every_word_and_no_other() -> None:
    text = manpages.plain(_VSERVER)
    assert set(subsections(text)) == set(guestcommands.COMMANDS)
    synopsis = section(text, "SYNOPSIS")
    missing = [word for word in guestcommands.COMMANDS if not re.search(rf"\b{word}\b", synopsis)]
    assert missing == []


def test_vserver_explains_every_option_where_it_belongs() -> None:
    text = manpages.plain(_VSERVER)
    commands = commands_of(guestcommands)
    shared = options_of(commands.pop("vserver")) | {"--help"}
    assert unsaid(section(text, "OPTIONS"), shared) == []
    assert set(manpages.explained_options(section(text, "OPTIONS"))) <= shared
    for name, command in commands.items():
        options = options_of(command)
        if name in guestcommands.COMMANDS:
            assert unsaid(subsection(text, name), options) == []
            assert set(manpages.explained_options(subsection(text, name))) <= options
        else:
            assert not options, name


def test_vserver_explains_every_exit_code() -> None:
    text = manpages.plain(_VSERVER)
    assert [code for code in sorted(_CODES) if not manpages.explains_code(text, code)] == []
    listed = {int(code) for code in re.findall(r"^(\d+)$", section(text, "EXIT STATUS"), re.M)}
    assert listed == _CODES


def test_vserver_names_the_shells_and_variables() -> None:
    text = manpages.plain(_VSERVER)
    assert [shell[0] for shell in enter.SHELLS if shell[0] not in subsection(text, "enter")] == []
    explained = section(text, "ENVIRONMENT")
    for variable in ("CONFDIR", "VDIRBASE", "RUNDIR", "LOGDIR", "PASS_ENV"):
        assert f"VSERVER_{variable}\n" in explained
    assert [style for style in STYLES if style not in section(text, "FILES")] == []


# --- vserver-build(8)


def test_build_explains_every_method_and_its_options() -> None:
    text = manpages.plain(_BUILD)
    assert set(subsections(text)) == set(build.METHODS)
    for name, command in build.METHODS.items():
        assert unsaid(subsection(text, name), options_of(command)) == []
        assert set(manpages.explained_options(subsection(text, name))) <= options_of(command)
        assert f"build -m {name}" in section(text, "SYNOPSIS")


def test_build_explains_every_option_that_methods_share() -> None:
    text = section(manpages.plain(_BUILD), "OPTIONS")
    shared = options_of(commands_of(build)["build"]) | {"--help"}
    assert unsaid(text, shared) == []
    assert set(manpages.explained_options(text)) <= shared
    assert [name for name in build.METHODS if name not in text] == []
    assert [style for style in STYLES if style not in text] == []


def test_build_explains_every_exit_code() -> None:
    text = manpages.plain(_BUILD)
    assert manpages.explains_code(text, build.EXIT_USAGE)
    assert [code for code in (0, 1, 130) if not manpages.explains_code(text, code)] == []


# --- those of one click command


_SINGLE = {
    "newvserver": newvserver.command,
    "vapt-get": vapt_get.command,
    "vhalt": vhalt.command,
    "vmount": vmount.command,
    "vreboot": vreboot.command,
    "vrpm": vrpm.command,
    "vserver-all": vserver_all.command,
}


@pytest.mark.parametrize("name", sorted(_SINGLE))
def test_a_page_explains_every_option_and_exit_code(name: str) -> None:
    text = manpages.plain(_PAGES / f"{name}.8")
    options = options_of(_SINGLE[name]) | {"--help"}
    assert unsaid(section(text, "OPTIONS"), options) == []
    assert set(manpages.explained_options(section(text, "OPTIONS"))) <= options
    listed = {int(code) for code in re.findall(r"^(\d+)$", section(text, "EXIT STATUS"), re.M)}
    codes = {0, vservers.EXIT_ALL, vservers.EXIT_SOME, plain.EXIT_INTERRUPTED}
    assert listed == codes - ({vservers.EXIT_SOME} if name == "newvserver" else set())


# --- vservers(8)


def test_vservers_explains_every_word_and_option() -> None:
    text = manpages.plain(_VSERVERS)
    words = {*vservers.COMMANDS, *bulkoptions.MORE}
    assert set(subsections(text)) == words
    assert [word for word in words if word not in section(text, "SYNOPSIS")] == []
    options = options_of(bulkoptions.command) | {"--help"}
    assert unsaid(section(text, "OPTIONS"), options) == []
    assert set(manpages.explained_options(section(text, "OPTIONS"))) <= options
    for word, module in bulkoptions.MORE.items():
        own = options_of(importlib.import_module(module).command)
        assert unsaid(subsection(text, word), own - options) == []
        assert set(manpages.explained_options(subsection(text, word))) <= own


def test_vservers_explains_every_exit_code() -> None:
    text = manpages.plain(_VSERVERS)
    codes = {0, vservers.EXIT_ALL, vservers.EXIT_SOME, plain.EXIT_INTERRUPTED}
    listed = {int(code) for code in re.findall(r"^(\d+)$", section(text, "EXIT STATUS"), re.M)}
    assert listed == codes


# --- commands without words of their own

each_command = pytest.mark.parametrize("name", sorted(_ONE_COMMAND))
_WITH_GUEST = {"vattribute": ["--get"], "vlimit": ["--all"]}
_BEHIND = {"chcontext": ["true"], "vdlimit": ["/"]}
"""What some commands need besides a guest."""


def test_each_command_has_a_page_and_each_page_a_command() -> None:
    pages = {page.stem for page in _PAGES.glob("*.8")}
    assert pages == {*_ONE_COMMAND, *_SINGLE, *_WITH_WORDS}


@each_command
def test_page_explains_every_option_and_no_other(name: str) -> None:
    text = manpages.plain(_PAGES / f"{name}.8")
    options = options_of(_ONE_COMMAND[name].command) | {"--help"}
    assert unsaid(section(text, "OPTIONS"), options) == []
    assert set(manpages.explained_options(section(text, "OPTIONS"))) <= options


@each_command
def test_page_explains_every_exit_code(name: str) -> None:
    text = manpages.plain(_PAGES / f"{name}.8")
    named = {value for key, value in vars(_ONE_COMMAND[name]).items() if key.startswith("EXIT_")}
    codes = {0, entry.EXIT_FAILED, plain.EXIT_INTERRUPTED} | named
    assert [code for code in sorted(codes) if not manpages.explains_code(text, code)] == []


@each_command
def test_page_explains_the_exit_code_for_an_unknown_guest(name: str, tmp_path: Path) -> None:
    options = {"-c", "--xid"} & options_of(_ONE_COMMAND[name].command)
    if not options:
        return
    words = [*_WITH_GUEST.get(name, ()), f"--xid={tmp_path.name}-nobody"]
    places = {f"VSERVER_{word}": os.fspath(tmp_path) for word in ("CONFDIR", "VDIRBASE", "RUNDIR")}
    command = [Path(sys.executable).with_name(name), *words, *_BEHIND.get(name, ())]
    done = subprocess.run(command, env={**os.environ, **places}, capture_output=True, check=False)
    assert b"nobody" in done.stderr
    assert manpages.explains_code(manpages.plain(_PAGES / f"{name}.8"), done.returncode)


@each_command
def test_help_fits_a_terminal(name: str) -> None:
    result = CliRunner().invoke(
        _ONE_COMMAND[name].command, ["--help"], prog_name=name, terminal_width=80
    )
    assert result.exit_code == 0
    assert max(map(len, result.output.splitlines())) <= 80


def test_info_explains_every_tag() -> None:
    text = manpages.plain(_PAGES / "vserver-info.8")
    missing = [tag for tag in vserver_info.TAGS if not re.search(rf"\b{tag}\b", text)]
    assert missing == []
