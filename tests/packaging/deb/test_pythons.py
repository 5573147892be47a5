"""The tests that need nothing of the machine, on the Python of each release."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from aufsd.kernel import syscalls
from tests.packaging.deb.mounting import mounted
from tests.packaging.deb.roots import CHECKOUT, root
from tests.packaging.deb.test_life import BUILT, SUITES
from tests.tiers import OFF

pytestmark = [pytest.mark.service, pytest.mark.deb]

TRUSTED = "/etc/ssl/certs/ca-certificates.crt"
# $1: what tests to leave out
SCRIPT = r"""
set -e
export DEBIAN_FRONTEND=noninteractive PIP_DISABLE_PIP_VERSION_CHECK=1 LC_ALL=C.UTF-8
apt-get install -y -qq --no-install-recommends python3-minimal /packages/aufsd_*.deb \
    /packages/aufsd-client_*.deb >/dev/null
python=$(/usr/lib/aufsd/python -c 'import sys; print("python%d.%d" % sys.version_info[:2])')
apt-get install -y -qq --no-install-recommends $python-venv >/dev/null
$python -m venv /venv
/venv/bin/pip install --quiet '/checkout/client[cli,trio]' '/checkout[dev]' /checkout/docker
cd /checkout
/venv/bin/python --version
exec /venv/bin/python -m pytest -q -p no:cacheprovider -n 2 -m "$1" tests
"""


@pytest.fixture(params=SUITES)
def inside(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A release's root that may be written to, with the checkout and the packages in it."""
    lower = root(request.param, [*BUILT.glob("*.deb")])
    upper, work, at = (tmp_path / name for name in ("upper", "work", "root"))
    upper.mkdir()
    work.mkdir()
    with ExitStack() as stack:
        layers = f"lowerdir={lower},upperdir={upper},workdir={work}"
        stack.enter_context(mounted("root", str(at), "overlay", 0, layers))
        stack.enter_context(mounted("proc", f"{at}/proc", "proc"))
        # some tests have terminals, and what tests make does not lie on an overlay
        stack.enter_context(mounted("pts", f"{at}/dev/pts", "devpts", 0, "ptmxmode=0666"))
        stack.enter_context(mounted("tmp", f"{at}/tmp", "tmpfs"))
        for source, place in ((CHECKOUT, "checkout"), (BUILT, "packages")):
            stack.enter_context(mounted(str(source), f"{at}/{place}", "", syscalls.MS_BIND))
        # the network is this host's, and so is whom it trusts
        for file, copy in (("/etc/resolv.conf", "etc/resolv.conf"), (TRUSTED, "trusted")):
            (at / copy).write_bytes(Path(file).read_bytes())
        yield at


def test_the_pure_tests_pass(inside: Path) -> None:
    done = subprocess.run(
        ["chroot", str(inside), "sh", "-c", SCRIPT, "sh", f"not ({' or '.join(OFF)})"],
        env={
            "PATH": os.defpath + ":/usr/sbin:/sbin",
            "HYPOTHESIS_STORAGE_DIRECTORY": "/tmp/hypothesis",
            "PYTHONDONTWRITEBYTECODE": "1",
            "PIP_CERT": "/trusted",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
