"""Who may do what: the sockets, allow-lists and limits, asked by processes of other users."""

import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from aufsd.rpc.methods import TABLE
from aufsd_client import Client
from aufsd_client.errors import AufsdError
from tests.archives import tar
from tests.daemon import Daemon, daemon

pytestmark = pytest.mark.service

ALICE, BOB, BUILDERS = 61001, 61002, 61100

# parameters with which each method can be called
PARAMETERS: dict[str, dict[str, object]] = {
    "exists": {"id": "base"},
    "create": {"id": "new"},
    "remove": {"id": "new"},
    "get": {"id": "base"},
    "put": {"id": "base"},
    "diff": {"id": "base", "fd": 0},
    "apply_diff": {"id": "base", "fd": 0},
    "diff_size": {"id": "base"},
    "usage": {"id": "base"},
    "seal": {"id": "base"},
    "changes": {"id": "base"},
    "get_metadata": {"id": "base"},
    "holders": {"id": "base"},
    "convert": {"id": "base", "to": "aufs"},
}


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory that every user can walk into; pytest's own are for root alone."""
    with tempfile.TemporaryDirectory() as made:
        os.chmod(made, 0o755)
        yield Path(made)


@contextmanager
def open_to_all(place: Path, *flags: str) -> Iterator[Daemon]:
    """A daemon whose control socket everybody may open, so that only the lists decide."""
    with daemon(place, *flags) as served:
        os.chmod(served.socket, 0o666)
        with served.client() as client:
            client.create("base")
            client.apply_diff("base", tar({"motd": b"x" * (1 << 20)}))
        yield served


@contextmanager
def another(
    user: int, act: Callable[[], object], *, group: int = 61000, groups: tuple[int, ...] = ()
) -> Iterator[Callable[[], object]]:
    """Run `act` in a process of another user; call what is yielded for its result.

    It is killed at the end of the block, if it still runs.
    """
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.setgroups(groups)
            os.setgid(group)
            os.setuid(user)
            os.write(write_end, json.dumps(act()).encode())
        finally:
            os._exit(0)
    os.close(write_end)

    def result() -> object:
        with os.fdopen(os.dup(read_end), "rb") as pipe:
            return json.loads(pipe.read())

    try:
        yield result
    finally:
        os.close(read_end)
        os.kill(pid, 9)
        os.waitpid(pid, 0)


def outcomes(
    path: str,
    *methods: str,
    user: int,
    groups: tuple[int, ...] = (),
    parameters: Mapping[str, dict[str, object]] = PARAMETERS,
) -> dict[str, str]:
    """How calls of a user end: `ok`, or the error's name."""

    def act() -> dict[str, str]:
        ended = {}
        archive = tar({"etc": None})
        with Client(path, timeout=30) as client:
            for method in methods:
                given = parameters.get(method, {})
                with open(os.memfd_create("tar"), "w+b", buffering=0) as file:
                    file.write(archive)
                    file.seek(0)
                    try:
                        client.call(method, given, fd=file.fileno() if "fd" in given else None)
                        ended[method] = "ok"
                    except (AufsdError, OSError) as error:
                        ended[method] = type(error).__name__
        return ended

    with another(user, act, groups=groups) as result:
        found = result()
        assert isinstance(found, dict)
        return found


def one(served: Daemon, method: str, *, user: int, groups: tuple[int, ...] = ()) -> str:
    return outcomes(served.socket, method, user=user, groups=groups)[method]


# --- the sockets ----------------------------------------------------------------------------------


def test_the_monitoring_socket_serves_everybody_what_reads_and_nothing_else(place: Path) -> None:
    with daemon(place) as served:
        found = outcomes(served.monitor_socket, *TABLE, user=ALICE)
    assert found == {
        name: "ok" if method.monitor else "PermissionDenied" for name, method in TABLE.items()
    }
    assert sum(method.monitor for method in TABLE.values()) == 6


def test_the_control_socket_is_not_for_everybody(place: Path) -> None:
    with daemon(place) as served:
        assert one(served, "ping", user=ALICE) == "DaemonUnreachable"
        assert one(served, "ping", user=0) == "ok"


# --- the allow-lists ------------------------------------------------------------------------------

KINDS = {"read": "exists", "use": "put", "change": "cleanup"}


