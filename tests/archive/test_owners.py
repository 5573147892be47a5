"""Owners, capabilities and ACLs of an archive below an id map, both ways."""

import os
import struct
from pathlib import Path

import pytest

from aufsd.archive.fork import ForkServer
from aufsd.store.dialect import WITH_MARKS, Dialect
from aufsd.store.idmap import IdMap
from aufsd_client.errors import (
    BadArchive,
    LayerDamaged,
)
from tests.archive.shelf import needs_root, open_shelf, snapshot
from tests.archive.tars import directory, entry, listing, tar

pytestmark = pytest.mark.mounts


MAPS = (IdMap(0, 100_000, 1000), IdMap(1000, 1_000_000, 1))


@needs_root
async def test_owners_are_mapped_both_ways_and_whiteouts_are_not(
    tmp_path: Path, server: ForkServer
) -> None:
    async with open_shelf(tmp_path, server, uid_maps=MAPS, gid_maps=MAPS) as shelf:
        stream = tar(
            directory(".", mode=0o755),
            entry(".wh.gone"),
            directory("d"),
            entry("d/.wh..wh..opq"),
            entry("one", uid=999, gid=1000),
            entry("zero"),
        )
        for dialect in WITH_MARKS:
            id = str(dialect)
            at = shelf.add(id, dialect)
            await shelf.apply(stream, id)
            found = {name: (e.uid, e.gid) for name, e in snapshot(at).items()}
            assert found[b"one"] == (100_999, 1_000_000)
            assert found[b"zero"] == found[b"d"] == found[b"."] == (100_000, 100_000)
            if dialect is Dialect.AUFS:
                assert found[b".wh.gone"] == found[b"d/.wh..wh..opq"] == (0, 0)
            members = listing(await shelf.diff(id))
            assert [(m.name, m.uid, m.gid) for m in members] == [
                (".", 0, 0),
                (".wh.gone", 0, 0),
                ("d", 0, 0),
                ("d/.wh..wh..opq", 0, 0),
                ("one", 999, 1000),
                ("zero", 0, 0),
            ]


@needs_root
async def test_an_owner_without_a_counterpart_is_an_error(
    tmp_path: Path, server: ForkServer
) -> None:
    async with open_shelf(tmp_path, server, uid_maps=MAPS, gid_maps=MAPS) as shelf:
        at = shelf.add("a")
        with pytest.raises(BadArchive, match="user 1001"):
            await shelf.apply(tar(entry("x", uid=1001)), "a")
        (at / "x").unlink()
        os.chown(at, 100_000, 100_000)
        (at / "y").touch()
        with pytest.raises(LayerDamaged, match="y belongs to user 0"):
            await shelf.diff("a")


@needs_root
async def test_a_capability_belongs_to_the_root_of_the_map(
    tmp_path: Path, server: ForkServer
) -> None:
    """Without the id of that root it would count for nobody (moby 95eb490780 is the way back)."""
    v2 = struct.pack("<IIIII", 0x02000001, 1 << 13, 0, 0, 0)
    stream = tar(
        directory("."), entry("x", pax_headers={"SCHILY.xattr.security.capability": v2.decode()})
    )
    async with open_shelf(tmp_path, server, uid_maps=MAPS, gid_maps=MAPS) as shelf:
        at = shelf.add("a")
        await shelf.apply(stream, "a")
        value = os.getxattr(at / "x", "security.capability")
        assert value == struct.pack("<IIIIII", 0x03000001, 1 << 13, 0, 0, 0, 100_000)
        member = listing(await shelf.diff("a"))[1]
        assert member.pax_headers["SCHILY.xattr.security.capability"].encode() == v2


@needs_root
async def test_acls_travel_if_asked_for(tmp_path: Path, server: ForkServer) -> None:
    def acl(user: int) -> bytes:
        rows = ((1, 7, -1), (2, 4, user), (4, 5, -1), (16, 5, -1), (32, 0, -1))
        return struct.pack("<I", 2) + b"".join(struct.pack("<HHi", *row) for row in rows)

    name = "system.posix_acl_access"
    async with open_shelf(tmp_path / "1", server, acls=True, uid_maps=MAPS, gid_maps=MAPS) as shelf:
        at = shelf.add("a")
        os.chown(at, 100_000, 100_000)
        (at / "x").touch()
        (at / "none").touch()
        os.chown(at / "x", 100_000, 100_000)
        os.chown(at / "none", 100_000, 100_000)
        os.setxattr(at / "x", name, acl(100_005))
        os.setxattr(at, "system.posix_acl_default", acl(100_006))
        (at / "d").mkdir()
        os.chown(at / "d", 100_000, 100_000)
        stream = await shelf.diff("a")
        shelf.add("b")
        await shelf.apply(stream, "b")
        assert os.getxattr(shelf.path("b") / "x", name) == acl(100_005)
        assert snapshot(shelf.path("b")) == snapshot(at)
        assert await shelf.diff("b") == stream
    async with open_shelf(tmp_path / "2", server) as plain:
        plain.add("c")
        warnings = (await plain.apply(stream, "c")).warnings
        assert len(warnings) == 4
        assert name not in os.listxattr(plain.path("c") / "x")
        assert b"posix_acl" not in await plain.diff("c")
