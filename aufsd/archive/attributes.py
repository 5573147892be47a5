"""Maps owners between a layer's files and its archive, and says which xattrs an archive has."""

import errno
import os
import re
import stat
import struct
from collections.abc import Callable, Collection, Iterable
from operator import itemgetter
from typing import Final

from aufsd.archive import headers
from aufsd.archive.headers import Member
from aufsd.archive.meter import Meter, shown
from aufsd.archive.requests import Settings
from aufsd.store.idmap import to_container, to_host
from aufsd_client.errors import BadArchive, LayerDamaged

CAPABILITY: Final = b"security.capability"
# every file system keeps times from 1970 until then, with nanoseconds
KEPT_UNTIL: Final = (1 << 31) * 1_000_000_000
# XATTR_LIST_MAX is 64 KiB of names; some room for what the system and aufsd set
_LISTED_MAX: Final = 60 << 10
_ACLS: Final = frozenset(headers.ACL_RECORDS.values())
# what union file systems keep for themselves; `user.overlay.` is theirs in a user namespace only
_OURS: Final = (b"user.aufsd.", b"user.fuseoverlayfs.")
# struct vfs_ns_cap_data in <linux/capability.h>: version and flags, two pairs of sets, root's id
_CAP_V2: Final = 0x02000000
_CAP_V3: Final = 0x03000000
_CAP_REVISION: Final = 0xFF000000
_CAP_SIZES: Final = {_CAP_V2: 20, _CAP_V3: 24}
# posix_acl_xattr_entry: tag, permissions, id; the tags that name an id
_ACL_ENTRY: Final = struct.Struct("<HHI")
_ACL_USER: Final = 0x02
_ACL_GROUP: Final = 0x08
_ACL_VERSION: Final = struct.pack("<I", 2)
_ACL_NOBODY: Final = 0xFFFFFFFF
# the tag of an entry in text, without and with an id
_ACL_TAGS: Final = {
    b"u": (0x01, _ACL_USER),
    b"g": (0x04, _ACL_GROUP),
    b"m": (0x10, 0x10),
    b"o": (0x20, 0x20),
}
_ACL_TEXT: Final = re.compile(
    rb"(u|user|g|group|m|mask|o|other):(?:([^:]*):)?([r-][w-][x-])(?::([0-9]{1,10}))?"
)


class Owners:
    """Maps ids in one direction. Each is looked up once, and then `known`."""

    __slots__ = ("_settings", "_to", "known")

    def __init__(self, settings: Settings, *, outward: bool) -> None:
        self._settings = settings
        self._to = to_container if outward else to_host
        self.known: dict[tuple[int, int], tuple[int, int]] = {}

    def both(self, uid: int, gid: int, name: bytes) -> tuple[int, int]:
        """User and group on the other side. Raises BadArchive (in) or LayerDamaged (out)."""
        found = self.known.get((uid, gid))
        if found is None:
            found = self.uid(uid, name), self.gid(gid, name)
            self.known[uid, gid] = found
        return found

    def uid(self, id: int, name: bytes) -> int:
        """The user on the other side; as `both`."""
        found = self._to(self._settings.uid_maps, id)
        if found is None:
            raise self._unmapped("user", id, name)
        return found

    def gid(self, id: int, name: bytes) -> int:
        """The group on the other side; as `both`."""
        found = self._to(self._settings.gid_maps, id)
        if found is None:
            raise self._unmapped("group", id, name)
        return found

    def _unmapped(self, what: str, id: int, name: bytes) -> BadArchive | LayerDamaged:
        sentence = f"{shown(name)} belongs to {what} {id}, which no id map has"
        if self._to is to_host:
            return BadArchive(sentence)
        return LayerDamaged(sentence, entry=shown(name), problem=sentence)


def read_xattr(where: int | bytes, name: str) -> bytes:
    """One xattr of a file, open or by its name; b"" of a capability that aufs removed by half.

    chown(2) and removexattr(2) through aufs leave an empty one in the branch, and fgetxattr(2) says
    EINVAL of that. With it no exec of the file succeeds, so it goes nowhere from here.
    """
    try:
        if isinstance(where, int):
            return os.getxattr(where, name)
        return os.getxattr(where, name, follow_symlinks=False)
    except OSError as error:
        if error.errno != errno.EINVAL or os.fsencode(name) != CAPABILITY:
            raise
        return b""


