"""Compare `vunify` with the programs that link equal files too. Needs root and some 20 GB of disk.

    python -m bench unify                 real guests: times, bytes reclaimed, memory
    python -m bench scale --kind mix      seeded trees: 100,000 and 1,000,000 files
    python -m bench start --repeat 20     a guest beside systemd-nspawn, runc, ...; 50 at once
    python -m bench cow                   a guest that shares its files, beside one that does not
    python -m bench copy                  a guest to another machine, beside rsync and tar
    python -m bench growth                disk use of one guest more, and one more
    python -m bench all                   each of these, some two hours, and then:
    python -m bench index                 one page and charts of the reports that are there

Reports go to bench/reports/ as Markdown and JSON. A text NAME.notes.md beside them becomes part
of the Markdown.
"""

import argparse
import compileall
import logging
import os
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, NoReturn

import vrun
import vstore
from bench import (
    cases,
    charts,
    copies,
    copyreport,
    cow,
    growth,
    index,
    machine,
    report,
    startreport,
    starts,
)
from bench.calls import BenchError
from bench.cases import Options, Results
from bench.figures import Target, scale_targets, unify_targets
from bench.images import FILE_SYSTEMS, enter_mount_namespace
from bench.report import Listed, Report
from bench.rivals import PROGRAMS, VUNIFY, Program
from bench.seeded import KINDS
from tests.fixtures.filesystems import scratch

log = logging.getLogger("bench")

_REPORTS: Final = Path(__file__).parent / "reports"
_CASES: Final = {"unify": cases.unify, "scale": cases.scale}
_START: Final = "start"
_COW: Final = "cow"
_COPY: Final = "copy"
_GROWTH: Final = "growth"
_INDEX: Final = "index"
_ALL: Final = "all"
_EACH: Final = {
    "unify": (),
    "scale": ("--repeat", "1"),
    _GROWTH: (),
    _START: ("--repeat", "20"),
    _COW: ("--fs", "ext4"),
    _COPY: (),
    _INDEX: (),
}
"""What `all` does, with the options that the committed reports were made with."""


