"""POSIX ACLs as text in PAX records, as other tars write them."""

import os
import subprocess
import tarfile
from pathlib import Path

import pytest

from aufsd.archive.attributes import acl_from_text
from aufsd.archive.fork import ForkServer
from aufsd_client.errors import AufsdError
from tests.archive.shelf import Shelf, needs_root, open_shelf
from tests.archive.tars import directory, entry, tar

ACCESS, DEFAULT = "system.posix_acl_access", "system.posix_acl_default"
RICH = "user::rw-,user:7:r--,user:1234:rwx,group::r-x,group:8:--x,mask::rwx,other::---"


def as_the_kernel_has_it(path: Path, text: str) -> bytes:
    subprocess.run(["setfacl", f"--set={text}", str(path)], check=True)
    return os.getxattr(path, ACCESS)


@needs_root
@pytest.mark.acl
@pytest.mark.parametrize(
    "text",
    [
        RICH,
        "user::rwx,user:7:r--,group::---,mask::r--,other::--x",
        "user::rwx,group::r-x,group:4294967294:rw-,mask::rwx,other::r--",
    ],
)
def test_text_means_what_setfacl_makes_of_it(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x"
    path.touch()
    assert acl_from_text(text.encode()) == as_the_kernel_has_it(path, text)


@pytest.mark.parametrize(
    "text",
    [
        "other::---\nmask::rwx\ngroup:8:--x\ngroup::r-x\nuser:1234:rwx\nuser:7:r--\nuser::rw-\n",
        "u::rw-,u:7:r--,u:1234:rwx,g::r-x,g:8:--x,m::rwx,o::---",
        "user::rw-,user:daemon:r--:7,user:x:rwx:1234,group::r-x,group:y:--x:8,mask:rwx,other:---",
    ],
)
def test_other_ways_to_say_the_same(text: str) -> None:
    assert acl_from_text(text.encode()) == acl_from_text(RICH.encode())


@pytest.mark.parametrize(
    "text", ["", "user::rw-,user:daemon:r--", "user::rwz", "x::rwx", "user:-1:rwx", "u", "o:abc"]
)
def test_what_has_no_meaning_here_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"entry|name"):
        acl_from_text(text.encode())


@pytest.mark.parametrize("id", [4294967295, 9999999999])
def test_an_id_that_stands_for_nobody_is_refused(id: int) -> None:
    with pytest.raises(ValueError, match="name"):
        acl_from_text(f"user:{id}:rwx".encode())


def records(**texts: str) -> dict[str, str]:
    return {f"SCHILY.acl.{key}": text for key, text in texts.items()}


@pytest.mark.mounts
@needs_root
async def test_acls_in_text_are_put_on_files_and_directories(
    tmp_path: Path, server: ForkServer
) -> None:
    stream = tar(
        directory("d", pax_headers=records(access=RICH, default=RICH)),
        entry("d/x", pax_headers=records(access=RICH)),
        entry("d/named", pax_headers=records(access="user::rw-,user:daemon:r--,group::r--")),
        entry("d/default", pax_headers=records(default=RICH)),
    )
    async with open_shelf(tmp_path, server, acls=True) as shelf:
        at = shelf.add("a")
        warnings = (await shelf.apply(stream, "a")).warnings
        binary = acl_from_text(RICH.encode())
        assert os.getxattr(at / "d", ACCESS) == os.getxattr(at / "d", DEFAULT) == binary
        assert os.getxattr(at / "d" / "x", ACCESS) == binary
        assert [name for name in ("named", "default") if os.listxattr(at / "d" / name)] == []
        assert warnings == [
            "dropped the ACL of d/named: daemon is a name, and not a number",
            f"dropped the attribute {DEFAULT} of d/default: Permission denied",
        ]


@pytest.mark.mounts
async def test_acls_in_text_are_dropped_with_a_warning_unless_asked_for(shelf: Shelf) -> None:
    at = shelf.add("a")
    stream = tar(entry("x", b"x", pax_headers=records(access=RICH)), entry("y", b"y"))
    warnings = (await shelf.apply(stream, "a")).warnings
    assert os.listxattr(at / "x") == []
    assert warnings == ["dropped the attribute SCHILY.acl.access of x"]
    assert (at / "y").read_bytes() == b"y"


@pytest.mark.acl
@pytest.mark.mounts
@needs_root
@pytest.mark.parametrize(
    "command",
    [
        pytest.param(["tar", "--format=posix", "--acls", "--numeric-owner", "-cf"], id="tar"),
        pytest.param(
            ["bsdtar", "--format=pax", "--acls", "--numeric-owner", "-cf"],
            id="bsdtar",
            marks=pytest.mark.bsdtar,
        ),
    ],
)
async def test_acls_of_other_tars_come_in(
    tmp_path: Path, server: ForkServer, command: list[str]
) -> None:
    tree = tmp_path / "tree"
    (tree / "d").mkdir(parents=True)
    (tree / "d" / "x").touch()
    # GNU tar writes the names of users that it knows
    unknown = RICH.replace(":7:", ":98765:").replace(":8:", ":98766:")
    wanted = as_the_kernel_has_it(tree / "d" / "x", unknown)
    subprocess.run(["setfacl", "-d", f"--set={unknown}", str(tree / "d")], check=True)
    archive = tmp_path / "a.tar"
    subprocess.run([*command, str(archive), "-C", str(tree), "."], check=True)
    with tarfile.open(archive) as found:
        assert any("SCHILY.acl.access" in member.pax_headers for member in found)
    async with open_shelf(tmp_path / "store", server, acls=True) as shelf:
        at = shelf.add("a")
        try:
            result = await shelf.apply(archive.read_bytes(), "a")
        except AufsdError as error:
            pytest.fail(error.message)
        assert result.warnings == []
        assert os.getxattr(at / "d" / "x", ACCESS) == wanted
        assert os.getxattr(at / "d", DEFAULT) == wanted
