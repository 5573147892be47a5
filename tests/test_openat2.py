"""openat2(2) as the kernel has it: what stays beneath a directory, and what is refused."""

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from aufsd.kernel import syscalls

BENEATH = syscalls.RESOLVE_BENEATH
NO_SYMLINKS = syscalls.RESOLVE_NO_SYMLINKS


@pytest.fixture
def place(tmp_path: Path) -> Iterator[int]:
    """A directory with a file, a way out, and a symlink that stays inside."""
    (tmp_path / "secret").write_text("outside")
    inside = tmp_path / "inside"
    (inside / "sub").mkdir(parents=True)
    (inside / "sub/file").write_text("inside")
    (inside / "out").symlink_to("../secret")
    (inside / "absolute").symlink_to("/sub/file")
    (inside / "near").symlink_to("sub")
    fd = os.open(inside, os.O_RDONLY | os.O_DIRECTORY)
    yield fd
    os.close(fd)


def read(dirfd: int, path: str, resolve: int) -> str:
    with open(syscalls.openat2(dirfd, path, os.O_RDONLY, resolve=resolve)) as file:
        return file.read()


def test_what_lies_beneath_is_opened_also_through_a_symlink(place: int) -> None:
    assert read(place, "sub/file", BENEATH) == "inside"
    assert read(place, "near/file", BENEATH) == "inside"


@pytest.mark.parametrize("path", ["out", "absolute", "../secret", "/etc/passwd"])
def test_what_leads_out_is_refused(place: int, path: str) -> None:
    said = os.strerror(errno.EXDEV)
    with pytest.raises(OSError, match=said) as failure:
        syscalls.openat2(place, path, os.O_RDONLY, resolve=BENEATH)
    assert failure.value.filename == path


def test_no_symlink_is_followed_where_none_may_be(place: int) -> None:
    with pytest.raises(OSError, match=os.strerror(errno.ELOOP)):
        syscalls.openat2(place, "near/file", os.O_RDONLY, resolve=BENEATH | NO_SYMLINKS)


def test_with_a_root_of_its_own_an_absolute_symlink_stays_inside(place: int) -> None:
    assert read(place, "absolute", syscalls.RESOLVE_IN_ROOT) == "inside"
    with pytest.raises(FileNotFoundError):
        read(place, "out", syscalls.RESOLVE_IN_ROOT)


def test_the_descriptor_is_not_inherited(place: int) -> None:
    fd = syscalls.openat2(place, "sub", os.O_RDONLY | os.O_DIRECTORY, resolve=BENEATH)
    try:
        assert not os.get_inheritable(fd)
    finally:
        os.close(fd)
