"""Guests are found as administrators left them, and what runs is told from what is gone."""

import json
import multiprocessing
import os
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest

from vstore import guest
from vstore.errors import ConfigInvalid, FormatUnknown, GuestNotFound, NotPermitted, WrongUsage
from vstore.guest import GuestName

BAD_NAMES = [
    "",
    ".",
    "..",
    ".hidden",
    "-web",
    "_web",
    "a/b",
    "/web",
    "./web",
    "web server",
    "web\n",
    "wéb",
    "web\x00",
    "w*",
    "x" * 65,
    "web~",
    "web.~1~",
    "web.rpmsave",
    "web.rpmnew",
    "web.rpmorig",
    "web.cfsaved",
    "web.cfsaved.3",
]


@pytest.fixture
def conf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty configuration directory; roots go to tmp_path/base, state to tmp_path/run."""
    for variable, name in (("CONFDIR", "conf"), ("VDIRBASE", "base"), ("RUNDIR", "run")):
        monkeypatch.setenv(f"VSERVER_{variable}", os.fspath(tmp_path / name))
    (tmp_path / "base").mkdir()
    (tmp_path / "conf").mkdir()
    return tmp_path / "conf"


def add_guest(conf: Path, name: str, *, target: str | None = None) -> Path:
    """A new-style guest with a root of its own; its configuration directory."""
    root = conf.parent / "base" / name
    root.mkdir(exist_ok=True)
    (conf / name).mkdir()
    (conf / name / "vdir").symlink_to(target or root)
    return conf / name


def names(*, include_disabled: bool = False) -> list[str]:
    return [found.name for found in guest.list_guests(include_disabled=include_disabled)]


# --- names


@pytest.mark.parametrize("name", ["web", "0", "a.b-c_d", "WEB1", "x" * 64, "a..b", "web.conf"])
def test_a_good_name_stays_as_it_is(name: str) -> None:
    assert guest.parse_name(name) == name


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_bad_name_is_wrong_usage(name: str) -> None:
    with pytest.raises(WrongUsage, match="cannot be a guest's name"):
        guest.parse_name(name)


@pytest.mark.parametrize("name", BAD_NAMES)
def test_no_bad_name_reaches_the_lock_or_the_state(conf: Path, name: str) -> None:
    with pytest.raises(WrongUsage):
        guest.load_state(name)
    with pytest.raises(WrongUsage), guest.hold_lock(name):
        pass
    assert not (conf.parent / "run").exists()


# --- where things are


def test_paths_come_from_the_environment(conf: Path) -> None:
    assert guest.confdir() == conf
    assert guest.vdirbase() == conf.parent / "base"
    assert guest.rundir() == conf.parent / "run"


def test_paths_without_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("VSERVER_CONFDIR", "VSERVER_VDIRBASE", "VSERVER_RUNDIR"):
        monkeypatch.setenv(variable, "")
    assert guest.confdir() == Path("/etc/vservers")
    assert guest.rundir() == Path("/run/vservers")


@pytest.mark.parametrize("target", ["../../elsewhere", "{}/elsewhere"])
def test_vdirbase_link_may_be_relative_absolute_and_dangling(
    conf: Path, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    monkeypatch.delenv("VSERVER_VDIRBASE")
    (conf / ".defaults").mkdir()
    (conf / ".defaults/vdirbase").symlink_to(target.format(conf.parent))
    assert guest.vdirbase() == conf.parent / "elsewhere"


def test_vdirbase_without_link(conf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VSERVER_VDIRBASE")
    assert guest.vdirbase() == Path("/var/lib/vservers")


# --- one guest


@pytest.mark.parametrize("target", [None, "../../base/web"])
def test_vdir_link_may_be_absolute_or_relative(conf: Path, target: str | None) -> None:
    add_guest(conf, "web", target=target)
    found = guest.load_guest("web")
    assert (found.name, found.root) == ("web", conf.parent / "base/web")
    assert found.config == conf / "web"
    assert found.is_configured


def test_a_slash_that_completion_left_does_no_harm(conf: Path) -> None:
    add_guest(conf, "web")
    assert guest.load_guest("web/").name == "web"
    with pytest.raises(WrongUsage):
        guest.load_guest("web//")


def test_root_is_without_symlinks(conf: Path) -> None:
    add_guest(conf, "web", target=os.fspath(conf.parent / "alias/web"))
    (conf.parent / "alias").symlink_to("base")
    assert guest.load_guest("web").root == conf.parent / "base/web"


def test_vdir_may_be_a_directory_itself(conf: Path) -> None:
    (conf / "web/vdir").mkdir(parents=True)
    assert guest.load_guest("web").root == conf / "web/vdir"


def test_configuration_directory_may_be_a_symlink(conf: Path) -> None:
    add_guest(conf, "web").rename(conf.parent / "elsewhere")
    (conf / "web").symlink_to("../elsewhere")
    assert guest.load_guest("web").root == conf.parent / "base/web"
    assert names() == ["web"]


def test_missing_guest_says_where_it_was_looked_for(conf: Path) -> None:
    with pytest.raises(GuestNotFound) as caught:
        guest.load_guest("web")
    assert f"{conf}/web/vdir does not exist" in caught.value.message
    assert f"{conf}/web.conf" in caught.value.message
    assert "VSERVER_CONFDIR" in (caught.value.hint or "")
    assert guest.find_guest(GuestName("web")) is None


def test_vdir_to_a_missing_root_says_so(conf: Path) -> None:
    add_guest(conf, "web", target="/nowhere/web")
    with pytest.raises(GuestNotFound, match="points to /nowhere/web, does not exist"):
        guest.load_guest("web")
    assert guest.find_guest(GuestName("web")) is None


def test_vdir_to_a_file_says_so(conf: Path) -> None:
    add_guest(conf, "web", target="/etc/hostname")
    with pytest.raises(GuestNotFound, match="is no directory"):
        guest.load_guest("web")


def test_vdir_loop_is_a_missing_root(conf: Path) -> None:
    add_guest(conf, "web", target="vdir")
    with pytest.raises(GuestNotFound, match="has no root"):
        guest.load_guest("web")


def test_the_hosts_root_is_no_guest(conf: Path) -> None:
    add_guest(conf, "web", target="/")
    with pytest.raises(ConfigInvalid, match="the host's own root"):
        guest.load_guest("web")


def test_dangling_configuration_symlink_says_so(conf: Path) -> None:
    (conf / "web").symlink_to("gone")
    with pytest.raises(GuestNotFound, match=f"web is a symlink to {conf}/gone"):
        guest.load_guest("web")


# --- old-style guests


def test_old_style_guest_lives_in_vdirbase(conf: Path) -> None:
    (conf / "mail.conf").write_text("S_HOSTNAME=mail\n")
    (conf.parent / "base/mail").mkdir()
    found = guest.load_guest("mail")
    assert (found.root, found.config) == (conf.parent / "base/mail", conf / "mail.conf")
    assert found.app_dir("vunify") == conf / "mail/apps/vunify"


def test_old_style_guest_without_root_says_so(conf: Path) -> None:
    (conf / "mail.conf").touch()
    with pytest.raises(GuestNotFound, match=f"its root {conf.parent}/base/mail, does not exist"):
        guest.load_guest("mail")


def test_file_legacy_makes_an_old_style_guest(conf: Path) -> None:
    folder = add_guest(conf, "web", target="/nowhere")
    (folder / "legacy").touch()
    (conf / "web.conf").touch()
    found = guest.load_guest("web")
    assert (found.root, found.config) == (conf.parent / "base/web", conf / "web.conf")
    assert names() == ["web"]


def test_file_legacy_without_conf_is_no_guest(conf: Path) -> None:
    (add_guest(conf, "web") / "legacy").touch()
    with pytest.raises(GuestNotFound, match="is marked legacy"):
        guest.load_guest("web")


def test_directory_counts_before_conf(conf: Path) -> None:
    add_guest(conf, "web", target=os.fspath(conf))
    (conf / "web.conf").touch()
    assert guest.load_guest("web").root == conf
    assert names() == ["web"]


def test_directory_without_vdir_leaves_it_to_conf(conf: Path) -> None:
    (conf / "web").mkdir()
    (conf / "web.conf").touch()
    (conf.parent / "base/web").mkdir()
    assert guest.load_guest("web").config == conf / "web.conf"


# --- all guests


def test_list_is_sorted_and_leaves_out_what_is_no_guest(
    conf: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("web", "db", "Old", "web.rpmsave", "web~", "mail.cfsaved.1"):
        add_guest(conf, name)
    (conf / "mail.conf").touch()
    (conf / "mail.conf.rpmnew").touch()
    (conf.parent / "base/mail").mkdir()
    (conf / "empty").mkdir()
    (conf / ".defaults").mkdir()
    (conf / ".defaults/vdir").symlink_to("/tmp")  # noqa: S108
    (conf / "dangling").symlink_to("gone")
    (conf / "folder.conf").mkdir()
    assert names() == ["Old", "db", "mail", "web"]
    assert caplog.text == ""


def test_disabled_guests_are_listed_only_when_asked_for(conf: Path) -> None:
    (add_guest(conf, "web") / "disabled").touch()
    add_guest(conf, "db")
    assert names() == ["db"]
    assert names(include_disabled=True) == ["db", "web"]


def test_broken_guests_are_left_out_with_a_warning(
    conf: Path, caplog: pytest.LogCaptureFixture
) -> None:
    add_guest(conf, "gone", target="/nowhere/gone")
    add_guest(conf, "odd name")
    add_guest(conf, "host", target="/")
    add_guest(conf, "web")
    assert names() == ["web"]
    for word in ("/nowhere/gone", "'odd name'", "the host's own root"):
        assert word in caplog.text


def test_two_names_of_one_root_are_both_listed(conf: Path) -> None:
    add_guest(conf, "a")
    add_guest(conf, "b", target=os.fspath(conf.parent / "base/a"))
    assert [(found.name, found.root.name) for found in guest.list_guests()] == [
        ("a", "a"),
        ("b", "a"),
    ]


def test_no_configuration_directory_no_guests(conf: Path) -> None:
    conf.rmdir()
    assert guest.list_guests() == []


# --- trees


def test_a_tree_has_its_path_for_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tree").mkdir()
    monkeypatch.chdir(tmp_path)
    found = guest.tree_guest(Path("tree"))
    assert (found.name, found.root, found.config) == ("tree", tmp_path / "tree", None)
    assert not found.is_configured
    assert found.app_dir("vunify") is None


def test_a_tree_is_no_symlink_no_file_and_there(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    (tmp_path / "file").touch()
    for name, reason in (("link", "is a symlink"), ("file", "is no"), ("gone", "is no")):
        with pytest.raises(GuestNotFound, match=reason):
            guest.tree_guest(tmp_path / name)


# --- refservers


def test_refservers_come_in_the_order_of_their_links(conf: Path) -> None:
    folder = add_guest(conf, "web") / "apps/vunify"
    folder.mkdir(parents=True)
    for name in ("one", "two", "three"):
        add_guest(conf, name)
    (folder / "refserver.10").symlink_to(conf / "two")
    (folder / "refserver.00").symlink_to("../../../one")
    (folder / "refserver.20").symlink_to(conf / "three")
    (folder / "refserver.15~").symlink_to("/nowhere")
    (folder / "exclude").touch()
    found = guest.refservers(guest.load_guest("web"))
    assert [ref.name for ref in found] == ["one", "two", "three"]
    assert guest.refservers(guest.load_guest("one")) == []


def test_refserver_that_is_no_guest_is_named(conf: Path) -> None:
    folder = add_guest(conf, "web") / "apps/vunify"
    folder.mkdir(parents=True)
    (folder / "refserver.00").symlink_to("/nowhere")
    with pytest.raises(ConfigInvalid, match=r"refserver\.00: leads to /nowhere"):
        guest.refservers(guest.load_guest("web"))


# --- what runs


def write_state(conf: Path, **changes: object) -> Path:
    started = Path(f"/proc/{os.getpid()}/stat").read_text().rpartition(")")[2].split()[19]
    values: dict[str, object] = {
        "format": 1,
        "xid": 49152,
        "init_pid": os.getpid(),
        "init_start": int(started),
        "cgroup": "/sys/fs/cgroup/vservers/49152",
        "pool": "/vservers/.pool",
        "protection": "supervisor",
    }
    path = conf.parent / "run/web/state.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values | changes))
    return path


def test_state_of_a_running_guest(conf: Path) -> None:
    write_state(conf)
    state = guest.load_state("web")
    assert state is not None
    assert (state.xid, state.init_pid, state.protection) == (49152, os.getpid(), "supervisor")
    assert state.cgroup == Path("/sys/fs/cgroup/vservers/49152")
    assert state.pool == Path("/vservers/.pool")


def test_state_without_pool(conf: Path) -> None:
    write_state(conf, pool=None)
    state = guest.load_state("web")
    assert state is not None
    assert state.pool is None


def test_a_stopped_guest_has_no_state(conf: Path) -> None:
    assert guest.load_state("web") is None
    (conf.parent / "run").mkdir()
    (conf.parent / "run/web").write_text("49152\n")  # the run file of the original tools
    assert guest.load_state("web") is None


@pytest.mark.parametrize("changes", [{"init_start": 1}, {"init_pid": 2**22 + 1}])
def test_a_number_that_another_process_has_now_is_no_running_guest(
    conf: Path, changes: dict[str, object]
) -> None:
    write_state(conf, **changes)
    assert guest.load_state("web") is None


@pytest.mark.parametrize("number", [2, None, "1"])
def test_state_of_another_format_is_refused(conf: Path, number: object) -> None:
    write_state(conf, format=number)
    with pytest.raises(FormatUnknown, match=r"state\.json"):
        guest.load_state("web")


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", '"x"', '{"format": 1}'])
def test_state_that_is_none_is_named(conf: Path, text: str) -> None:
    write_state(conf).write_text(text)
    with pytest.raises((ConfigInvalid, FormatUnknown), match=r"state\.json"):
        guest.load_state("web")


# --- the lock


def hold_elsewhere(held: Event, done: Event) -> None:
    with guest.hold_lock("web") as had:
        assert had
        held.set()
        done.wait(60)


def test_lock_is_exclusive_and_private(conf: Path) -> None:
    with guest.hold_lock("web") as first, guest.hold_lock("web") as second:
        assert (first, second) == (True, False)
    with guest.hold_lock("web") as again, guest.hold_lock("db") as other:
        assert (again, other) == (True, True)
    run = conf.parent / "run/web"
    assert (run.stat().st_mode & 0o777, (run / "lock").stat().st_mode & 0o777) == (0o700, 0o600)


def test_lock_is_free_at_the_end_whatever_a_child_still_has(conf: Path) -> None:
    with guest.hold_lock("web"):
        (entry,) = (
            entry
            for entry in list(Path("/proc/self/fd").iterdir())
            if os.path.realpath(entry) == os.fspath(conf.parent / "run/web/lock")
        )
        copy = os.dup(int(entry.name))
    with guest.hold_lock("web") as had:
        assert had
    os.close(copy)


def test_lock_is_waited_for_and_no_longer(conf: Path) -> None:
    context = multiprocessing.get_context("spawn")
    held, done = context.Event(), context.Event()
    holder = context.Process(target=hold_elsewhere, args=(held, done))
    holder.start()
    try:
        assert held.wait(60)
        with guest.hold_lock("web", wait_s=0.05) as had:
            assert not had
        done.set()
        with guest.hold_lock("web", wait_s=60) as had:
            assert had
    finally:
        done.set()
        holder.join()


def test_lock_where_the_original_left_its_run_file(conf: Path) -> None:
    (conf.parent / "run").mkdir()
    (conf.parent / "run/web").write_text("49152\n")
    with pytest.raises(ConfigInvalid, match="is a file"), guest.hold_lock("web"):
        pass


def test_lock_that_cannot_be_made_names_the_way_out(
    conf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VSERVER_RUNDIR", "/proc/nowhere")
    with pytest.raises(NotPermitted) as caught, guest.hold_lock("web"):
        pass
    assert "VSERVER_RUNDIR" in (caught.value.hint or "")


def test_lock_is_no_symlink(conf: Path) -> None:
    folder = conf.parent / "run/web"
    folder.mkdir(parents=True)
    (folder / "lock").symlink_to(conf.parent / "target")
    with pytest.raises(NotPermitted), guest.hold_lock("web"):
        pass
    assert not (conf.parent / "target").exists()
