"""What the processes of a running guest are held to, written and read again."""

import json
import resource
from pathlib import Path

import pytest

from vrun import ceiling
from vrun.errors import ConfigInvalid, FormatUnknown, ToolError
from vrun.spec import GuestSpec, Rlimit


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the ceiling of the guest `web` is kept."""
    monkeypatch.setenv("VSERVER_RUNDIR", str(tmp_path))
    (tmp_path / "web").mkdir()
    return tmp_path / "web/ceiling.json"


_SPEC = GuestSpec(
    name="web",
    root=Path("/guests/web"),
    nice=5,
    ionice=(2, 7),
    personality=8,
    oom_score_adj=-100,
    capabilities=frozenset({"CHOWN", "KILL"}),
    ccaps=frozenset({"raw_icmp"}),
    umask=frozenset({"newuser"}),
    rlimits=(
        Rlimit(resource.RLIMIT_NOFILE, "nofile", 100, resource.RLIM_INFINITY),
        Rlimit(resource.RLIMIT_CORE, "core", None, 0),
    ),
)


def test_what_is_written_is_read_again(path: Path) -> None:
    ceiling.write("web", ceiling.of(_SPEC))

    assert ceiling.load("web") == ceiling.of(_SPEC)
    assert path.stat().st_mode & 0o777 == 0o600


def test_it_limits_as_the_guests_own_settings_do(path: Path) -> None:
    ceiling.write("web", ceiling.of(_SPEC))

    limited = ceiling.load("web").as_spec()

    for name in ("nice", "ionice", "personality", "oom_score_adj", "rlimits"):
        assert getattr(limited, name) == getattr(_SPEC, name), name


def test_a_level_that_is_relative_to_its_caller_is_not_taken_twice() -> None:
    spec = GuestSpec(name="web", root=Path("/guests/web"), nice=5, nice_is_relative=True)

    assert ceiling.of(spec).nice == 0


def test_without_it_nothing_is_known(path: Path) -> None:
    with pytest.raises(ToolError, match="not known what its processes may do"):
        ceiling.load("web")


@pytest.mark.parametrize("text", ["", "[]", "nonsense", '"text"'])
def test_what_is_no_record_is_refused(path: Path, text: str) -> None:
    path.write_text(text)

    with pytest.raises((ConfigInvalid, FormatUnknown)):
        ceiling.load("web")


@pytest.mark.parametrize(
    ("key", "value"),
    [("capabilities", "CHOWN"), ("rlimits", [[1]]), ("nice", None), ("ionice", [1]), ("umask", 7)],
)
def test_a_value_of_the_wrong_kind_is_refused(path: Path, key: str, value: object) -> None:
    ceiling.write("web", ceiling.of(_SPEC))
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))

    with pytest.raises(ConfigInvalid, match="of the wrong kind"):
        ceiling.load("web")


def test_a_newer_format_is_refused(path: Path) -> None:
    ceiling.write("web", ceiling.of(_SPEC))
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 2}))

    with pytest.raises(FormatUnknown):
        ceiling.load("web")


def test_a_guest_that_ended_has_none(path: Path) -> None:
    ceiling.write("web", ceiling.of(_SPEC))

    ceiling.forget("web")
    ceiling.forget("web")

    assert not path.exists()
