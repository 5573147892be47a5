"""The service manager's protocols, spoken to a socket that stands for it."""

import os
import resource
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import trio
import trio.testing

from aufsd.service import notify
from aufsd.service.activation import inherited
from aufsd.service.notify import Notifier
from aufsd.tasks import Task
from tests.daemon import Daemon


@pytest.fixture
def notifiers() -> Iterator[Callable[[], Notifier]]:
    """Makes notifiers, and closes them at the end."""
    with ExitStack() as made:
        yield lambda: made.enter_context(Notifier())


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """A datagram socket in $NOTIFY_SOCKET."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as made:
        made.bind(str(tmp_path / "notify"))
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        yield made


def told(manager: socket.socket) -> list[str]:
    """The messages that have arrived."""
    found = []
    while True:
        try:
            found.append(manager.recv(4096).decode())
        except BlockingIOError:
            return found


def test_a_message_is_one_datagram(
    notifiers: Callable[[], Notifier], manager: socket.socket
) -> None:
    notifiers().tell("READY=1", "STATUS=äöü")
    assert told(manager) == ["READY=1\nSTATUS=äöü"]


def test_an_abstract_socket_is_meant_by_a_leading_at(
    notifiers: Callable[[], Notifier], monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"aufsd-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as manager:
        manager.bind(f"\0{name}")
        monkeypatch.setenv("NOTIFY_SOCKET", f"@{name}")
        notifiers().tell("READY=1")
        assert told(manager) == ["READY=1"]


def test_no_child_speaks_for_the_daemon(
    notifiers: Callable[[], Notifier], manager: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "3000000")
    assert notifiers().watchdog == 3.0
    assert not {"NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"} & os.environ.keys()


@pytest.mark.parametrize("interval", ["", "0", "²", "-1", "9" * 5000])
def test_a_watchdog_interval_that_is_none_is_passed_over(
    notifiers: Callable[[], Notifier], monkeypatch: pytest.MonkeyPatch, interval: str
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", interval)
    assert notifiers().watchdog is None


def test_the_watchdog_of_another_process_is_not_ours(
    notifiers: Callable[[], Notifier], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "3000000")
    monkeypatch.setenv("WATCHDOG_PID", str(os.getppid()))
    assert notifiers().watchdog is None


def test_a_manager_that_is_gone_does_not_matter(
    notifiers: Callable[[], Notifier], manager: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    notifier = notifiers()
    manager.close()
    notifier.tell("READY=1")


async def test_what_the_manager_did_not_take_is_told_with_the_next_message(
    notifiers: Callable[[], Notifier],
    manager: socket.socket,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    autojump_clock: trio.testing.MockClock,
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "20000000")
    notifier = notifiers()
    task = Task("notify", "")
    (tmp_path / "notify").rename(tmp_path / "elsewhere")
    notifier.tell("READY=1", "STATUS=1 layer")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(
            notify.report, notifier, trio.lowlevel.checkpoint, lambda: "2 layers", task
        )
        await trio.sleep(60)
        assert task.check().status == "degraded"
        assert f"{tmp_path}/notify: No such file" in task.check().detail
        (tmp_path / "elsewhere").rename(tmp_path / "notify")
        await trio.sleep(30)
        assert task.check().status == "ok"
        nursery.cancel_scope.cancel()
    first, *others = told(manager)
    assert first == "READY=1\nWATCHDOG=1\nSTATUS=2 layers"
    assert set(others) == {"WATCHDOG=1\nSTATUS=2 layers"}


def test_a_manager_is_told_also_when_no_descriptor_is_left(
    notifiers: Callable[[], Notifier], manager: socket.socket
) -> None:
    notifier = notifiers()
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
    try:
        notifier.tell("READY=1")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert told(manager) == ["READY=1"]


def test_a_reload_says_when_it_began(
    notifiers: Callable[[], Notifier], manager: socket.socket
) -> None:
    notifiers().reloading()
    (message,) = told(manager)
    first, second = message.split("\n")
    assert first == "RELOADING=1"
    assert second.partition("=")[2].isdigit()


async def test_the_watchdog_is_fed_while_the_daemon_answers_and_not_when_it_does_not(
    notifiers: Callable[[], Notifier],
    manager: socket.socket,
    monkeypatch: pytest.MonkeyPatch,
    autojump_clock: trio.testing.MockClock,
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "8000000")
    notifier = notifiers()
    stuck = False

    async def answers() -> None:
        if stuck:
            await trio.sleep_forever()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(notify.report, notifier, answers, lambda: "3 layers", Task("notify", ""))
        await trio.sleep(8)
        fed = told(manager)
        # systemd wants it at least once in the interval; sd_watchdog_enabled(3): in half of it
        assert len(fed) >= 2
        assert set(fed) == {"WATCHDOG=1\nSTATUS=3 layers"}
        stuck = True
        await trio.sleep(16)
        late = told(manager)[1:]
        assert late
        assert set(late) == {"STATUS=the mount thread has not answered for 4 s; 3 layers"}
        stuck = False
        await trio.sleep(8)
        assert "WATCHDOG=1\nSTATUS=3 layers" in told(manager)
        nursery.cancel_scope.cancel()


async def test_where_no_watchdog_is_wanted_the_status_is_told_all_the_same(
    notifiers: Callable[[], Notifier],
    manager: socket.socket,
    autojump_clock: trio.testing.MockClock,
) -> None:
    status = iter(f"{n} layers" for n in range(100))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(
            notify.report,
            notifiers(),
            trio.lowlevel.checkpoint,
            lambda: next(status),
            Task("notify", ""),
        )
        await trio.sleep(25)
        nursery.cancel_scope.cancel()
    assert "WATCHDOG=1\nSTATUS=2 layers" in told(manager)


async def test_where_nobody_listens_nothing_is_done(
    notifiers: Callable[[], Notifier], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    await notify.report(notifiers(), trio.sleep_forever, str, Task("notify", ""))


# --- sockets that are passed ----------------------------------------------------------------------

# a child, since LISTEN_PID is its pid and its descriptors begin at 3
_RECEIVE = """
import os, sys
for number, fd in enumerate(sys.argv[1:], 3):
    os.dup2(int(fd), number)
