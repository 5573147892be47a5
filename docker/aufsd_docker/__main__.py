"""The command `aufsd-docker-plugin`: Docker's graph driver, named aufsd, on a Unix socket.

Exit status: 0 stopped, 1 aufsd cannot be used or the socket not be made, 2 usage.
"""

import argparse
import os
import signal
import socket
import sys
from contextlib import suppress
from pathlib import Path

import structlog
import trio

from aufsd_client.errors import AufsdError
from aufsd_client.trio import Client
from aufsd_client.wire import DEFAULT_SOCKET, DaemonUnreachable
from aufsd_docker import __version__
from aufsd_docker.driver import Driver
from aufsd_docker.server import serve

# Docker finds a plugin by the name of its socket in this directory
DEFAULT_PLUGIN = "/run/docker/plugins/aufsd.sock"
_NEEDED = frozenset({"named-holds"})
_FIRST_PASSED = 3  # SD_LISTEN_FDS_START, sd_listen_fds(3)


def main() -> int:
    """Run the plugin; its exit status."""
    parser = argparse.ArgumentParser(prog="aufsd-docker-plugin", description=__doc__)
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument("--socket", default=DEFAULT_PLUGIN, help="where dockerd finds it")
    parser.add_argument("--aufsd", default=DEFAULT_SOCKET, help="aufsd's control socket")
    flags = parser.parse_args()
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    try:
        return trio.run(_run, flags.socket, flags.aufsd)
    except (AufsdError, DaemonUnreachable) as error:
        return _say(str(error))
    except OSError as error:
        return _say(f"{error.filename or flags.socket}: {error.strerror}")


def _say(sentence: str) -> int:
    print(f"aufsd-docker-plugin: {sentence}", file=sys.stderr)
    return 1


async def _run(path: str, aufsd: str) -> int:
    async with Client(aufsd) as client:
        missing = _NEEDED - set((await client.version()).features)
        if missing:
            return _say(f"the aufsd at {aufsd} is too old: it lacks {', '.join(sorted(missing))}")
        listener, ours = _listener(path)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_stop_on_signal, nursery.cancel_scope)
                driver = Driver(client, nursery)
                _notify(b"READY=1")
                await serve([listener], driver)
        finally:
            _notify(b"STOPPING=1")
            if ours:
                with suppress(FileNotFoundError):
                    os.unlink(path)
    return 0


async def _stop_on_signal(scope: trio.CancelScope) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async for _ in signals:
            scope.cancel()
            return


def _listener(path: str) -> tuple[trio.SocketListener, bool]:
    """The socket that systemd passes (sd_listen_fds(3)), else one at `path`; whether we made it."""
    if os.environ.get("LISTEN_PID") == str(os.getpid()):
        passed = socket.socket(fileno=_FIRST_PASSED)
        return trio.SocketListener(trio.socket.from_stdlib_socket(passed)), False
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    if _is_dead(path):
        os.unlink(path)
    before = os.umask(0o177)
    try:
        sock.bind(path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, path) from error
    finally:
        os.umask(before)
    sock.listen(128)
    return trio.SocketListener(trio.socket.from_stdlib_socket(sock)), True


def _is_dead(path: str) -> bool:
    """Whether a socket lies there that nobody listens on."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            return True
        except OSError:
            return False
    return False


def _notify(state: bytes) -> None:
    """sd_notify(3); nothing where nobody listens."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock, suppress(OSError):
            sock.sendto(state, address.replace("@", "\0", 1))


if __name__ == "__main__":
    sys.exit(main())
