"""Who uses which address of the host: the first makes it, the last takes it away."""

import json
from pathlib import Path

import pytest

from vrun.claims import Thing, locked
from vrun.errors import ConfigInvalid, FormatUnknown

_ADDRESS = Thing("address", "eth0", "10.0.0.5/24")
_DEVICE = Thing("device", "eth0.100")


@pytest.fixture(autouse=True)
def rundir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VSERVER_RUNDIR", str(tmp_path / "run"))
    return tmp_path / "run"


def test_what_two_guests_use_goes_with_the_last(rundir: Path) -> None:
    with locked() as claims:
        claims.add(_ADDRESS, "web", exists=False)
        claims.add(_ADDRESS, "db", exists=True)
    with locked() as claims:
        assert not claims.must_go(_ADDRESS, "web")
        claims.drop(_ADDRESS, "web")
    with locked() as claims:
        assert claims.must_go(_ADDRESS, "db")
        claims.drop(_ADDRESS, "db")
        assert not claims.is_claimed(_ADDRESS)
    assert (rundir / ".addresses").stat().st_mode & 0o777 == 0o700


def test_what_was_there_before_never_goes() -> None:
    with locked() as claims:
        claims.add(_ADDRESS, "web", exists=True)
        assert not claims.must_go(_ADDRESS, "web")


def test_the_last_claimed_goes_first() -> None:
    with locked() as claims:
        claims.add(_DEVICE, "web", exists=False)
        claims.add(_ADDRESS, "web", exists=False)
        claims.add(_ADDRESS, "web", exists=True)
    with locked() as claims:
        assert claims.used_by("web") == [_ADDRESS, _DEVICE]
        assert claims.must_go(_ADDRESS, "web")
        assert claims.used_by("db") == []


def test_a_claim_is_on_disk_before_the_lock_is_given_back(rundir: Path) -> None:
    with locked() as claims:
        claims.add(_ADDRESS, "web", exists=False)
        kept = json.loads((rundir / ".addresses/claims.json").read_text())
    assert kept["claims"] == {"address eth0 10.0.0.5/24": {"made": True, "guests": ["web"]}}


def test_claims_of_before_a_boot_are_gone(rundir: Path) -> None:
    with locked() as claims:
        claims.add(_ADDRESS, "web", exists=False)
    path = rundir / ".addresses/claims.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"boot": "another"}))
    with locked() as claims:
        assert not claims.is_claimed(_ADDRESS)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("{", ConfigInvalid),
        ("[]", ConfigInvalid),
        ("{}", ConfigInvalid),
        ('{"format": 2}', FormatUnknown),
    ],
)
def test_claims_that_cannot_be_read_are_named(
    rundir: Path, text: str, kind: type[Exception]
) -> None:
    (rundir / ".addresses").mkdir(parents=True)
    (rundir / ".addresses/claims.json").write_text(text)
    with pytest.raises(kind, match=r"claims\.json"), locked():
        pass
