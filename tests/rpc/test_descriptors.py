"""Descriptors: who owns them and until when, and which can carry a tar."""

import os
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from aufsd.rpc.descriptors import SEGMENT, Descriptors, require_stream
from aufsd_client.errors import InvalidDescriptor


def is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


@contextmanager
def files(count: int) -> Iterator[list[int]]:
    """Descriptors that are closed at the end, those that are still open."""
    fds = [os.open("/dev/null", os.O_RDONLY) for _ in range(count)]
    try:
        yield fds
    finally:
        for fd in filter(is_open, fds):
            os.close(fd)


def test_the_oldest_is_claimed_first_and_is_the_claimers() -> None:
    held = Descriptors()
    with files(2) as (one, two):
        held.receive([one])
        held.receive([two])
        assert held.claim() == one
        assert len(held) == 1
        assert held.claim() == two
        assert held.claim() is None
        held.close()
        assert is_open(one)
        assert is_open(two)


def test_what_no_line_claims_by_the_end_of_its_sendmsg_is_closed() -> None:
    held = Descriptors()
    with files(1) as (stray,):
        held.receive([stray])
        held.line_done()
        assert is_open(stray), "another line of the same sendmsg may claim it"
        held.read_done(length=100, unfinished=False)
        assert not is_open(stray)
        assert held.claim() is None


def test_the_line_that_is_unfinished_then_may_claim_and_no_later_one() -> None:
    held = Descriptors()
    with files(2) as (used, stray):
        held.receive([used, stray])
        held.read_done(length=10, unfinished=True)
        held.read_done(length=10, unfinished=True)
        assert is_open(stray)
        assert held.claim() == used
        held.line_done()
        assert is_open(used)
        assert not is_open(stray)


def test_one_of_a_later_sendmsg_comes_after_those_of_the_unfinished_line() -> None:
    held = Descriptors()
    with files(2) as (first, second):
        held.receive([first])
        held.read_done(length=10, unfinished=True)
        held.receive([second])
        assert held.claim() == first
        held.line_done()
        assert held.claim() == second


def test_a_long_sendmsg_is_not_read_whole_with_its_first_segment() -> None:
    held = Descriptors()
    with files(1) as (fd,):
        held.receive([fd])
        held.line_done()
        held.read_done(length=SEGMENT, unfinished=False)
        held.line_done()
        assert is_open(fd)
        held.read_done(length=10, unfinished=False)
        assert not is_open(fd)


def test_all_are_closed_with_the_connection() -> None:
    held = Descriptors()
    with files(2) as fds:
        held.receive(fds[:1])
        held.read_done(length=10, unfinished=True)
        held.receive(fds[1:])
        held.close()
        assert not any(map(is_open, fds))


def pipe_end(index: int) -> Callable[[], int]:
    def make() -> int:
        ends = os.pipe()
        os.close(ends[1 - index])
        return ends[index]

    return make


def regular(flags: int) -> Callable[[], int]:
    def make() -> int:
        with tempfile.NamedTemporaryFile() as file:
            return os.open(file.name, flags)

    return make


def path(name: str, flags: int) -> Callable[[], int]:
    return lambda: os.open(name, flags)


def a_socket() -> int:
    one, other = socket.socketpair()
    other.close()
    return one.detach()


KINDS: dict[str, tuple[Callable[[], int], str]] = {
    "the reading end of a pipe": (pipe_end(0), "read"),
    "the writing end of a pipe": (pipe_end(1), "write"),
    "a socket": (a_socket, "read write"),
    "a file to read": (regular(os.O_RDONLY), "read"),
    "a file to write": (regular(os.O_WRONLY), "write"),
    "a file for both": (regular(os.O_RDWR), "read write"),
    "memory": (lambda: os.memfd_create("x"), "read write"),
    "a path only": (regular(os.O_PATH), ""),
    "a directory": (path("/", os.O_RDONLY), ""),
    "a device": (path("/dev/zero", os.O_RDWR), ""),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", ["read", "write"])
def test_pipes_sockets_and_regular_files_open_the_right_way_will_do(kind: str, way: str) -> None:
    make, fits = KINDS[kind]
    fd = make()
    try:
        if way in fits:
            assert require_stream(fd, write=way == "write") == fd
        else:
            with pytest.raises(InvalidDescriptor):
                require_stream(fd, write=way == "write")
    finally:
        os.close(fd)


def test_no_descriptor_is_an_invalid_one() -> None:
    with pytest.raises(InvalidDescriptor, match="no descriptor"):
        require_stream(None, write=True)
