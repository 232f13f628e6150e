"""Which settings of a guest may come to another machine."""

from pathlib import Path

import pytest

from vstore.copy.messages import Setting
from vstore.copy.policy import Policy
from vstore.copy.settings import check_settings
from vstore.errors import NotPermitted


@pytest.fixture(autouse=True)
def confdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VSERVER_CONFDIR", f"{tmp_path}")


@pytest.mark.parametrize(
    "line",
    [
        "touch /canary",
        "S_HOSTNAME=$(touch /canary)",
        'S_HOSTNAME="`touch /canary`"',
        "S_HOSTNAME=x; touch /canary",
        "S_HOSTNAME=x touch /canary",
        "S_HOSTNAME='x\ntouch /canary\n'",
        'S_HOSTNAME="x" # y\rtouch\ntouch /canary',
        "S_HOSTNAME=x\\\n#\\\ntouch /canary",
        "if true; then S_CONTEXT=77; fi",
    ],
)
def test_shell_code_of_an_old_style_guest_is_refused(line: str) -> None:
    """Whoever starts the guest would run it as the host's root."""
    content = f'# ours\nIPROOT="eth0:10.0.0.7/24"\n{line}\nS_CONTEXT=77 # "last"\n'.encode()
    conf = [Setting("conf", "f", 0o644, content)]
    with pytest.raises(NotPermitted, match=r"runs shell code.*line [34]"):
        check_settings(conf, Policy())
    assert check_settings(conf, Policy(scripts=True)) == (conf, [])


def test_assignments_of_an_old_style_guest_come_along() -> None:
    content = b"# it's `ours`\n\n  export S_CONTEXT='77';\nONBOOT=no#\nULIMIT=\"-H -u 1000\"\n"
    conf = [Setting("conf", "f", 0o644, content)]
    assert check_settings(conf, Policy()) == (conf, [])