os.environ["LISTEN_PID"] = str(os.getpid() + int(os.environ.pop("OFFSET", "0")))
from aufsd.service.activation import inherited
try:
    found = inherited(("control", "monitor"))
except OSError as error:
    print(f"refused: {error.strerror or error}")
else:
    print(*(f"{name}={sock.getsockname()}" for name, sock in found.items()))
    print(*(key for key in os.environ if key.startswith("LISTEN")))
    print(*(sock.get_inheritable() for sock in found.values()))
"""


def receive(names: str, *sockets: socket.socket, **environment: str) -> list[str]:
    """What a process that is started with these sockets makes of them."""
    fds = [sock.fileno() for sock in sockets]
    done = subprocess.run(
        [sys.executable, "-c", _RECEIVE, *map(str, fds)],
        pass_fds=fds,
        env={
            **os.environ,
            "LISTEN_FDS": str(len(fds)),
            "LISTEN_FDNAMES": names,
            **environment,
        },
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.splitlines()


@pytest.fixture
def listening(tmp_path: Path) -> Iterator[list[socket.socket]]:
    """Two listening sockets, high up so that moving one does not close another."""
    made = []
    for name in ("c", "m"):
        sock = socket.socket(socket.AF_UNIX)
        sock.bind(str(tmp_path / name))
        sock.listen()
        made.append(sock)
    yield made
    for sock in made:
        sock.close()


def test_sockets_are_found_by_their_names_and_by_nobody_else(
    listening: list[socket.socket], tmp_path: Path
) -> None:
    said = receive("monitor:control", *listening)
    assert said == [f"monitor={tmp_path}/c control={tmp_path}/m", "", "False False"]


def test_sockets_of_another_process_are_not_ours(listening: list[socket.socket]) -> None:
    assert receive("control:monitor", *listening, OFFSET="1")[0] == ""


@pytest.mark.parametrize("names", ["contrl:monitor", "control:control", "control", ""])
def test_a_name_that_is_not_known_is_refused(names: str, listening: list[socket.socket]) -> None:
    (said,) = receive(names, *listening)
    assert said.startswith("refused: the service manager passed a socket named")


@pytest.mark.parametrize("count", ["²", "-1", "1_0", " 1", "9" * 5000])
def test_a_number_of_sockets_that_is_none_is_refused_in_a_sentence(count: str) -> None:
    (said,) = receive("control", LISTEN_FDS=count)
    assert said.startswith("refused: the service manager says ")
    assert len(said) < 100


def test_what_is_no_listening_unix_socket_is_refused(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as idle, socket.socket(socket.AF_INET) as inet:
        inet.bind(("127.0.0.1", 0))
        inet.listen()
        for sock in (idle, inet):
            (said,) = receive("control", sock)
            assert said == (
                "refused: passed as the control socket: not a Unix stream socket that listens"
            )


def test_without_any_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LISTEN_FDS", raising=False)
    assert inherited(("control",)) == {}


@pytest.mark.service
def test_the_status_tells_of_the_start(tmp_path: Path) -> None:
    """All that a manager hears of a daemon that starts and stops."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(60)
        made = Daemon(tmp_path, tmp_path / "store")
        process = subprocess.Popen(
            made.command(), env={**os.environ, "NOTIFY_SOCKET": str(tmp_path / "notify")}
        )
        heard = [manager.recv(4096).decode()]
        while "READY=1" not in heard[-1]:
            heard.append(manager.recv(4096).decode())
        process.terminate()
        while "STOPPING=1" not in heard[-1]:
            heard.append(manager.recv(4096).decode())
        assert process.wait(60) == 0
    assert heard[0] == f"STATUS=opening the store at {tmp_path}/store"
    state = "overlay: 0 layers, 0 mounts, 0 references, 0 archives running"
    assert f"READY=1\nSTATUS={state}" in heard
    assert heard[-1] == f"STOPPING=1\nSTATUS=draining 0 calls, mounts stay; {state}"
