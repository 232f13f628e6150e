"""The guests are made, and started as the administrator is told to; then the machine reboots."""

import subprocess
from pathlib import Path

from tests.fixtures.probes import need
from tests.fixtures.vservers import is_alive, run_installed
from tests.vm.shutdown.site import BY_HAND, MARKED, assert_started_in_order, grow, this_boot

pytestmark = need("systemd_host")


def test_guests_are_made_and_started_by_the_unit() -> None:
    journal = Path("/var/log/journal")  # journald(8) keeps what it has for the next boot
    journal.mkdir(exist_ok=True)
    subprocess.run(["journalctl", "--flush"], check=True, timeout=100)
    host = grow()
    said = run_installed("vservers", "install-unit").stdout
    assert said.splitlines()[-1] == "now: systemctl start vservers@default"
    subprocess.run(["systemctl", "start", "vservers@default"], check=True, timeout=300)
    assert_started_in_order(this_boot().replace("-", ""))
    host.vserver(BY_HAND, "start")
    assert all(is_alive(host.init_pid(name)) for name in (*MARKED, BY_HAND))
