"""vserver-copy: copy a guest, to another machine or on this one."""

import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import click

from vstore import cli
from vstore.copy.access import Access, Session
from vstore.copy.messages import Request
from vstore.copy.order import Order, Place, Report, check, parse_place
from vstore.errors import EXIT_PARTIAL, ToolError, WrongUsage
from vstore.progress import SILENT
from vstore.render import ProgressBar, show_name, show_size, show_table, show_text

PROGRAM: Final = "vserver-copy"

_RATE = re.compile(r"([0-9]+(?:\.[0-9]+)?)([kKmMgG]?)(?:i?[bB])?(/s)?")
_FACTORS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30}
_FILE = click.Path(path_type=Path)


def _parse_rate(context: click.Context, parameter: click.Parameter, value: str | None) -> int:
    if value is None:
        return 0
    found = _RATE.fullmatch(value.strip())
    if found is None:
        raise click.BadParameter("bytes a second, such as 500k, 10M or 1.5G")
    return int(float(found[1]) * _FACTORS[found[2].lower()])


def _parse_level(context: click.Context, parameter: click.Parameter, value: str) -> int:
    if value == "auto":
        return -1
    if value == "none":
        return 0
    if value.isdecimal() and 1 <= int(value) <= 19:
        return int(value)
    raise click.BadParameter("auto, none, or a level of zstd from 1 to 19")


def _parse_context(context: click.Context, parameter: click.Parameter, value: str | None) -> int:
    if value is None:
        return 0
    if value == "auto":
        return -1
    if value.isdecimal() and int(value):
        return int(value)
    raise click.BadParameter("a number, or auto")


@click.command(PROGRAM)
@click.argument("source", metavar="SOURCE", required=False, shell_complete=cli.complete_guest)
@click.argument("target", metavar="TARGET", required=False)
@click.option("--stop", is_flag=True, help="Stop the guest for a last pass; say how long it was.")
@click.option("--start", is_flag=True, help="Start the copy at the end.")
@click.option("--refresh", is_flag=True, help="Bring a copy that is there up to date.")
@click.option("--dry-run", "-n", is_flag=True, help="Say what would be sent; change nothing.")
@click.option("--ip", "ips", metavar="A[/P]", multiple=True, help="The copy's address.")
@click.option(
    "--interface", "interfaces", metavar="DEV:A/P", multiple=True, help="The same, with device."
)
@click.option("--hostname", metavar="NAME", default="", help="The copy's host name.")
@click.option(
    "--context", metavar="N|auto", callback=_parse_context, help="The copy's context number."
)
@click.option(
    "--bwlimit", "rate", metavar="RATE", callback=_parse_rate, help="Bytes a second at most: 10M."
)
@click.option(
    "--compress",
    metavar="auto|N|none",
    default="auto",
    callback=_parse_level,
    help="Level of zstd; auto follows the link.",
)
@click.option("--verify", is_flag=True, help="Read all that was made once more before it counts.")
@click.option("--keep-going", is_flag=True, help="Copy the rest where some files cannot be.")
@click.option("-p", "--port", metavar="PORT", type=click.IntRange(1, 65535), help="The ssh port.")
@click.option(
    "-i", "--identity", "identities", metavar="FILE", multiple=True, type=_FILE, help="A key."
)
@click.option(
    "-F", "--ssh-config", metavar="FILE", type=_FILE, help="Instead of ~/.ssh/config and /etc/ssh."
)
@click.option("--known-hosts", metavar="FILE", type=_FILE, help="Instead of the usual files.")
@click.option("--accept-new", is_flag=True, help="Note the key of a host that is unknown.")
@click.option(
    "--remote-command", metavar="CMD", default=PROGRAM, help="The program on the other machine."
)
@click.option(
    "--serve", "is_server", is_flag=True, help="Serve on stdin and stdout, for the other."
)
@cli.json_option
@click.option("-q", "--quiet", is_flag=True, help="No table, no progress bar, no questions.")
@cli.verbose_option
@cli.version_option
def command(
    *,
    source: str | None,
    target: str | None,
    is_server: bool,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> int:
    """Copy the guest SOURCE to TARGET, sending only what is lacking there.

    Each is a guest's name, and one of them may stand on another machine that ssh
    reaches: [user@]HOST:NAME; HOST: alone means the same name. The copy is whole
    or not there: an older one stays until the new one takes its place.
    """
    if is_server:
        return _serve()
    if not source or not target:
        raise WrongUsage("SOURCE and TARGET are needed", hint="see: vserver-copy --help")
    order = _make_order(source, target, quiet=quiet, **options)
    try:
        report = _copy(order, shows_progress=not quiet and not as_json)
    except ToolError as error:
        for line in getattr(error, "lines", ()):
            click.echo(f"    {show_text(line)}", err=True)
        raise
    finally:
        if order.session is not None:
            order.session.close()
    _say(order, report, as_json=as_json, quiet=quiet)
    result = report.result
    return EXIT_PARTIAL if result.error_count or result.torn else 0


def _copy(order: Order, *, shows_progress: bool) -> Report:
    from vstore.copy.copying import copy_guest  # 40 ms in which the other machine is called

    if not shows_progress:
        return copy_guest(order, SILENT)
    with ProgressBar() as bar:
        return copy_guest(order, bar)


def _serve() -> int:
    """The protocol has stdout for itself; whatever else writes there goes to stderr."""
    from vstore.copy.peer import serve

    read_fd, write_fd = os.dup(0), os.dup(1)
    nowhere = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nowhere, 0)
    os.dup2(2, 1)
    os.close(nowhere)
    return serve(read_fd, write_fd, peer="the other side")


