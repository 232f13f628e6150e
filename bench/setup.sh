#!/bin/sh
# Install what a make target needs: missing Debian packages, and .venv with this checkout.
#
#   bench/setup.sh demo|test|lint|bench|test-vm|all
#
# When all is there it asks dpkg once, compares one hash and ends. Run by hand it does the same.
set -eu
cd "$(dirname "$0")/.."
target=${1:?"usage: bench/setup.sh demo|test|lint|bench|test-vm|all"}

# pyxattr comes as source, hence the compiler.
venv="python3-venv python3-dev gcc libc6-dev"
guests="debootstrap debian-archive-keyring zstd e2fsprogs mount util-linux libseccomp2"
filesystems="xfsprogs btrfs-progs acl attr libcap2-bin"
contexts="busybox-static iproute2"
witnesses="groff-base lxcfs procps psmisc strace systemd tmux"
copies="openssh-client openssh-server rsync"
rivals="jdupes rdfind systemd-container bubblewrap runc lxc"
machine="qemu-system-x86 qemu-system-arm"
case $target in
    lint) packages=$venv ;;
    demo) packages="$venv $guests $copies iproute2" ;;
    test) packages="$venv $guests $filesystems $contexts $copies $witnesses" ;;
    bench) packages="$venv $guests $filesystems $contexts $copies $rivals" ;;
    test-vm) packages="$venv $guests $filesystems $contexts $copies $machine" ;;
    all) packages="$venv $guests $filesystems $contexts $copies $witnesses $rivals $machine" ;;
    *) echo "setup: no such target: $target" >&2; exit 2 ;;
esac

log=$(mktemp)
trap 'rm -f "$log"' EXIT

stop() {  # stop MESSAGE HINT
    echo "setup: $1" >&2
    echo "hint: $2" >&2
    exit 1
}

stop_with_log() {
    tail -n 15 "$log" >&2
    stop "$@"
}

missing_packages() {
    # shellcheck disable=SC2086 # the list is meant to be split
    present=$(dpkg-query -W -f '${Package} ${db:Status-Status}\n' $packages 2>/dev/null |
        sed -n 's/ installed$//p')
    for package in $packages; do
        echo "$present" | grep -qxF "$package" || printf '%s ' "$package"
    done
}

apt_install() {
    no_services
    DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends \
        -o DPkg::Lock::Timeout=300 "$@" >"$log" 2>&1 || return
    case " $* " in  # the tests run an sshd of their own: the machine's is only there for its files
        *" openssh-server "*)
            deb-systemd-helper disable ssh.service >/dev/null 2>&1 || true
            update-rc.d ssh disable >/dev/null 2>&1 || true ;;
    esac
}

no_services() {  # what is installed is not started; see invoke-rc.d(8)
    [ ! -e /usr/sbin/policy-rc.d ] || return 0
    printf '#!/bin/sh\nexit 101\n' >/usr/sbin/policy-rc.d
    chmod 755 /usr/sbin/policy-rc.d
    trap 'rm -f "$log" /usr/sbin/policy-rc.d' EXIT
}

install_packages() {
    if ! command -v dpkg-query >/dev/null || ! command -v apt-get >/dev/null; then
        echo "setup: no apt-get here; what these Debian packages hold is needed: $packages" >&2
        return
    fi
    missing=$(missing_packages)
    [ -n "$missing" ] || return 0
    [ "$(id -u)" = 0 ] || stop "these Debian packages are missing: $missing" \
        "install them, or run make $target as root"
    echo "setup: installing Debian packages: $missing"
    # shellcheck disable=SC2086
    apt_install $missing && return
    apt-get update -q >"$log" 2>&1 || stop_with_log "apt-get update: no package mirror answers" \
        "see /etc/apt/sources.list and sources.list.d, or install by hand: $missing"
    # shellcheck disable=SC2086
    apt_install $missing || stop_with_log "apt-get cannot install: $missing" \
        "see that /etc/apt/sources.list names a mirror that answers, or install them by hand"
}

find_python() {
    for python in /usr/bin/python3 python3; do
        if "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$python"
            return
        fi
    done
    stop "no Python 3.11 or newer: $(python3 --version 2>&1)" \
        "Debian 12 and 13 have one; on older systems put it first on PATH"
}

install_venv() {
    python=$(find_python)
    base=$("$python" -c 'import sys; print(sys.executable, sys.version)'; pwd)
    wanted=$({ echo "$base"; sed '/^\[tool\.ruff/,$d' pyproject.toml; } | sha256sum)
    exec 9<pyproject.toml
    flock 9  # another make may be at it
    if [ "$wanted" = "$(cat .venv/stamp 2>/dev/null)" ] && .venv/bin/python -c '' 2>/dev/null; then
        return
    fi
    echo "setup: installing Python packages into .venv"
    if [ "$base" != "$(cat .venv/base 2>/dev/null)" ] || ! .venv/bin/python -c '' 2>/dev/null; then
        "$python" -m venv --clear .venv >"$log" 2>&1 || stop_with_log "$python cannot make .venv" \
            "this user must be able to write there; Debian has the venv module in python3-venv"
        echo "$base" >.venv/base
    fi
    # compat: a plain path file, not an import hook that every start would pay for
    .venv/bin/python -m pip install --quiet --config-settings editable_mode=compat \
        --editable '.[dev]' >"$log" 2>&1 || stop_with_log "pip cannot install the project" \
        "it asks the package index that pip's configuration gives: does that answer from here?"
    # The other package named `xattr`, for the tests: not beside pyxattr, whose module it would hide.
    other=$(.venv/bin/python -c "import tomllib
print(tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['xattr'][0])")
    .venv/bin/python -m pip install --quiet --upgrade --target .venv/other-xattr "$other" \
        >"$log" 2>&1 || stop_with_log "pip cannot install $other" \
        "it asks the package index that pip's configuration gives: does that answer from here?"
    echo "$wanted" >.venv/stamp
}

install_charts() {
    has_it='import importlib.util as u, sys; sys.exit(u.find_spec("matplotlib") is None)'
    ! .venv/bin/python -c "$has_it" || return 0
    echo "setup: installing what draws the charts into .venv"
    .venv/bin/python -m pip install --quiet --config-settings editable_mode=compat \
        --editable '.[bench]' >"$log" 2>&1 || stop_with_log "pip cannot install matplotlib" \
        "it asks the package index that pip's configuration gives: does that answer from here?"
}

if [ "$target" != lint ] && [ "$(id -u)" != 0 ]; then
    stop "make $target needs root: it mounts file systems, builds guests and sets immutable flags" \
        "run it as root"
fi
install_packages
install_venv
case $target in bench|all) install_charts ;; esac
