"""btrfs's ioctls for subvolumes, under the names of include/uapi/linux/btrfs.h.

Each raises OSError as ioctl(2) does. Names are single path components, as bytes.
"""

import errno
import fcntl
import os
import struct
from collections.abc import Iterator
from typing import Final, NamedTuple

from aufsd.kernel import syscalls

# inode number of every subvolume's top directory (BTRFS_FIRST_FREE_OBJECTID)
TOP: Final = 256
# <linux/btrfs_tree.h>, types of items
INODE_ITEM_KEY: Final = 1
INODE_REF_KEY: Final = 12
INODE_EXTREF_KEY: Final = 13
_ANY: Final = (1 << 64) - 1
_SUBVOL_RDONLY: Final = 1 << 1
_QGROUP_LIMIT_MAX_RFER: Final = 1 << 0
_QUOTA_CTL_ENABLE: Final = 1
_NAME_MAX: Final = 4039  # BTRFS_SUBVOL_NAME_MAX
# BTRFS_MAX_ROOTREF_BUFFER_NUM
_ROOTREFS: Final = 255

# struct btrfs_ioctl_vol_args, _vol_args_v2, _get_subvol_info_args (its first fields),
# _quota_ctl_args, _qgroup_limit_args, _search_key, _search_header, _ino_lookup_user_args
_VOL: Final = struct.Struct("=q4088s")
_VOL_V2: Final = struct.Struct("=qQQ32s4040s")
_INFO: Final = struct.Struct("=Q256sQQQQ16s16s16sQQ")
_INFO_SIZE: Final = 504
_QUOTA: Final = struct.Struct("=QQ")
_QGROUP: Final = struct.Struct("=QQQQQQ")
_KEY: Final = struct.Struct("=7Q4L4Q")
_HEADER: Final = struct.Struct("=3Q2L")
_LOOKUP: Final = struct.Struct("=QQ256s3824s")
_BUFFER: Final = 1 << 16


def _ioc(direction: int, number: int, size: int) -> int:
    """_IOC() of <asm-generic/ioctl.h> with btrfs's magic 0x94; 1 is write, 2 read."""
    return direction << 30 | size << 16 | 0x94 << 8 | number


_SNAP_DESTROY: Final = _ioc(1, 15, _VOL.size)
_SUBVOL_CREATE: Final = _ioc(1, 14, _VOL.size)
_SNAP_CREATE_V2: Final = _ioc(1, 23, _VOL_V2.size)
_SUBVOL_GETFLAGS: Final = _ioc(2, 25, 8)
_SUBVOL_SETFLAGS: Final = _ioc(1, 26, 8)
_TREE_SEARCH_V2: Final = _ioc(3, 17, _KEY.size + 8)
_QUOTA_CTL: Final = _ioc(3, 40, _QUOTA.size)
_QGROUP_LIMIT: Final = _ioc(2, 43, _QGROUP.size)
_QUOTA_RESCAN_WAIT: Final = _ioc(0, 46, 0)
_GET_SUBVOL_INFO: Final = _ioc(2, 60, _INFO_SIZE)
_GET_SUBVOL_ROOTREF: Final = _ioc(3, 61, 4096)
_INO_LOOKUP_USER: Final = _ioc(3, 62, _LOOKUP.size)


class Subvolume(NamedTuple):
    """The answer of BTRFS_IOC_GET_SUBVOL_INFO.

    These are transactions. `generation`: the last change, also the making of a snapshot of it.
    `changed`: the last change of an inode in it. `created`: the one that made it.
    """

    id: int
    generation: int
    created: int
    uuid: bytes
    changed: int


class Item(NamedTuple):
    """One item of a tree: its key and its data."""

    objectid: int
    type: int
    offset: int
    data: bytes


def is_subvolume(found: os.stat_result, path: str | int) -> bool:
    """Whether `path`, of which this is the lstat(2), is the top of a subvolume."""
    return found.st_ino == TOP and syscalls.statfs_type(path) == syscalls.BTRFS_SUPER_MAGIC


def subvol_create(directory: int, name: bytes) -> None:
    """Make an empty subvolume."""
    _call(directory, _SUBVOL_CREATE, _VOL.pack(0, _checked(name)))


def snap_create(directory: int, name: bytes, source: int) -> None:
    """Make a writable snapshot of the subvolume that `source` is the top of."""
    _call(directory, _SNAP_CREATE_V2, _VOL_V2.pack(source, 0, 0, b"", _checked(name)))


def snap_destroy(directory: int, name: bytes) -> None:
    """Delete a subvolume, which has no subvolumes inside. Its blocks are freed later."""
    _call(directory, _SNAP_DESTROY, _VOL.pack(0, _checked(name)))


def is_read_only(subvolume: int) -> bool:
    """The property `ro`."""
    (flags,) = struct.unpack("=Q", _call(subvolume, _SUBVOL_GETFLAGS, bytes(8)))
    return bool(flags & _SUBVOL_RDONLY)


