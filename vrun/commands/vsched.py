"""vsched: the share of the processors that a guest has which runs."""

from typing import Any, Final

import click

from vrun import heldlimits
from vrun.commands import entry
from vrun.commands.entry import guest_option
from vrun.commands.plain import say
from vrun.errors import WrongUsage
from vrun.heldlimits import Share, count_cpus, find_group
from vrun.spec import CpuLimit
from vstore.cli import version_option

_MOST: Final = (1 << 31) - 1
_COUNT: Final = click.IntRange(1, _MOST)


@click.command("vsched", context_settings=entry.WIDTH)
@guest_option
@click.option("--fill-rate", type=_COUNT, metavar="N", help="So many ticks of each cpu ...")
@click.option("--interval", type=_COUNT, metavar="N", help="... in so many.")
@click.option("--tokens-max", type=_COUNT, metavar="N", help="Ticks of 1 ms that it may save up.")
@click.option("--prio-bias", type=click.IntRange(-20, 19), metavar="N", help="As a nice level.")
@click.option("--no-limit", is_flag=True, help="All that is free.")
@version_option
def command(
    *,
    xid: str,
    fill_rate: int | None,
    interval: int | None,
    tokens_max: int | None,
    prio_bias: int | None,
    no_limit: bool,
) -> int:
    """Show or change the share of the processors that a guest has, until it stops.

    It may use fill-rate / interval of each cpu.
    """
    given: dict[str, Any] = {"fill_rate": fill_rate, "interval": interval}
    if (fill_rate is None) != (interval is None):
        raise WrongUsage("--fill-rate and --interval belong together")
    if tokens_max is not None and fill_rate is None:
        raise WrongUsage("--tokens-max belongs to a --fill-rate and an --interval")
    if no_limit and fill_rate is not None:
        raise WrongUsage("--no-limit and --fill-rate exclude each other")
    group = find_group(xid)
    if no_limit:
        heldlimits.lift_cpu(group)
    if fill_rate is not None or prio_bias is not None:
        limit = CpuLimit(**given, burst_ticks=tokens_max, weight_nice=prio_bias)
        heldlimits.change_cpu(group, limit, cpus=count_cpus(group))
    if not no_limit and fill_rate is None and prio_bias is None:
        say(_as_text(heldlimits.read_share(group), count_cpus(group)))
    return 0


def _as_text(share: Share | None, cpus: int) -> str:
    if share is None or share.quota_us is None:
        return f"no limit on {cpus} cpus"
    part = share.quota_us / share.period_us / cpus
    return f"{part:.1%} of each of {cpus} cpus; kept waiting in {share.throttled} periods"


def main() -> None:
    """The console script."""
    entry.run(command)