@pytest.mark.parametrize(
    ("user", "groups", "allowed"),
    [
        (ALICE, (), {"read", "use"}),
        (BOB, (), {"use"}),
        (BOB, (BUILDERS,), {"use", "change"}),
        # more than fit into what is asked for at first
        (BOB, (*range(62000, 63000), BUILDERS), {"use", "change"}),
        (0, (), {"read", "use", "change"}),
    ],
    ids=["named", "everybody", "by a group", "by one of a thousand groups", "root"],
)
def test_each_kind_of_method_is_for_those_on_its_list(
    place: Path, user: int, groups: tuple[int, ...], allowed: set[str]
) -> None:
    flags = ("--read-users", str(ALICE), "--use-users", "*", "--change-users", f"@{BUILDERS}")
    with open_to_all(place, *flags) as served:
        found = outcomes(served.socket, *KINDS.values(), user=user, groups=groups)
    assert found == {
        method: "ok" if kind in allowed else "PermissionDenied" for kind, method in KINDS.items()
    }


def test_the_lists_decide_for_every_method_by_its_kind(place: Path) -> None:
    with open_to_all(place, "--use-users", "root", "--change-users", "root") as served:
        found = outcomes(served.socket, *TABLE, user=ALICE)
    denied = {name for name, method in TABLE.items() if method.kind != "read"}
    assert {name for name, outcome in found.items() if outcome == "PermissionDenied"} == denied
    assert {found[name] for name in TABLE.keys() - denied} == {"ok"}


def test_repairing_is_changing(place: Path) -> None:
    with open_to_all(place, "--change-users", "root") as served:
        for repair, outcome in ((False, "ok"), (True, "PermissionDenied")):
            parameters: dict[str, dict[str, object]] = {"check": {"repair": repair}}
            found = outcomes(served.socket, "check", user=ALICE, parameters=parameters)
            assert found == {"check": outcome}


def test_the_lists_hold_on_the_monitoring_socket_too(place: Path) -> None:
    with daemon(place, "--read-users", str(ALICE)) as served:
        assert outcomes(served.monitor_socket, "health", user=ALICE) == {"health": "ok"}
        assert outcomes(served.monitor_socket, "health", user=BOB) == {"health": "PermissionDenied"}


def test_a_denied_call_changes_nothing_and_is_in_the_log_with_who_asked(place: Path) -> None:
    with open_to_all(place, "--change-users", "root") as served:
        assert one(served, "create", user=ALICE) == "PermissionDenied"
        with served.client() as client:
            assert not client.exists("new").exists
        lines = [json.loads(line) for line in served.log.splitlines()]
    (line,) = (line for line in lines if line.get("outcome") == "PermissionDenied")
    assert (line["method"], line["layer"], line["uid"]) == ("create", "new", ALICE)
    assert line["pid"] > 0


# --- limits of one user ---------------------------------------------------------------------------


def test_the_connections_of_a_user_are_limited_and_leave_others_theirs(place: Path) -> None:
    with open_to_all(place, "--max-connections-per-uid", "2") as served, ExitStack() as held:

        def three() -> list[str]:
            said = []
            for _ in range(3):
                client = held.enter_context(Client(served.socket, timeout=30))
                try:
                    client.ping()
                    said.append("ok")
                except AufsdError as error:
                    said.append(type(error).__name__)
            return said

        with another(ALICE, three) as result:
            assert result() == ["ok", "ok", "Overloaded"]
        assert one(served, "ping", user=BOB) == "ok"


@pytest.mark.parametrize(
    ("flag", "refused"),
    [("--max-calls-per-uid", {"ping", "diff"}), ("--max-jobs-per-uid", {"diff"})],
)
def test_the_calls_and_archives_of_a_user_are_limited_and_leave_others_theirs(
    place: Path, flag: str, refused: set[str]
) -> None:
    with open_to_all(place, flag, "1") as served:
        # a diff to a pipe that nobody reads does not end
        read_end, write_end = os.pipe()

        def diff() -> None:
            with Client(served.socket) as client, os.fdopen(write_end, "wb") as out:
                client.diff("base", out)

        with another(ALICE, diff), served.client() as client:
            os.close(write_end)
            while not client.status().jobs:
                pass
            found = outcomes(served.socket, "ping", "diff", user=ALICE)
            assert {method for method, said in found.items() if said == "Overloaded"} == refused
            assert outcomes(served.socket, "ping", "diff", user=BOB) == {"ping": "ok", "diff": "ok"}
        os.close(read_end)
        # what it held is free again once it is gone
        with served.client() as client:
            while client.status().jobs:
                pass
        assert one(served, "diff", user=ALICE) == "ok"
