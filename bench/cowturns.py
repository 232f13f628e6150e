"""Work that places do by turns, in many short rounds: tar, sqlite, PostgreSQL.

A process waits in each place all the time; the places do the same piece of work one right after the
other, beginning with another one each round. So that a ratio of two places compares what was done
within a second or two, whatever else the machine has to do; the figure is the middle of all ratios.
"""

import json
import logging
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Final

log = logging.getLogger(__name__)

TAR: Final = "unpack a tar"
SQLITE: Final = "sqlite"
SQLITE_WAL: Final = "sqlite with a write-ahead log"
PGBENCH: Final = "pgbench, one transaction"
JOBS: Final = (TAR, SQLITE, SQLITE_WAL, PGBENCH)
_ROUNDS: Final = {TAR: 9, SQLITE: 41, SQLITE_WAL: 41, PGBENCH: 31}
_FEW_ROUNDS: Final = 3
_ENDS_WITHIN_S: Final = 60.0

_SCRIPT: Final = r"""
import glob, json, os, re, shutil, sqlite3, subprocess, sys, time
rows, transactions = map(int, sys.argv[1:])
HOME = "/srv/turns"
BIN = max(glob.glob("/usr/lib/postgresql/*/bin"), default="")
shutil.rmtree(HOME, ignore_errors=True)
os.makedirs(HOME)

def run(*argv, **how):
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, **how)
    if done.returncode:
        raise OSError(f"{argv[0]}: {done.returncode}: {done.stderr[-200:]}")
    return done.stdout

def tar():
    shutil.rmtree(HOME + "/out", ignore_errors=True)
    os.mkdir(HOME + "/out")
    began = time.perf_counter()
    run("tar", "-xf", "/srv/files.tar", "-C", HOME + "/out")
    return time.perf_counter() - began

def sqlite(journal="delete"):
    path = HOME + "/base.sqlite"
    for left in glob.glob(path + "*"):
        os.unlink(left)
    began = time.perf_counter()
    base = sqlite3.connect(path, isolation_level=None)
    base.execute("pragma journal_mode = " + journal)
    base.execute("create table t (a integer primary key, b text)")
    for number in range(rows // 500):
        base.execute("insert into t values (?, ?)", (number, "x" * 100))
    base.execute("begin")
    for number in range(rows, rows * 2):
        base.execute("insert into t values (?, ?)", (number, "x" * 100))
    base.execute("commit")
    base.close()
    return time.perf_counter() - began

server = []

def postgres(name, *arguments):
    return run(f"{BIN}/{name}", *arguments, cwd=HOME, user="postgres", group="postgres",
               extra_groups=[], env={"LC_ALL": "C", "PGHOST": HOME, "PATH": "/usr/bin:/bin"})

def pgbench():
    if not server:
        shutil.chown(HOME, "postgres", "postgres")
        postgres("initdb", "-D", HOME + "/data", "--no-sync")
        with open(HOME + "/data/postgresql.conf", "a") as settings:
            settings.write(f"listen_addresses=''\nunix_socket_directories='{HOME}'\njit=off\n"
                           "dynamic_shared_memory_type=mmap\nautovacuum=off\n"
                           "checkpoint_timeout=1h\nmax_wal_size=4GB\n")
        server.append(HOME + "/data")
        postgres("pg_ctl", "-D", HOME + "/data", "-w", "-l", HOME + "/log", "start")
        postgres("createdb", "bench")
        postgres("pgbench", "-i", "-q", "-s", "2", "bench")
    said = postgres("pgbench", "-n", "-c", "1", "-t", str(transactions), "bench")
    return 1 / float(re.search(r"tps = ([0-9.]+)", said)[1])

jobs = {"unpack a tar": tar, "sqlite": sqlite, "pgbench, one transaction": pgbench,
        "sqlite with a write-ahead log": lambda: sqlite("wal")}
print(flush=True)
for line in sys.stdin:
    try:
        print(json.dumps(jobs[line.strip()]()), flush=True)
    except Exception as error:
        print(json.dumps(f"{error!r}"[:300]), flush=True)
for data in server:
    postgres("pg_ctl", "-D", data, "-m", "immediate", "stop")
shutil.rmtree(HOME, ignore_errors=True)
"""


@dataclass(frozen=True, slots=True)
class Turn:
    """One piece of work in one place."""

    what: str
    place: str
    round: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Turns:
    done: Sequence[Turn]
    missing: Mapping[str, str]
    """Work in a place ("WHAT, PLACE") that could not be done, and why."""

    def ratios(self, what: str, ours: str, theirs: str) -> list[float]:
        """By round, how many times as long it took here as there."""
        mine = self._by_round(what, ours)
        others = self._by_round(what, theirs)
        return [mine[number] / others[number] for number in sorted(mine.keys() & others.keys())]

    def all(self, what: str, place: str) -> list[float]:
        """Seconds, in the order of the rounds."""
        return list(self._by_round(what, place).values())

    def _by_round(self, what: str, place: str) -> dict[int, float]:
        return {
            turn.round: turn.seconds
            for turn in self.done
            if turn.what == what and turn.place == place
        }


def measure(
    commands: Mapping[str, Sequence[str]], environment: Mapping[str, str], *, is_small: bool
) -> Turns:
    """`commands`: what runs a program in each place, to which the program's words are added."""
    done: list[Turn] = []
    missing: dict[str, str] = {}
    sizes = ("2000", "20") if is_small else ("10000", "200")
    with ExitStack() as stack:
        workers = {
            place: stack.enter_context(
                _worker([*command, "python3", "-c", _SCRIPT, *sizes], environment)
            )
            for place, command in commands.items()
        }
        for what in JOBS:
            for number in range(_FEW_ROUNDS if is_small else _ROUNDS[what]):
                for place in _turned(list(workers), number):
                    if f"{what}, {place}" in missing:
                        continue
                    answer = _ask(workers[place], what)
                    if isinstance(answer, float):
                        done.append(Turn(what, place, number + 1, answer))
                    else:
                        missing[f"{what}, {place}"] = answer
                        log.warning("%s in %s: %s", what, place, answer)
            log.info("by turns, %s: done", what)
    return Turns(done, missing)


def _turned(places: list[str], number: int) -> list[str]:
    first = number % len(places)
    return places[first:] + places[:first]


@contextmanager
def _worker(
    argv: Sequence[str], environment: Mapping[str, str]
) -> Iterator["subprocess.Popen[str]"]:
    """A process that does what it is told line by line, and ends when nothing more can come."""
    process = subprocess.Popen(
        argv,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        bufsize=1,
    )
    try:
        yield process
    finally:
        if process.stdin:
            process.stdin.close()
        try:
            process.wait(_ENDS_WITHIN_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdout:
            process.stdout.close()


def _ask(worker: "subprocess.Popen[str]", what: str) -> float | str:
    """The seconds, or why there are none."""
    try:
        if worker.stdin is None or worker.stdout is None:
            return "it was given no pipes"
        worker.stdin.write(f"{what}\n")
        while line := worker.stdout.readline():
            if line.strip():
                found = json.loads(line)
                return float(found) if isinstance(found, (int, float)) else str(found)
    except (OSError, ValueError) as error:
        return str(error)
    return "its process has ended"
