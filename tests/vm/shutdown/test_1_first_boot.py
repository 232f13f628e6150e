"""The guests are made, and started as the administrator is told to; then the machine reboots."""

import subprocess
from pathlib import Path

from tests.fixtures.probes import need
from tests.fixtures.vservers import is_alive, run_installed
from tests.vm.shutdown.site import (
    BY_HAND,
    MARKED,
    PATIENCE_S,
    assert_started_in_order,
    grow,
    this_boot,
)

pytestmark = need("systemd_host")


def test_guests_are_made_and_started_by_the_unit() -> None:
    journal = Path("/var/log/journal")  # journald(8) keeps what it has for the next boot
    journal.mkdir(exist_ok=True)
    subprocess.run(["journalctl", "--flush"], check=True, timeout=PATIENCE_S)
    host = grow()
    said = run_installed("vservers", "install-unit", timeout_s=PATIENCE_S).stdout
    assert said.splitlines()[-1] == "now: systemctl start vservers@default"
    start = ["systemctl", "start", "vservers@default"]
    subprocess.run(start, check=True, timeout=PATIENCE_S)
    assert_started_in_order(this_boot().replace("-", ""))
    host.vserver(BY_HAND, "start", timeout_s=PATIENCE_S)
    assert all(is_alive(host.init_pid(name)) for name in (*MARKED, BY_HAND))
