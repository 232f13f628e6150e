"""What the host sees of its guests: vserver-stat, vps, vpstree, vkill, vserver-info, lsxid.

One guest with processes of all kinds serves most tests; nothing here depends on how fast it is.
"""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.fixtures.probes import need
from tests.fixtures.vservers import (
    BUSYBOX_INIT,
    SLEEPER,
    Host,
    host_for_guests,
    is_alive,
    wait_until,
)
from vrun.commands.vserver_info import TAGS, No, Question
from vrun.errors import ToolError

pytestmark = need("root")

BIN = Path(sys.executable).parent
HEADER = "CTX   PROC    VSZ    RSS  userTIME   sysTIME    UPTIME NAME"
COLUMN = "CONTEXT             "
HOSTILE = "1 0 \x1b[31mMAIN"
"""What a process of the guest calls itself: a pid, a context, and a command to a terminal."""
_SCRIPT = f"""\
printf '{HOSTILE}' >/proc/$$/comm
while :; do sleep 1000; done
"""
_AT_REST = {("/bin/sleep", "1000"), ("sleep", "1000")}
"""What the children of `web`'s init and of its hostile process are in the end."""
_WAIT_S = 60


def run(*words: str, code: int = 0, env: dict[str, str] | None = None) -> str:
    """A command as installed, which must end with `code`; its output."""
    done = attempt(*words, env=env)
    assert done.returncode == code, f"{words}: {done.returncode}, {done.stdout}{done.stderr}"
    return done.stdout


def attempt(*words: str, env: dict[str, str] | None = None) -> "subprocess.CompletedProcess[str]":
    """A command as installed, or by its path, however it ends."""
    program, *rest = words
    done = subprocess.run(
        [BIN / program, *rest],
        capture_output=True,
        text=True,
        timeout=_WAIT_S,
        check=False,
        env=os.environ | {"LC_ALL": "C.UTF-8", **(env or {})},
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    """`web` runs, with an init that reaps, a hostile name and a group of its own; `db` runs too;
    `off` does not.
    """
    with pytest.MonkeyPatch.context() as monkeypatch:
        yield from host_for_guests(tmp_path_factory.mktemp("site"), monkeypatch)


@pytest.fixture(scope="module")
def web(host: Host) -> int:
    """The number of the guest's context; dynamic, as it has none of its own."""
    host.add_busybox("web", BUSYBOX_INIT)  # which reaps
    for name in ("db", "off"):
        host.add_busybox(name, SLEEPER)
    (host.etc.confdir / "web/context").unlink()
    (host.etc.vdirbase / "web/hostile.sh").write_text(_SCRIPT)
    host.vserver("web", "start")
    host.vserver("db", "start")
    start_hostile(host)
    return int(host.state("web")["xid"])


def start_hostile(host: Host) -> None:
    """Start the hostile process; when this returns nobody in `web` has anything left to do."""
    host.inside("web", "sh", "-c", "setsid sh /hostile.sh </dev/null >/dev/null 2>&1 &")

    def is_at_rest() -> bool:
        pids = pids_of(host, "web")
        is_there = any(is_named(pid, HOSTILE) for pid in pids)
        return is_there and len(pids) == 4 and set(map(words_of, pids)) >= _AT_REST

    wait_until(is_at_rest, _WAIT_S)


def group_of(host: Host, name: str) -> Path:
    return Path(host.state(name)["cgroup"])


def pids_of(host: Host, name: str) -> set[int]:
    """The guest's processes, by what the control groups below its own list."""
    found = set[int]()
    for folder, _, _ in os.walk(group_of(host, name)):
        found |= set(map(int, (Path(folder) / "cgroup.procs").read_text().split()))
    return found


def is_named(pid: int, name: str) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().rstrip("\n") == name
    return False


def hostile_pid(host: Host) -> int:
    return next(pid for pid in pids_of(host, "web") if is_named(pid, HOSTILE))


@pytest.fixture
def below(host: Host, web: int) -> Iterator[Path]:
    """The hostile process is in a group below the guest's, named as if it were another's."""
    place = group_of(host, "web") / "guest/vservers/1"
    place.mkdir(parents=True)
    pid = hostile_pid(host)
    (place / "cgroup.procs").write_text(str(pid))
    yield place
    with suppress(OSError):
        (group_of(host, "web") / "guest/cgroup.procs").write_text(str(pid))
    place.rmdir()
    place.parent.rmdir()


# --- vserver-stat


def rows(text: str) -> dict[int, str]:
    header, *lines = text.splitlines()
    assert header == HEADER
    return {int(line.split()[0]): line for line in lines}


def test_stat_has_a_row_for_the_host_and_each_running_guest(host: Host, web: int) -> None:
    shown = rows(run("vserver-stat"))
    assert list(shown) == sorted(shown)
    db = int(host.state("db")["xid"])
    names = {xid: line[55:] for xid, line in shown.items()}
    assert (names[0], names[web], names[db]) == ("root server", "web", "db")
    assert "off" not in names.values()
    form = r"\d+ +\d+ +[\d.]+[ KMGT] +[\d.]+[ KMGT]( +\d+[mhd]\d\d[smh]\d\d){3} (root server|\S*)"
    assert [line for line in shown.values() if not re.fullmatch(form, line)] == []


def test_stat_counts_what_is_in_the_guests_groups(host: Host, web: int, below: Path) -> None:
    pids = pids_of(host, "web")
    objects: list[dict[str, int | str]] = []

    def agrees() -> bool:
        """What a process has in memory may change between the two looks."""
        objects[:] = [json.loads(line) for line in run("vserver-stat", "--json").splitlines()]
        row = next(one for one in objects if one["xid"] == web)
        stats = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in pids]
        sizes = [sum(int(fields[place]) for fields in stats) for place in (20, 21)]
        pages = int(row["rss"]) / os.sysconf("SC_PAGE_SIZE")
        return [row["processes"], row["vsz"], pages] == [len(pids), *sizes]

    wait_until(agrees, _WAIT_S)
    host_row, row = objects[0], next(one for one in objects if one["xid"] == web)
    assert (row["format"], row["name"], host_row["name"]) == (1, "web", "root server")
    assert int(row["uptime_ms"]) <= int(host_row["uptime_ms"])


