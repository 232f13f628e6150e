"""A signal that comes while a command forks is heard: Python drops what a handler raises there."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fixtures.probes import need

pytestmark = need("root")

_TREE = Path(__file__).parents[2]
_BEGIN = """
import os, signal, sys
from pathlib import Path
from vstore.copy.access import Access, Session
from vrun.chorus import Chorus
from vrun.crowd import Crowd
from vrun.graph import Before

def end(number, frame):
    raise SystemExit(128 + number)

signal.signal(signal.SIGTERM, end)
forks = []

def come():
    forks.append(None)
    if len(forks) == {number}:
        os.kill(os.getpid(), signal.SIGTERM)

def hang(*_):
    while True:
        signal.pause()

os.register_at_fork({hook}=come)
"""
_WORK = {
    "chorus": (2, "list(Chorus(2, print, lambda names: None).perform(['one', 'two'], hang))"),
    "crowd": (
        2,
        "list(Crowd(2, print, print).do("
        "{('hang', name): Before() for name in ('one', 'two')}, {'hang': hang}))",
    ),
    "session": (
        1,
        "Session(Access('127.0.0.1', 'root', 1, [], Path(os.devnull), Path(os.devnull)), 'true');"
        "hang()",
    ),
}
"""At which fork the signal comes, and who forks."""


@pytest.mark.parametrize("hook", ["before", "after_in_parent"])
@pytest.mark.parametrize("work", list(_WORK))
def test_a_signal_during_a_fork_ends_the_command_and_all_its_workers(work: str, hook: str) -> None:
    number, call = _WORK[work]
    program = _BEGIN.format(hook=hook, number=number) + call
    with subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=_TREE,
        env=os.environ | {"PYTHONPATH": os.fspath(_TREE)},
    ) as process:
        try:
            shown, said = process.communicate(timeout=30)  # until no worker has them open any more
        finally:
            process.kill()
    assert (process.returncode, shown, said) == (143, "", "")