def exported(
    names: Iterable[str],
    read: Callable[[str], bytes],
    settings: Settings,
    owners: Owners,
    path: bytes,
) -> list[tuple[bytes, bytes]]:
    """The xattrs of a file that go into an archive, by name."""
    found = []
    for text in sorted(names):
        name = text.encode("utf-8", "surrogateescape")
        if name == CAPABILITY:
            value = read(text)
            if value:
                found.append((name, _capability(value, lambda id: owners.uid(id, path))))
        elif name in _ACLS:
            if settings.acls:
                found.append((name, _acl(read(text), owners, path)))
        elif may_travel(name, settings):
            found.append((name, read(text)))
    return found


def imported(
    xattrs: Iterable[tuple[bytes, bytes]],
    settings: Settings,
    owners: Owners,
    path: bytes,
    meter: Meter,
) -> list[tuple[str, bytes]]:
    """The xattrs of an archive's entry that go onto a file; a warning for each that does not."""
    found = []
    listed = 0
    for name, value in xattrs:
        text = name.decode("utf-8", "surrogateescape")
        listed += len(name) + 1
        if listed > _LISTED_MAX:
            meter.warn(
                f"dropped the attribute {shown(name)} of {shown(path) or '/'}: it has more of them "
                "than the kernel lists"
            )
        elif name == CAPABILITY and not value:
            # the kernel takes it, and then runs the file no more
            meter.warn(f"dropped the attribute {text} of {shown(path) or '/'}: it is empty")
        elif name == CAPABILITY:
            found.append((text, _capability(value, lambda id: owners.uid(id, path))))
        elif name in _ACLS and settings.acls:
            found.append((text, _acl(value, owners, path)))
        elif name in headers.ACL_RECORDS and settings.acls:
            try:
                binary = acl_from_text(value)
            except ValueError as error:
                meter.warn(f"dropped the ACL of {shown(path) or '/'}: {error}")
            else:
                meant = headers.ACL_RECORDS[name].decode()
                found.append((meant, _acl(binary, owners, path)))
        elif may_travel(name, settings) and b"\0" not in name:
            found.append((text, value))
        else:
            meter.warn(f"dropped the attribute {shown(name)} of {shown(path) or '/'}")
    return found


def carried(fd: int, settings: Settings, names: Iterable[str]) -> dict[str, bytes]:
    """Those xattrs of an open file, of these, that archives carry, as they stand."""
    found = {}
    for text in names:
        name = text.encode("utf-8", "surrogateescape")
        if name == CAPABILITY or (name in _ACLS and settings.acls) or may_travel(name, settings):
            value = read_xattr(fd, text)
            if value or name != CAPABILITY:
                found[text] = value
    return found


def inherit(source: int) -> None:
    """Make the current directory's owner, mode, times and xattrs those of `source`, another one."""
    found = os.fstat(source)
    os.chown(b".", found.st_uid, found.st_gid)
    for name in os.listxattr(source):
        if name.startswith(("user.", "system.posix_acl_")) and not name.startswith(
            ("user.aufsd.", "user.overlay.", "user.fuseoverlayfs.")
        ):
            os.setxattr(b".", name, os.getxattr(source, name))
    os.chmod(b".", stat.S_IMODE(found.st_mode))
    os.utime(b".", ns=(found.st_mtime_ns, found.st_mtime_ns))


def chown(where: bytes | int, uid: int, gid: int, name: bytes) -> None:
    """chown(2) of an entry, symlinks themselves. Raises BadArchive if the ids are not mapped."""
    try:
        if isinstance(where, int):
            os.fchown(where, uid, gid)
        else:
            os.chown(where, uid, gid, follow_symlinks=False)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        raise BadArchive(
            f"{shown(name)} belongs to {uid}:{gid}, which the user namespace that aufsd runs in "
            "does not map"
        ) from None


def set_time(where: bytes | int, mtime: int, name: bytes, meter: Meter) -> None:
    """Set the modification time of an entry; a warning if the file system keeps another one.

    What is beyond its range the kernel brings to the end of it (timestamp_truncate()).
    """
    if isinstance(where, int):
        os.utime(where, ns=(mtime, mtime))
    else:
        os.utime(where, ns=(mtime, mtime), follow_symlinks=False)
    if 0 <= mtime < KEPT_UNTIL:
        return
    found = os.fstat(where) if isinstance(where, int) else os.lstat(where)
    kept = found.st_mtime_ns // 1_000_000_000
    if kept != mtime // 1_000_000_000 or abs(mtime) >= headers.TIME_MAX - 1:
        meter.warn(
            f"the time of {shown(name) or '/'} is none that the file system keeps; it is {kept} "
            "seconds since 1970 now"
        )