def main(arguments: Sequence[str]) -> int:
    """Run one case; gives the exit code: 0 done (whatever the figures say), 1 could not run."""
    todo = cases_of(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    try:
        _check(todo)
        enter_mount_namespace(list(arguments))
        return max([_run_case(chosen) for chosen in todo])
    except BenchError as error:
        log.error("bench: %s", error)
        return 1
    except KeyboardInterrupt:
        log.warning("bench: interrupted; nothing is left behind")
        return 130


def _run_case(options: argparse.Namespace) -> int:
    """Its exit code: one that could not run does not keep the others from it."""
    try:
        _RUNNERS.get(options.case, _run)(options)
    except BenchError as error:
        log.error("bench: %s: %s", options.case, error)
        return 1
    return 0


def cases_of(arguments: Sequence[str]) -> list[argparse.Namespace]:
    """The one case, or all of them; what was asked for goes before what is usual."""
    options = _parse(arguments)
    if options.case != _ALL:
        return [options]
    asked = [word for word in arguments if word != _ALL]
    return [_parse([case, *usual, *asked]) for case, usual in _EACH.items()]


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("case", choices=sorted([*_EACH, _ALL]))
    add("--size", choices=("small", "full"), default="full")
    add("--repeat", type=int, default=3, metavar="N", help="rounds in turn (default 3)")
    add("--fs", choices=FILE_SYSTEMS, default="xfs", help="file system of the trees (default xfs)")
    add("--out", type=Path, default=_REPORTS, metavar="DIR", help="where reports go")
    add(
        "--work",
        type=Path,
        metavar="DIR",
        help="where images go (default: VTEST_TMP, else /var/tmp)",
    )
    add(
        "--kind",
        action="append",
        choices=sorted(KINDS),
        help="scale: these trees (default: equal, different, mix)",
    )
    names = [program.name for program in (*PROGRAMS, *starts.STARTERS)]
    add("--program", action="append", choices=names, help="these programs only")
    add(
        "--timeout",
        type=float,
        default=1800,
        metavar="S",
        help="seconds for one pass (default 1800)",
    )
    return parser.parse_args(arguments)


def _check(todo: Sequence[argparse.Namespace]) -> None:
    """Before the first begins: what the last one lacks would be found after hours."""
    if os.geteuid():
        raise BenchError("it mounts file systems and links as root does: run it as root")
    needed = dict.fromkeys(name for options in todo for name in needs_of(options))
    missing = [name for name in needed if shutil.which(name) is None]
    if missing:
        raise BenchError(f"not installed: {', '.join(missing)}")
    if any(options.case == _INDEX for options in todo):
        charts.check()


def needs_of(options: argparse.Namespace) -> list[str]:
    """The programs without which the case cannot run."""
    needed = ["unshare", "mount"]
    if options.case == _START:
        needed.append("busybox")
    elif options.case != _INDEX:
        needed.append(f"mkfs.{options.fs}")
    if options.case in ("unify", _COPY, _GROWTH):
        needed += ["debootstrap", "tar"]
    if options.case == _COPY:
        needed += ["ip", "tc", "rsync", "zstd", "ssh", "dpkg-deb"]
    return needed


def _run(options: argparse.Namespace) -> None:
    load = os.getloadavg()[0]
    compileall.compile_dir(Path(vstore.__file__).parent, quiet=1)  # as after a user's first run
    programs = _chosen_programs(options)
    wanted = Options(
        size=options.size,
        rounds=options.repeat,
        file_system=options.fs,
        work=options.work or scratch(),
        programs=[one for one in programs if one.find() is not None],
        kinds=options.kind or cases.SCALE_KINDS,
        timeout_s=options.timeout,
    )
    results = _CASES[options.case](wanted)
    name = _report_name(options)
    made = Report(
        case=options.case,
        size=options.size,
        day=datetime.now(UTC).date().isoformat(),
        rounds=options.repeat,
        machine=machine.look(file_system=options.fs, load_before=load),
        programs=[_listed(program) for program in programs],
        runs=results.runs,
        targets=_targets(options.case, results, wanted),
        ledger=results.ledger,
        notes=_notes(options.out / f"{name}.notes.md"),
    )
    report.write(made, options.out, name)
    sys.stdout.write(report.show_targets(made.targets))


def _run_starts(options: argparse.Namespace) -> None:
    load = os.getloadavg()[0]
    for folder in (*vstore.__path__, *vrun.__path__):
        compileall.compile_dir(folder, quiet=1)
    chosen = [one for one in starts.STARTERS if one.name in (options.program or [one.name])]
    work = options.work or scratch()
    installed = [one for one in chosen if one.find() is not None]
    results = starts.measure(installed, options.repeat, work)
    made = startreport.StartReport(
        day=datetime.now(UTC).date().isoformat(),
        rounds=options.repeat,
        machine=replace(
            machine.look(file_system="", load_before=load), file_system="that of the scratch folder"
        ),
        programs=[one.list() for one in chosen],
        results=results,
        targets=starts.targets(results),
        notes=_notes(options.out / f"{_START}.notes.md"),
    )
    startreport.write(made, options.out, _START)
    sys.stdout.write(report.show_targets(made.targets))


def _run_cow(options: argparse.Namespace) -> None:
    load = os.getloadavg()[0]
    for folder in (*vstore.__path__, *vrun.__path__):
        compileall.compile_dir(folder, quiet=1)
    results = cow.measure(options.repeat, options.fs, is_small=options.size == "small")
    name = _report_name(options)
    made = cow.CowReport(
        day=datetime.now(UTC).date().isoformat(),
        rounds=options.repeat,
        machine=machine.look(file_system=options.fs, load_before=load),
        results=results,
        targets=cow.targets(results),
        notes=_notes(options.out / f"{name}.notes.md"),
    )
    cow.write(made, options.out, name)
    sys.stdout.write(report.show_targets(made.targets))


def _run_copies(options: argparse.Namespace) -> None:
    load = os.getloadavg()[0]
    compileall.compile_dir(Path(vstore.__file__).parent, quiet=1)
    work = options.work or scratch()
    results = copies.measure(size=options.size, rounds=options.repeat, work=work)
    name = _COPY if options.size == "full" else f"{_COPY}-{options.size}"
    made = copyreport.CopyReport(
        day=datetime.now(UTC).date().isoformat(),
        size=options.size,
        rounds=options.repeat,
        machine=machine.look(file_system="xfs", load_before=load),
        results=results,
        targets=copies.targets(results),
        notes=_notes(options.out / f"{name}.notes.md"),
    )
    copyreport.write(made, options.out, name)
    sys.stdout.write(report.show_targets(made.targets))


def _run_growth(options: argparse.Namespace) -> None:
    load = os.getloadavg()[0]
    steps = growth.measure(options.size, options.fs, options.work or scratch())
    name = _report_name(options)
    made = growth.GrowthReport(
        day=datetime.now(UTC).date().isoformat(),
        size=options.size,
        machine=machine.look(file_system=options.fs, load_before=load),
        steps=steps,
        notes=_notes(options.out / f"{name}.notes.md"),
    )
    growth.write(made, options.out, name)


def _write_index(options: argparse.Namespace) -> None:
    index.write(options.out)


_RUNNERS: Final[dict[str, Callable[[argparse.Namespace], None]]] = {
    _START: _run_starts,
    _COW: _run_cow,
    _COPY: _run_copies,
    _GROWTH: _run_growth,
    _INDEX: _write_index,
}


def _chosen_programs(options: argparse.Namespace) -> list[Program]:
    """Those that were asked for, installed or not; `scale` leaves out what would take hours."""
    names = {one.name for one in PROGRAMS} if options.program is None else set(options.program)
    if options.case == "scale":
        names &= set(cases.SCALE_PROGRAMS)
    return [one for one in PROGRAMS if one.name in names]


def _targets(case: str, results: Results, options: Options) -> list[Target]:
    if case == "scale":
        return scale_targets(results.runs, options.kinds)
    peers = [program.name for program in options.programs if program.name != VUNIFY]
    return unify_targets(results.runs, peers, results.ledger)


def _listed(program: Program) -> Listed:
    return Listed(
        name=program.name,
        shown=program.shown,
        version=program.find_version(),
        package=program.package,
        is_missing=program.find() is None,
    )


def _report_name(options: argparse.Namespace) -> str:
    """`unify` for the full size on xfs; whatever else was asked for shows in the name."""
    marks = [options.case]
    marks += [options.fs] if options.fs != "xfs" else []
    marks += [options.size] if options.size != "full" else []
    return "-".join(marks)


def _notes(path: Path) -> str:
    return path.read_text() if path.exists() else ""


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
