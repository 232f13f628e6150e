"""A hostile guest and those who join it: nothing of the host is to be had.

The guests are made by unshare(1), so nothing but the joining itself is of the runtime.
"""

import os
import re
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from time import monotonic

import pytest

from tests.fixtures import attacker
from tests.fixtures.contexts import KEPT, Context, Wish, mask, perl_calls, starting
from tests.fixtures.joins import PROGRAM, background, command_of, environment, join
from tests.fixtures.persons import at_terminal
from tests.fixtures.probes import scaled
from tests.fixtures.witness import link, wait_until

Start = Callable[[Wish], Context]
start = pytest.fixture(starting)


@pytest.fixture
def web(start: Start) -> Context:
    """A guest that is configured with nothing."""
    return start(Wish())


# --- nothing of the host


def test_no_descriptor_but_three_new_pipes(web: Context, tmp_path: Path) -> None:
    own = tmp_path / "host file"
    own.write_text("of the host\n")
    script = "ls /proc/$$/fd; for fd in 0 1 2; do readlink /proc/$$/fd/$fd; done"

    folder_fd = os.open("/", os.O_RDONLY | os.O_DIRECTORY)
    with own.open("r+") as file:
        done = subprocess.run(
            [*PROGRAM, "exec", "web", "sh", "-c", script],
            stdin=file,
            stdout=subprocess.PIPE,
            stderr=file,
            text=True,
            check=True,
            pass_fds=[folder_fd, file.fileno()],
        )
    os.close(folder_fd)

    seen = done.stdout.split()
    assert seen[:3] == ["0", "1", "2"]
    assert len(set(seen[3:])) == 3
    assert all(re.fullmatch(r"pipe:\[\d+\]", target) for target in seen[3:])


def test_a_pipe_of_the_caller_stays_outside(web: Context) -> None:
    read_fd, write_fd = os.pipe()
    callers = {link(f"/proc/self/fd/{fd}") for fd in (read_fd, write_fd)}

    with os.fdopen(read_fd) as reader, os.fdopen(write_fd, "w") as writer:
        writer.write("readlink /proc/self/fd/0\nreadlink /proc/self/fd/1\n")
        writer.close()
        done = subprocess.run(
            [*PROGRAM, "exec", "web", "sh"],
            stdin=reader,
            capture_output=True,
            text=True,
            check=True,
        )

    assert len(done.stdout.split()) == 2
    assert not callers & set(done.stdout.split())


def test_a_user_can_open_its_output_anew(web: Context) -> None:
    done = join("suexec", "web", "bob", "sh", "-c", "echo one >/dev/fd/1; echo two >/dev/fd/2")

    assert (done.stdout, done.stderr) == ("one\n", "two\n")


@pytest.mark.parametrize("folder", ["gone", "fd"])
def test_the_callers_working_directory_does_not_matter(
    web: Context, tmp_path: Path, folder: str
) -> None:
    place = tmp_path / "host folder"
    place.mkdir()
    script = "pwd; cd ..; pwd; ls /proc/self/cwd/host* 2>&1"
    command = [*PROGRAM, "exec", "web", "sh", "-c", script]
    shell = 'rmdir "$0" && exec "$@"' if folder == "gone" else 'exec 9<"$0" && exec "$@"'

    done = subprocess.run(
        ["sh", "-c", shell, place, *command],
        capture_output=True,
        text=True,
        cwd=place,
        env=environment(),
        check=False,
    )

    assert done.stdout.startswith("/\n/\n"), done.stderr
    assert "No such file" in done.stdout


def test_a_signal_to_its_own_group_stays_inside(web: Context) -> None:
    done = join("exec", "web", "sh", "-c", "trap '' TERM; kill -TERM 0; echo alive")

    assert (done.returncode, done.stdout) == (0, "alive\n")
    assert join("exec", "web", "sh", "-c", "kill -KILL 0").returncode == 128 + signal.SIGKILL


