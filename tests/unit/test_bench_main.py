"""python -m bench: what a command line means."""

from bench.__main__ import cases_of, needs_of


def _needs(*arguments: str) -> set[str]:
    return {name for options in cases_of(arguments) for name in needs_of(options)}


def test_all_asks_at_once_for_what_its_last_case_needs() -> None:
    names = ("unify", "scale", "growth", "start", "copy", "index")
    assert _needs("all") == set().union(*map(_needs, names), _needs("cow", "--fs", "ext4"))
    assert {"busybox", "mkfs.ext4", "mkfs.xfs", "ssh"} <= _needs("all")


def test_what_was_asked_for_goes_before_what_is_usual() -> None:
    usual = {options.case: options for options in cases_of(["all"])}
    assert (usual["start"].repeat, usual["scale"].repeat, usual["unify"].repeat) == (20, 1, 3)
    assert (usual["cow"].fs, usual["unify"].fs) == ("ext4", "xfs")
    asked = cases_of(["all", "--repeat", "2", "--size", "small", "--fs", "btrfs"])
    assert {(one.repeat, one.size, one.fs) for one in asked} == {(2, "small", "btrfs")}
