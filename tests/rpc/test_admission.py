"""Who is let in, and how much at a time."""

import pytest

from aufsd.kernel.peer import Peer
from aufsd.rpc.admission import (
    ARCHIVES_PER_USER,
    BYTES_MONITOR,
    BYTES_PER_USER,
    CALLS_PER_USER,
    CONNECTIONS_PER_USER,
    Admission,
    Allow,
    ServerSettings,
)
from aufsd.rpc.methods import TABLE
from aufsd_client.errors import Overloaded, PermissionDenied, ShuttingDown

ROOT, USER = Peer(1, 0, 0), Peer(2, 1000, 100)


def admission(settings: ServerSettings) -> Admission:
    return Admission(settings, on_idle=lambda: None)


def test_the_connections_of_one_socket_are_limited_and_leave_the_other_free() -> None:
    counts = admission(ServerSettings(max_connections=2))
    counts.admit(1000, monitor=True)
    counts.admit(1001, monitor=True)
    with pytest.raises(Overloaded):
        counts.admit(1002, monitor=True)
    counts.admit(1000, monitor=False)
    found = counts.statistics()
    assert (found.connections, found.accepted, found.refused) == (3, 3, 1)
    counts.leave(1001, monitor=True)
    counts.admit(1002, monitor=True)
    counts.leave(1000, monitor=True)
    counts.leave(1002, monitor=True)
    counts.leave(1000, monitor=False)
    assert counts.statistics().connections == 0


def test_the_connections_of_one_user_are_limited_and_leave_others_theirs() -> None:
    counts = admission(ServerSettings(max_connections_per_user=1))
    counts.admit(1000, monitor=False)
    with pytest.raises(Overloaded):
        counts.admit(1000, monitor=False)
    counts.admit(1001, monitor=False)
    counts.leave(1000, monitor=False)
    counts.admit(1000, monitor=False)


def test_users_but_root_have_limits_where_nothing_is_said() -> None:
    counts = admission(ServerSettings(max_connections=10_000))
    for _ in range(CONNECTIONS_PER_USER):
        counts.admit(1000, monitor=True)
        counts.admit(0, monitor=True)
    with pytest.raises(Overloaded):
        counts.admit(1000, monitor=True)
    counts.admit(0, monitor=True)
    counts.admit(1000, monitor=False)
    for _ in range(CALLS_PER_USER):
        counts.begin(1000)
        counts.begin(0)
    with pytest.raises(Overloaded):
        counts.gate(USER, (), TABLE["get"], monitor=False)
    counts.gate(ROOT, (), TABLE["get"], monitor=False)
    for _ in range(ARCHIVES_PER_USER):
        counts.begin_archive(1000)
        counts.begin_archive(0)
    with pytest.raises(Overloaded):
        counts.begin_archive(1000)
    counts.begin_archive(0)


def test_descriptors_are_kept_aside_for_the_control_socket_and_the_daemon() -> None:
    counts = Admission(ServerSettings(), on_idle=lambda: None, descriptors=64)
    for uid in range(16):
        counts.admit(uid, monitor=True)
    with pytest.raises(Overloaded):
        counts.admit(17, monitor=True)
    for uid in range(32):
        counts.admit(uid, monitor=False)
    with pytest.raises(Overloaded):
        counts.admit(33, monitor=False)


@pytest.mark.parametrize("monitor", [False, True], ids=["control", "monitor"])
def test_the_bytes_of_one_user_are_limited_on_each_socket_and_leave_others_theirs(
    monitor: bool,
) -> None:
    counts = admission(ServerSettings())
    limit = BYTES_PER_USER[monitor]
    counts.count_bytes(1000, limit, monitor=monitor)
    with pytest.raises(Overloaded):
        counts.count_bytes(1000, 1, monitor=monitor)
    counts.count_bytes(1001, limit, monitor=monitor)
    counts.count_bytes(1000, 1, monitor=not monitor)
    counts.count_bytes(1000, -2, monitor=monitor)
    counts.count_bytes(1000, 1, monitor=monitor)


def test_the_bytes_of_the_monitor_socket_are_limited_over_all_users() -> None:
    counts = admission(ServerSettings())
    users = BYTES_MONITOR // BYTES_PER_USER[True]
    for uid in range(1, users + 1):
        counts.count_bytes(uid, BYTES_PER_USER[True], monitor=True)
    with pytest.raises(Overloaded):
        counts.count_bytes(0, 1, monitor=True)
    counts.count_bytes(0, BYTES_MONITOR, monitor=False)


def test_the_calls_of_one_user_are_limited_over_all_its_connections() -> None:
    counts = admission(ServerSettings(max_calls_per_user=1))
    counts.gate(USER, (), TABLE["get"], monitor=False)
    counts.begin(1000)
    with pytest.raises(Overloaded):
        counts.gate(USER, (), TABLE["get"], monitor=False)
    counts.gate(ROOT, (), TABLE["get"], monitor=False)
    counts.end(1000)
    counts.gate(USER, (), TABLE["get"], monitor=False)


def test_the_archives_of_one_user_are_limited() -> None:
    counts = admission(ServerSettings(max_archives_per_user=1))
    counts.begin_archive(1000)
    with pytest.raises(Overloaded):
        counts.begin_archive(1000)
    counts.begin_archive(1001)
    counts.end_archive(1000)
    counts.begin_archive(1000)


@pytest.mark.parametrize(
    ("allow", "peer", "groups", "allowed"),
    [
        (None, USER, (), True),
        (Allow(), USER, (), False),
        (Allow(), ROOT, (), True),
        (Allow(uids=(1000,)), USER, (), True),
        (Allow(uids=(1001,)), USER, (), False),
        (Allow(gids=(100,)), USER, (), True),
        (Allow(gids=(101,)), USER, (7, 101), True),
        (Allow(gids=(1000,)), USER, (7,), False),
    ],
)
def test_an_allow_list_lets_in_whom_it_names_and_root(
    allow: Allow | None, peer: Peer, groups: tuple[int, ...], allowed: bool
) -> None:
    counts = admission(ServerSettings(allow={} if allow is None else {"change": allow}))
    counts.gate(peer, groups, TABLE["get"], monitor=False)
    if allowed:
        counts.gate(peer, groups, TABLE["create"], monitor=False)
    else:
        with pytest.raises(PermissionDenied):
            counts.gate(peer, groups, TABLE["create"], monitor=False)


def test_new_settings_hold_at_once() -> None:
    counts = admission(ServerSettings())
    counts.gate(USER, (), TABLE["create"], monitor=False)
    counts.settings = ServerSettings(allow={"change": Allow()})
    with pytest.raises(PermissionDenied):
        counts.gate(USER, (), TABLE["create"], monitor=False)


def test_the_last_call_of_a_drain_is_told() -> None:
    idle = []
    counts = Admission(ServerSettings(), on_idle=lambda: idle.append(True))
    counts.begin(0)
    counts.begin(0)
    counts.draining = True
    with pytest.raises(ShuttingDown):
        counts.gate(ROOT, (), TABLE["ping"], monitor=False)
    counts.end(0)
    assert not idle
    counts.end(0)
    assert idle