def _make_order(source: str, target: str, *, quiet: bool, **options: Any) -> Order:
    origin, copy = parse_place(source), parse_place(target)
    if not copy.name and copy.host:
        copy = Place(copy.host, copy.user, origin.name)
    if not origin.name and origin.host:
        origin = Place(origin.host, origin.user, copy.name)
    request = Request(
        task="",
        source=origin.name,
        target=copy.name,
        refresh=options["refresh"],
        dry_run=options["dry_run"],
        verify=options["verify"],
        keep_going=options["keep_going"],
        compress=options["compress"],
        rate=options["rate"],
        hostname=options["hostname"],
        addresses=[*options["ips"], *options["interfaces"]],
        context=options["context"],
    )
    order = Order(origin, copy, request, stop=options["stop"], start=options["start"])
    check(order)
    if origin.host or copy.host:
        place = origin if origin.host else copy
        access = Access(
            place.host,
            place.user,
            options["port"] or 0,
            options["identities"],
            options["ssh_config"],
            options["known_hosts"],
            options["accept_new"],
            may_ask=not quiet,
        )
        command = f"{options['remote_command']} --serve"
        order = replace(order, session=Session(access, command))
    return order


def _say(order: Order, report: Report, *, as_json: bool, quiet: bool) -> None:
    result = report.result
    for line in report.warnings:
        click.echo(show_text(f"{PROGRAM}: {line}"), err=True)
    for path, reason in (*result.torn, *result.errors):
        click.echo(f"{PROGRAM}: {show_name(path)}: {show_text(reason)}", err=True)
    if as_json:
        click.echo(json.dumps(_as_json(order, report)))
    elif not quiet:
        click.echo(_as_text(order, report))


def _as_json(order: Order, report: Report) -> dict[str, object]:
    result = report.result
    down = report.downtime_s
    return {
        "format": 1,
        "target": order.target.shown,
        "path": result.path,
        "context": result.context or None,
        "dry_run": order.request.dry_run,
        "same": result.same,
        "files": result.files,
        "files_sent": report.files_sent,
        "bytes_total": result.bytes_total,
        "bytes_already_there": report.bytes_already_there,
        "bytes_lacking": report.bytes_lacking,
        "bytes_sent": report.bytes_sent,
        "bytes_received": report.bytes_received,
        "linked": result.linked,
        "changed": [[show_name(path), reason] for path, reason in result.torn],
        "errors": [[show_name(path), reason] for path, reason in result.errors],
        "seconds": round(report.seconds, 3),
        "downtime_seconds": None if down is None else round(down, 3),
    }


def _as_text(order: Order, report: Report) -> str:
    result = report.result
    if result.same and report.passes == 1:
        return f"{order.target.shown}: nothing to do: {result.files} files are as they are there"
    sent, received = report.bytes_sent, report.bytes_received
    travelled = max(1, sent + received)
    rows = [
        ("files", f"{result.files}"),
        ("would be sent" if order.request.dry_run else "files sent", f"{report.files_sent}"),
        ("bytes", show_size(result.bytes_total)),
        ("already there", show_size(report.bytes_already_there)),
        ("lacking", show_size(report.bytes_lacking)),
        ("sent", show_size(sent)),
        ("received", show_size(received)),
        ("ratio", f"{result.bytes_total / travelled:.1f}"),
        ("links to objects", f"{result.linked}"),
        ("seconds", f"{report.seconds:.1f}"),
    ]
    if report.downtime_s is not None:
        rows.append(("seconds down", f"{report.downtime_s:.1f}"))
    if result.error_count:
        rows.append(("errors", f"{result.error_count}"))
    return show_table(rows, (f"copy {show_name(order.target.shown)}", ""))


def main() -> None:
    """The console script."""
    cli.run(command)