def test_the_command_leads_a_session_of_the_guest(web: Context) -> None:
    stat = join("exec", "web", "cat", "/proc/self/stat").stdout.rpartition(")")[2].split()

    parent, group, session = (int(field) for field in stat[1:4])
    assert parent == 0
    assert group == session > 1


# --- roots that move


def test_a_root_that_was_swapped_on_the_host_does_not_matter(web: Context) -> None:
    web.root.rename(web.root.with_name("old"))
    web.root.symlink_to("/")

    seen = join("exec", "web", "sh", "-c", "cat /etc/passwd; ls /").stdout

    assert "bob:x:1000" in seen
    assert "init.pl" in seen


def test_the_root_of_the_guests_init_is_the_commands(start: Start) -> None:
    inner = 'mkdir "/inner"; mkdir "/inner/bin"; link "/bin/busybox", "/inner/bin/busybox"; '
    inner += 'link "/bin/busybox", "/inner/bin/ls"; chroot "/inner"; chdir "/";'
    start(Wish(before_ready=inner))

    assert join("exec", "web", "ls", "/").stdout == "bin\n"


def test_hostile_user_files_never_lead_to_the_hosts(start: Start) -> None:
    web = start(
        Wish(
            files={
                "attack.pl": """
                    link "/etc/passwd", "/etc/good"; open my $f, ">", "/attack.log"; close $f;
                    while (1) {
                        symlink "/../../../../../../../../etc/passwd", "/etc/bad";
                        rename "/etc/bad", "/etc/passwd";
                        symlink "../../../../proc/1/root/etc/passwd", "/etc/bad";
                        rename "/etc/bad", "/etc/passwd";
                        link "/etc/good", "/etc/bad"; rename "/etc/bad", "/etc/passwd";
                        unlink "/etc/bad";
                    }
                """
            }
        )
    )
    assert "\ngames:" in Path("/etc/passwd").read_text()  # the host has a user that the guest lacks
    wait_until(lambda: (web.root / "attack.log").exists())

    seen = [join("suexec", "web", "games", "id") for _ in range(scaled(8, 200))]

    assert {done.returncode for done in seen} == {125}
    assert not any(done.stdout for done in seen)


# --- every new process attacked


@pytest.mark.parametrize("more", [frozenset(), frozenset({"SYS_PTRACE"})], ids=["usual", "ptrace"])
def test_a_joining_process_never_has_what_the_guest_lacks(
    start: Start, more: frozenset[str]
) -> None:
    kept = KEPT | more
    web = start(Wish(kept=kept, files={"attack.pl": attacker.program()}))
    wait_until(lambda: bool(web.read("attack.log")))
    count = scaled(25, 1000)

    with attacker.on_top(web):
        for _ in _until(lambda: _has_tried(web, count)):
            done = join("times", str(count), "web", "/bin/true", timeout_s=100 + count)
            assert done.returncode == 0

    _check_catches(web, kept, count)


def test_one_at_a_terminal_does_not_either(start: Start) -> None:
    kept = KEPT | {"SYS_PTRACE"}
    web = start(Wish(kept=kept, files={"attack.pl": attacker.program()}))
    wait_until(lambda: bool(web.read("attack.log")))
    count = scaled(8, 200)

    command = [*PROGRAM, "times", str(count), "web", "/bin/true"]
    with attacker.on_top(web):
        for _ in _until(lambda: _has_tried(web, count) and _has_seen_terminal(web)):
            with at_terminal(command) as person:
                assert person.wait(timeout_s=100 + count) == 0

    _check_catches(web, kept, count)
    assert _has_seen_terminal(web)


def _until(condition: Callable[[], bool], *, at_least: int = 1) -> Iterator[None]:
    """So many turns, and more where the attacker came too late on a busy machine."""
    deadline = monotonic() + 60
    turns = 0
    while turns < at_least or (not condition() and monotonic() < deadline):
        turns += 1
        yield