def set_read_only(subvolume: int, read_only: bool) -> None:
    """Set the property `ro`. Descriptors that are already open for writing can still write."""
    _call(subvolume, _SUBVOL_SETFLAGS, struct.pack("=Q", _SUBVOL_RDONLY if read_only else 0))


def subvol_info(subvolume: int) -> Subvolume:
    """BTRFS_IOC_GET_SUBVOL_INFO (Linux 4.18)."""
    data = _call(subvolume, _GET_SUBVOL_INFO, bytes(_INFO_SIZE))
    id, _, _, _, generation, _, uuid, _, _, changed, created = _INFO.unpack_from(data)
    return Subvolume(id, generation, created, uuid, changed)


def nested(subvolume: int) -> list[tuple[int, int]]:
    """The subvolumes directly inside this one: id, and inode of the directory.

    BTRFS_IOC_GET_SUBVOL_ROOTREF (Linux 4.18). It fails with EOVERFLOW, but filled, if there are
    more.
    """
    found: list[tuple[int, int]] = []
    smallest = 0
    while True:
        buffer = bytearray(struct.pack("=Q", smallest).ljust(4096, b"\0"))
        more = False
        try:
            fcntl.ioctl(subvolume, _GET_SUBVOL_ROOTREF, buffer, True)
        except OSError as error:
            if error.errno != errno.EOVERFLOW:
                raise
            more = True
        count = buffer[8 + 16 * _ROOTREFS]
        rows = [struct.unpack_from("=QQ", buffer, 8 + 16 * index) for index in range(count)]
        found += [(id, directory) for id, directory in rows]
        if not more or not rows:
            return found
        smallest = rows[-1][0] + 1


def ino_lookup_user(subvolume: int, directory: int, id: int) -> bytes:
    """The path, from the top of `subvolume`, of the nested subvolume `id` in that directory."""
    data = _call(subvolume, _INO_LOOKUP_USER, _LOOKUP.pack(directory, id, b"", b""))
    # behind the NUL of each lies what the kernel built them from
    return data[272:].partition(b"\0")[0] + data[16:272].partition(b"\0")[0]


def tree_search(
    subvolume: int, low: tuple[int, int, int], high: tuple[int, int, int], *, since: int = 0
) -> Iterator[Item]:
    """The items of the subvolume's tree with keys from `low` to `high`, in order.

    `since`: only items in leaves that this or a later transaction wrote; older parts of the tree
    are not read. Needs CAP_SYS_ADMIN in the initial user namespace.
    """
    while True:
        key = _KEY.pack(
            *(0, low[0], high[0], low[2], high[2], since, _ANY, low[1], high[1]),
            *(0xFFFFFFFF, 0, 0, 0, 0, 0),
        )
        buffer = bytearray(key + struct.pack("=Q", _BUFFER) + bytes(_BUFFER))
        fcntl.ioctl(subvolume, _TREE_SEARCH_V2, buffer, True)
        count = _KEY.unpack_from(buffer)[9]
        if not count:
            return
        at = _KEY.size + 8
        objectid, kind, offset = low
        for _ in range(count):
            _, objectid, offset, kind, length = _HEADER.unpack_from(buffer, at)
            at += _HEADER.size
            yield Item(objectid, kind, offset, bytes(buffer[at : at + length]))
            at += length
        if (objectid, kind, offset) >= high:
            return
        low = _next(objectid, kind, offset)


def _next(objectid: int, kind: int, offset: int) -> tuple[int, int, int]:
    if offset < _ANY:
        return objectid, kind, offset + 1
    return (objectid, kind + 1, 0) if kind < 255 else (objectid + 1, 0, 0)


def quota_enable(path: int) -> None:
    """Turn on quota groups for the file system. Harmless if they are on.

    It waits for the first scan, because until then every count is wrong.
    """
    _call(path, _QUOTA_CTL, _QUOTA.pack(_QUOTA_CTL_ENABLE, 0))
    fcntl.ioctl(path, _QUOTA_RESCAN_WAIT)


def qgroup_limit(subvolume: int, id: int, referenced: int | None) -> None:
    """Limit the bytes of the subvolume `id`, shared ones included; None: no limit."""
    most = _ANY if referenced is None else referenced
    _call(subvolume, _QGROUP_LIMIT, _QGROUP.pack(id, _QGROUP_LIMIT_MAX_RFER, most, 0, 0, 0))


def _checked(name: bytes) -> bytes:
    if not name or b"/" in name or len(name) > _NAME_MAX:
        raise ValueError(f"not the name of a subvolume: {name!r}")
    return name


def _call(fd: int, request: int, argument: bytes) -> bytes:
    buffer = bytearray(argument)
    fcntl.ioctl(fd, request, buffer, True)
    return bytes(buffer)