def test_stat_counts_cpu_time_of_processes_that_have_ended(host: Host, web: int) -> None:
    host.inside("web", "sh", "-c", "i=0; while [ $i -lt 100000 ]; do i=$((i+1)); done")
    shown = map(json.loads, run("vserver-stat", "--json").splitlines())
    row = next(one for one in shown if one["xid"] == web)
    text = (group_of(host, "web") / "cpu.stat").read_text()
    counted = {key: int(value) // 1000 for key, value in map(str.split, text.splitlines())}
    assert row["user_ms"] + row["system_ms"] > 0
    assert row["user_ms"] <= counted["user_usec"]
    assert row["system_ms"] <= counted["system_usec"]


def test_stat_shows_an_old_style_guest_in_brackets(host: Host, web: int) -> None:
    (host.etc.confdir / "db/legacy").touch()
    (host.etc.confdir / "db.conf").write_text("")
    try:
        assert rows(run("vserver-stat"))[int(host.state("db")["xid"])].endswith(" [db]")
    finally:
        (host.etc.confdir / "db/legacy").unlink()
        (host.etc.confdir / "db.conf").unlink()


def test_stat_shows_it_again_until_it_is_interrupted(web: int) -> None:
    program = os.fspath(BIN / "vserver-stat")
    command = ["env", "--default-signal=INT", program, "--watch", "0.1", "-O", "name"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as watching:
        assert watching.stdout is not None
        headers = 0
        while headers < 3:
            line = watching.stdout.readline()
            assert line
            headers += line == f"{HEADER}\n"
        watching.send_signal(signal.SIGINT)
        watching.stdout.read()
        assert watching.wait(_WAIT_S) == 0


@pytest.mark.parametrize("words", [["web"], ["--bad"], ["--watch", "0"], ["-O"]])
def test_stat_takes_no_other_words(words: list[str]) -> None:
    assert attempt("vserver-stat", *words).returncode == 1


# --- vps


def contexts_in(text: str) -> dict[int, str]:
    """By pid, what stands in the column; the lines must be ps's own with the column in them."""
    header, *lines = text.splitlines()
    end = re.search(r"(?<!\S)PID ", f"{header} ")
    assert end
    assert header[end.end() :].startswith(COLUMN.rstrip())
    found = {}
    for line in lines:
        pid = int(line[: end.end()].split()[-1])
        found[pid] = line[end.end() : end.end() + len(COLUMN)].strip()
    return found


@pytest.mark.parametrize(
    "words", [["aux"], ["-ef"], ["axo", "user,pid,cmd"], ["axo", "comm,pid,ppid"], ["axo", "pid"]]
)
def test_ps_shows_the_context_of_each_process(
    host: Host, web: int, below: Path, words: list[str]
) -> None:
    shown = contexts_in(run("vps", *words))
    ours = pids_of(host, "web")
    assert {pid: shown[pid] for pid in ours} == dict.fromkeys(ours, f"{web} web")
    assert {pid for pid, context in shown.items() if context == f"{web} web"} == ours
    assert shown[1] == shown[host.monitor_pid("web")] == "0 MAIN"
    assert shown[host.init_pid("db")] == f"{host.state('db')['xid']} db"


def test_ps_is_shown_as_it_is_but_for_the_column(host: Host, web: int) -> None:
    pids = ",".join(map(str, sorted(pids_of(host, "web"))))

    def agrees() -> bool:
        """A share of the processors, or the minute of a start, may change between the two looks."""
        plain = run("/bin/ps", "-fp", pids).splitlines()
        end = plain[0].index("PID ") + len("PID ")
        shown = run("vps", "-fp", pids)
        assert "\x1b" not in shown
        return [line[:end] + line[end + 20 :] for line in shown.splitlines()] == plain

    wait_until(agrees, _WAIT_S)


def test_ps_itself_is_on_the_host_and_numbers_in_names_are_no_pids(host: Host, web: int) -> None:
    shown = run("vps", "axo", "comm,pid,cmd")
    assert re.search(r"^ps +\d+     0 MAIN +\S*ps axo comm,pid,cmd$", shown, re.M)
    pid = hostile_pid(host)
    line = next(line for line in shown.splitlines() if f" {pid} {web} web " in line)
    assert line.startswith("1 0 ")


def test_ps_with_columns_that_are_pushed_aside(host: Host, web: int) -> None:
    pid = host.init_pid("web")
    line = run("vps", "-o", "vsz:1,rss:1,pid,cmd", "-p", str(pid)).splitlines()[1]
    assert re.fullmatch(rf" *\d+ +\d+ +{pid} +{web} web +\S.*", line)


def test_ps_with_names_that_are_wider_than_their_columns(host: Host, web: int) -> None:
    pid = host.init_pid("web")
    shown = run("vps", "-o", "user:3,ucmd:4,args:6,pid,args", "-p", str(pid))
    assert contexts_in(shown) == {pid: f"{web} web"}


@pytest.mark.parametrize("words", [["axo", "ppid,cmd"], ["axh"], ["axo", "pid="]])
def test_ps_without_a_column_pid_is_refused(web: int, words: list[str]) -> None:
    done = attempt("vps", *words)
    assert (done.returncode, done.stdout) == (254, "")
    assert "PID" in done.stderr


def test_ps_ends_as_ps_does() -> None:
    assert attempt("vps", "--no-such-option").returncode == 1
    assert attempt("vps", "-p", str(2**22 + 1)).returncode == 1
    assert "--version" in run("vps", "--help")
    assert run("vps", "--version").startswith("vps ")


def test_ps_leaves_room_for_the_column_on_a_terminal(host: Host, web: int) -> None:
    command = f"stty cols 80 rows 24; exec {BIN}/vps axfww -o pid,user,args; true"
    wide = subprocess.run(
        ["script", "-qec", command, "/dev/null"], capture_output=True, timeout=_WAIT_S, check=True
    ).stdout.decode(errors="replace")
    narrow = subprocess.run(
        ["script", "-qec", command.replace("axfww", "axf"), "/dev/null"],
        capture_output=True,
        timeout=_WAIT_S,
        check=True,
    ).stdout.decode(errors="replace")
    assert f"{web} web" in narrow
    assert max(len(line) for line in narrow.splitlines()) <= 80
    assert max(len(line) for line in wide.splitlines()) > 80


# --- vpstree


def test_tree_of_one_guest(host: Host, web: int) -> None:
    shown = run("vpstree", "--xid", "web", "-p", "-A")
    pids = set(map(int, re.findall(r"\((\d+)\)", shown)))
    assert host.init_pid("web") in pids
    assert pids <= pids_of(host, "web")
    assert f"({host.init_pid('db')})" in run("vpstree", "-p")
    assert attempt("vpstree", "--xid", "nobody").returncode == 1
    assert attempt("vpstree", "--no-such-option").returncode == 1


# --- vkill


def sleeper(host: Host, seconds: int) -> int:
    """A process of the guest that sleeps, as the host numbers it."""
    words = ("sleep", str(seconds))
    host.inside("web", "sh", "-c", f"setsid {' '.join(words)} </dev/null >/dev/null 2>&1 &")

    def found() -> list[int]:
        return [pid for pid in pids_of(host, "web") if words_of(pid) == words]

    wait_until(lambda: bool(found()), _WAIT_S)
    return found()[0]


def words_of(pid: int) -> tuple[str, ...]:
    with suppress(OSError):
        return tuple(Path(f"/proc/{pid}/cmdline").read_text().split("\0")[:-1])
    return ()


def test_kill_sends_to_processes_of_the_guest_alone(host: Host, web: int) -> None:
    mine = sleeper(host, 4001)
    other = subprocess.Popen(["sleep", "1000"])
    try:
        done = attempt("vkill", "-c", "web", "-s", "KILL", str(other.pid), str(host.init_pid("db")))
        assert done.returncode == 1
        assert f"process {other.pid} is on the host, not in context {web}" in done.stderr
        assert f"is in context {host.state('db')['xid']}" in done.stderr
        assert other.poll() is None
        run("vkill", "--xid", str(web), "-s", "SIGKILL", str(mine))
        wait_until(lambda: not is_alive(mine), _WAIT_S)
        run("vkill", "-s", "15", str(other.pid))
        assert other.wait(_WAIT_S) == -signal.SIGTERM
    finally:
        other.kill()
        other.wait()


def test_kill_sends_nothing_if_a_pid_is_no_number(host: Host, web: int) -> None:
    mine = sleeper(host, 4002)
    for bad in ("x", "1x", "", "-2", "99999999999", "²", "12 "):
        done = attempt("vkill", "-c", "web", "-s", "KILL", str(mine), bad)
        assert (done.returncode, is_alive(mine)) == (1, True), done.stderr
    run("vkill", "-s", "KILL", str(mine))
    wait_until(lambda: not is_alive(mine), _WAIT_S)


def test_kill_needs_to_know_whom(host: Host, web: int) -> None:
    for words in ([], ["0"], ["-1"], ["-s", "NONE", "1"], ["-c", "nobody"], ["-s", "99", "1"]):
        assert attempt("vkill", *words).returncode == 1, words
    assert is_alive(host.init_pid("web"))


def test_kill_of_all_but_the_init(host: Host, web: int, below: Path) -> None:
    init = host.init_pid("web")
    mine = {sleeper(host, 4003), hostile_pid(host)}
    run("vkill", "-c", "web", "-s", "kill", "--", "-1")
    wait_until(lambda: not any(map(is_alive, mine)), _WAIT_S)
    assert is_alive(init)
    start_hostile(host)


def test_kill_of_all_ends_the_guest(host: Host, web: int) -> None:
    run("vkill", "-c", "db", "-s", "CONT")
    assert is_alive(host.init_pid("db"))
    run("vkill", "-c", "db", "-s", "KILL")
    host.wait_stopped("db", _WAIT_S)
    assert attempt("vkill", "-c", "db").returncode == 1
    host.vserver("db", "start")
    run("vkill", "-c", "db", "-s", "KILL", "1")
    host.wait_stopped("db", _WAIT_S)
    host.vserver("db", "start")


# --- vserver-info


def ask(target: str, tag: str, argument: str | None = None) -> str:
    """What the command prints, without one for each question."""
    if tag == "UTS":  # takes its process into the guest's namespace
        return run("vserver-info", target, tag, argument or "").removesuffix("\n")
    try:
        return TAGS[tag.upper()].answer(Question(target, argument))
    except (No, ToolError):
        return ""


def test_info_answers(host: Host, web: int) -> None:
    confdir, init = host.etc.confdir, str(host.init_pid("web"))
    answers = {
        ("web", "CONTEXT"): str(web),
        ("web", "id"): str(web),
        ("off", "CONTEXT"): (confdir / "off/context").read_text().strip(),
        ("web", "RUNNING"): "1",
        ("web", "VDIR"): os.fspath(confdir / "web/vdir"),
        ("web", "VDIR", "true"): os.fspath(host.etc.vdirbase / "web"),
        (str(web), "NAME"): "web",
        ("web", "NAME"): "web",
        ("web", "CFGDIR"): os.fspath(confdir / "web"),
        ("web", "APPDIR", "init"): os.fspath(confdir / "web/apps/init"),
        ("web", "INITPID"): init,
        (init, "INITPID_PID"): init,
        (init, "XID"): str(web),
        ("-", "XID"): "0",
        ("1", "NID"): "0",
        ("web", "UTS", "nodename"): "web",
        (f"{confdir}/web/", "CANONIFY"): "web",
        ("-", "FEATURE", "vkill"): "1",
        ("1", "XIDTYPE"): "watch",
        ("49152", "XIDTYPE"): "dynamic",
        ("x", "XIDTYPE"): "invalid",
        ("-", "XIDTYPE"): "main",
        ("2", "XIDTYPE", "static"): "static",
    }
    assert {words: ask(*words) for words in answers} == answers
    for words in (("web", "UTS", "nodename"), (str(web), "CONTEXT")):
        assert run("vserver-info", *words) == answers.get(words, f"{web}") + "\n"


def test_info_says_no_by_its_exit_code(host: Host, web: int) -> None:
    for words in (
        ["off", "CONTEXT", "false"],
        ["off", "INITPID"],
        ["web", "APPDIR", "../.."],
        ["web", "APPDIR"],
        ["-", "FEATURE", "persistent"],
        ["-", "FEATURE", "flying"],
        ["2", "XIDTYPE", "dynamic"],
        ["-", "NAME"],
        [str(2**22 + 1), "XID"],
    ):
        assert ask(*words) == "", words
    for words in (["off", "RUNNING"], ["nobody", "VDIR"], ["web", "WEIGHT"], ["web"]):
        done = attempt("vserver-info", *words)
        assert (done.returncode, done.stdout) == (1, ""), words
    assert run("vserver-info", "-q", "web", "RUNNING") == ""
    assert attempt("vserver-info", "-q", "nobody", "VDIR").stderr == ""


def test_info_describes_the_machine_and_its_tags(web: int) -> None:
    assert os.uname().release in run("vserver-info")
    assert run("vserver-info", "-", "SYSINFO") == run("vserver-info")
    assert "XIDTYPE" in run("vserver-info", "-l")


# --- lsxid


def test_owners_of_files(host: Host, web: int) -> None:
    root, other = host.etc.vdirbase / "web", host.etc.vdirbase / "off"
    (root / "etc/\x1b[31mred").touch()
    (root / "srv").mkdir(exist_ok=True)
    (root / "srv/away").symlink_to(other)
    shown = run("lsxid", "-R", "-a", os.fspath(root / "etc"), os.fspath(root / "srv"))
    assert f"{'web':<19} {root}/etc/passwd\n" in shown
    assert f"{'web':<19} {root}/etc/\\x1b[31mred\n" in shown
    assert f"{'web':<19} {root}/srv/away\n" in shown
    assert {line[:20].strip() for line in shown.splitlines()} == {"web"}
    both = run("lsxid", "-d", os.fspath(root), os.fspath(other), os.fspath(other / "bin"), "/etc")
    assert [line[:20].strip() for line in both.splitlines()] == ["web", "off", "off", "MAIN"]
    number = (host.etc.confdir / "off/context").read_text().strip()
    both = run("lsxid", "-d", "-n", os.fspath(root), os.fspath(other), "/etc")
    assert [line[:20].strip() for line in both.splitlines()] == [str(web), number, "0"]
    names = run("lsxid", os.fspath(host.etc.vdirbase))
    assert [line[:20].strip() for line in names.splitlines()] == ["db", "off", "web"]


def test_an_owner_that_cannot_be_found_out_is_an_error(host: Host, web: int) -> None:
    done = attempt("lsxid", "-d", "/etc", os.fspath(host.etc.vdirbase / "nothing"))
    assert done.returncode == 1
    assert "!!ERR!!" in done.stdout
    assert done.stdout.startswith("MAIN")
