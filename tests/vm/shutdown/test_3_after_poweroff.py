"""The machine was turned off with guests that ran, after a boot that had started them."""

from tests.fixtures.probes import need
from tests.vm.shutdown.site import assert_stopped_cleanly, assert_stopped_in_order, last_boot

pytestmark = need("systemd_host")


def test_the_poweroff_stopped_all_guests_in_their_order() -> None:
    assert_stopped_in_order(last_boot())


def test_the_poweroff_cut_no_guest_short() -> None:
    assert_stopped_cleanly(last_boot())