def device(member: Member, path: bytes) -> int:
    """The number of the device that an entry is. Raises BadArchive."""
    # the kernel's dev_t has 12 bits for the major number and 20 for the minor one
    if not 0 <= member.major < 1 << 12 or not 0 <= member.minor < 1 << 20:
        raise BadArchive(f"{shown(path)} is a device with a number out of range")
    return os.makedev(member.major, member.minor)


def is_one(found: os.stat_result, name: bytes) -> bool:
    """Whether the entry `name` of the current directory is this very inode."""
    try:
        there = os.lstat(name)
    except OSError:
        return False
    return (there.st_dev, there.st_ino) == (found.st_dev, found.st_ino)


def keep_only(name: bytes, wanted: Collection[bytes], settings: Settings) -> None:
    """Remove the xattrs of a directory that was there before, which its entry does not have."""
    for text in os.listxattr(name, follow_symlinks=False):
        key = text.encode("utf-8", "surrogateescape")
        ours = key.startswith(b"user.") and may_travel(key, settings)
        if key not in wanted and (ours or key == b"system.posix_acl_access"):
            os.removexattr(name, text, follow_symlinks=False)


def may_travel(name: bytes, settings: Settings) -> bool:
    """Whether this is an xattr of a user's, and none that a union file system keeps for itself."""
    if not name.startswith(b"user.") or name.startswith(_OURS):
        return False
    return settings.namespace != "user" or not name.startswith(b"user.overlay.")


def _capability(value: bytes, to_other: Callable[[int], int]) -> bytes:
    """A file capability whose root is the other side's; version 2 where that is uid 0.

    A version 2 one works in the initial user namespace only (get_vfs_caps_from_disk() in
    security/commoncap.c), so below a map it becomes a version 3 one, and back (moby 95eb490780).
    """
    if len(value) < 4:
        return value
    (word,) = struct.unpack_from("<I", value)
    if len(value) != _CAP_SIZES.get(word & _CAP_REVISION):
        return value
    root = struct.unpack_from("<I", value, 20)[0] if word & _CAP_REVISION == _CAP_V3 else 0
    other = to_other(root)
    flags = word & ~_CAP_REVISION
    if other == 0:
        return struct.pack("<I", _CAP_V2 | flags) + value[4:20]
    return struct.pack("<I", _CAP_V3 | flags) + value[4:20] + struct.pack("<I", other)


def acl_from_text(text: bytes) -> bytes:
    """A POSIX ACL in a PAX record (acl(5), LONG TEXT FORM) as the value of its xattr.

    Names of users say nothing here, so entries need numbers: bsdtar has them behind the
    permissions, GNU tar in the place of names that its host does not know. Raises ValueError.
    """
    entries = []
    for part in re.split(rb"[,\n]", text.strip()):
        found = _ACL_TEXT.fullmatch(part.strip())
        if found is None:
            raise ValueError(f"{shown(part)} is no entry of one")
        # `other:r--` has no field for a name
        kind, who, bits, number = found.groups()
        if who and number is None:
            number = who
        tag = _ACL_TAGS[kind[:1]][bool(who)]
        if number is not None and not (number.isdigit() and int(number) < _ACL_NOBODY):
            raise ValueError(f"{shown(who)} is a name, and not a number")
        permissions = sum(
            bit for bit, letter in zip((4, 2, 1), bits, strict=False) if letter != ord("-")
        )
        entries.append((tag, permissions, int(number) if who else _ACL_NOBODY))
    # the order that posix_acl_valid() wants
    entries.sort(key=itemgetter(0, 2))
    return _ACL_VERSION + b"".join(_ACL_ENTRY.pack(*entry) for entry in entries)


def _acl(value: bytes, owners: Owners, path: bytes) -> bytes:
    """A POSIX ACL with its ids mapped; anything else is left to the kernel to judge."""
    if len(value) < 4 or (len(value) - 4) % _ACL_ENTRY.size:
        return value
    entries = []
    for tag, permissions, id in _ACL_ENTRY.iter_unpack(value[4:]):
        if tag == _ACL_USER:
            id = owners.uid(id, path)
        elif tag == _ACL_GROUP:
            id = owners.gid(id, path)
        entries.append(_ACL_ENTRY.pack(tag, permissions, id))
    return value[:4] + b"".join(entries)