def _has_tried(web: Context, count: int) -> bool:
    """Whether the attacker has jumped at a quarter of so many, and does what it can."""
    caught = attacker.catches(web)
    seized = sum(catch.seized for catch in caught)
    stubs = sum(catch.exe.startswith("/memfd:") for catch in caught)
    return min(seized, stubs) >= count // 4


def _has_seen_terminal(web: Context) -> bool:
    return any(catch.descriptors.get(0) == "/dev/pts/0" for catch in attacker.catches(web))


def _check_catches(web: Context, kept: frozenset[str], count: int) -> None:
    """The attacker has jumped at many of `count` joining processes, and got nothing by it."""
    own = {kind: link(f"/proc/{web.pid}/{kind}") for kind in ("ns/mnt", "ns/pid", "ns/uts")}
    assert _has_tried(web, count)
    for catch in attacker.catches(web):
        assert catch.exe in ("", "/memfd:init (deleted)", "/bin/busybox")
        assert not catch.exe_written
        assert all(bits & ~mask(kept) == 0 for bits in catch.capabilities.values())
        assert catch.is_filtered or not catch.capabilities
        assert set(catch.descriptors) <= {0, 1, 2, 3}
        assert all(
            target == "/dev/pts/0" or target.startswith("pipe:[")
            for target in catch.descriptors.values()
        )
        assert catch.links.get("root", "/") == catch.links.get("cwd", "/") == "/"
        assert all(catch.links.get(kind, own[kind]) == own[kind] for kind in own)


def test_the_attack_finds_a_careless_way_in(start: Start) -> None:
    web = start(Wish(kept=KEPT | {"SYS_PTRACE"}, files={"attack.pl": attacker.program()}))
    wait_until(lambda: bool(web.read("attack.log")))

    def has_way_in() -> bool:
        caught = attacker.catches(web)
        more = ~mask(KEPT | {"SYS_PTRACE"})
        return any(catch.exe.endswith("/nsenter") for catch in caught) and any(
            catch.capabilities.get("CapEff", 0) & more for catch in caught
        )

    with attacker.on_top(web):
        for _ in _until(has_way_in):
            subprocess.run(["nsenter", "-t", str(web.pid), "-a", "/bin/true"], check=True)

    assert has_way_in()


def test_forged_reports_do_not_make_us_signal_others(start: Start) -> None:
    """The report pipe is open in the command's process until it executes: an attacker can write."""
    victim = subprocess.Popen(["sleep", "60"])
    forge = f"""
        my %call = ({perl_calls()});
        open my $log, ">", "/attack.log"; close $log;
        my $forged = pack("ll", 1, {victim.pid}) x 3;
        my $last = $$;
        while (1) {{
            for my $pid ($last + 1 .. $last + 3) {{
                next unless syscall($call{{ptrace}}, 0x4206, $pid, 0, 0) == 0;
                syscall($call{{ptrace}}, 0x4207, $pid, 0, 0);
                waitpid $pid, 0x40000000;
                if (sysopen my $report, "/proc/$pid/fd/3", 1 | 04000) {{
                    syswrite $report, $forged;
                    open my $done, ">", "/forged"; close $done;
                }}
                syscall($call{{ptrace}}, 17, $pid, 0, 0);
                $last = $pid;
            }}
        }}
    """
    web = start(Wish(kept=KEPT | {"SYS_PTRACE"}, files={"attack.pl": forge}))
    wait_until(lambda: (web.root / "attack.log").exists())
    try:
        for _ in _until((web.root / "forged").exists, at_least=4):
            with attacker.on_top(web), background("exec", "web", "sleep", "60") as client:
                command_of(client.pid, "sleep")
                client.send_signal(signal.SIGTERM)
                client.wait(60)
        assert (web.root / "forged").exists()
        assert victim.poll() is None
    finally:
        victim.kill()
        victim.wait()
