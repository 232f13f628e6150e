"""Each command's man page and --help say what its click command says."""

import importlib
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from tests.fixtures import manpages
from tests.fixtures.manpages import section
from vstore.cli import EXIT_INTERRUPTED
from vstore.errors import EXIT_PARTIAL, ToolError

_TOP = Path(__file__).parents[2]
_PAGES = _TOP / "vstore" / "man"
_PROJECT = tomllib.loads((_TOP / "pyproject.toml").read_text())["project"]
_SCRIPTS: dict[str, str] = {
    name: target for name, target in _PROJECT["scripts"].items() if target.startswith("vstore.")
}

every_script = pytest.mark.parametrize("script", sorted(_SCRIPTS))


def load(script: str) -> click.Command:
    """The click command behind a console script."""
    module = importlib.import_module(_SCRIPTS[script].partition(":")[0])
    command = module.command
    assert isinstance(command, click.Command)
    return command


def commands(script: str) -> Iterator[tuple[list[str], click.Command]]:
    """The command and its subcommands, each with the words that call it."""
    yield from below([], load(script))


def below(words: list[str], command: click.Command) -> Iterator[tuple[list[str], click.Command]]:
    yield words, command
    if isinstance(command, click.Group):
        for name, inner in command.commands.items():
            yield from below([*words, name], inner)


def plain(script: str) -> str:
    """The man page without its markup."""
    return manpages.plain(_PAGES / f"{script}.8")


def invoke(script: str, words: list[str], argument: str) -> Result:
    return CliRunner().invoke(
        load(script), [*words, argument], prog_name=script, env={"COLUMNS": "200"}
    )


# --- man pages


def test_each_command_has_a_page_and_each_page_a_command() -> None:
    assert {path.name for path in _PAGES.iterdir()} == {f"{script}.8" for script in _SCRIPTS}


@every_script
def test_page_has_its_sections(script: str) -> None:
    text = plain(script)
    assert [title for title in manpages.SECTIONS if not section(text, title).strip()] == []
    assert section(text, "NAME").strip().startswith(f"{script} - ")
    assert script in section(text, "SYNOPSIS")


@every_script
def test_page_explains_every_option(script: str) -> None:
    text = plain(script)
    for title in ("SYNOPSIS", "EXAMPLES"):
        text = text.replace(section(text, title), "")
    missing = [
        " ".join([*words, option])
        for words, command in commands(script)
        for parameter in command.params
        if isinstance(parameter, click.Option)
        for option in (*parameter.opts, *parameter.secondary_opts)
        if not manpages.says_option(text, option)
    ]
    assert missing == []
    assert "--help" in text


@every_script
def test_page_names_no_option_that_is_not_there(script: str) -> None:
    options = {
        option
        for _, command in commands(script)
        for parameter in command.params
        for option in (*parameter.opts, *parameter.secondary_opts)
    }
    named = set(manpages.explained_options(section(plain(script), "OPTIONS")))
    assert named - options - {"--help"} == set()


@every_script
def test_page_names_every_argument_and_subcommand(script: str) -> None:
    text = plain(script)
    synopsis = section(text, "SYNOPSIS")
    for words, command in commands(script):
        assert re.search(rf"\b{' '.join([script, *words])}\b", text)
        for parameter in command.params:
            if isinstance(parameter, click.Argument):
                shown = re.search(r"\w+", parameter.metavar or (parameter.name or "").upper())
                assert shown
                assert shown[0] in synopsis


@every_script
def test_page_explains_every_exit_code(script: str) -> None:
    codes = {0, ToolError.exit_code, EXIT_PARTIAL, EXIT_INTERRUPTED}
    kinds = [kind for kind in ToolError.__subclasses__() if kind.__module__.startswith("vstore.")]
    codes |= {kind.exit_code for kind in kinds}
    text = plain(script)
    assert [code for code in sorted(codes) if not manpages.explains_code(text, code)] == []


@every_script
def test_page_is_good_roff(script: str) -> None:
    assert manpages.complaints(_PAGES / f"{script}.8") == ""


# --- help and wrong usage


@every_script
def test_help_fits_80_columns_and_goes_to_stdout(script: str) -> None:
    for words, _ in commands(script):
        done = invoke(script, words, "--help")
        assert (done.exit_code, done.stderr) == (0, "")
        assert done.stdout.startswith(" ".join(["Usage:", script, *words]))
        assert [line for line in done.stdout.splitlines() if len(line) > 80] == []


@every_script
def test_help_explains_everything(script: str) -> None:
    for words, command in commands(script):
        assert command.help, words
        unexplained = [
            parameter.opts
            for parameter in command.params
            if isinstance(parameter, click.Option) and not parameter.help
        ]
        assert unexplained == []


@every_script
def test_wrong_usage_goes_to_stderr_with_code_2(script: str) -> None:
    for words, _ in commands(script):
        done = invoke(script, words, "--no-such-option")
        assert (done.exit_code, done.stdout) == (2, "")
        assert "--no-such-option" in done.stderr


@every_script
def test_commands_are_named_as_they_are_called(script: str) -> None:
    assert load(script).name == script
