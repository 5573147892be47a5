"""Makes a layer on disk. Synchronous.

`layers/<id>` is the commit point: the layer exists when that file does.
"""

import contextlib
import os
from collections.abc import Mapping

from aufsd.kernel import syscalls
from aufsd.store import content as contents
from aufsd.store import removal, staging
from aufsd.store.content import copy_attributes, fsync
from aufsd.store.format import write_durably
from aufsd.store.ids import LayerId
from aufsd.store.layers import Store
from aufsd.store.space import no_space
from aufsd_client.errors import LayerExists


def create_on_disk(
    store: Store,
    id: LayerId,
    parents: tuple[LayerId, ...],
    xattrs: Mapping[str, bytes],
    staged: str = "",
) -> None:
    """Make the layer's directories, then its parents file. All or nothing, and durable.

    The top directory gets the owner, mode, times and xattrs of the parent's, because it is what the
    union shows as `/` (moby's driver lost them), and `xattrs`. `staged`: a subvolume from
    `staging.stage_child`, which is used as it is. Raises LayerExists if something is in the place
    of the layer, NoSpace, OSError.
    """
    store.identity.verify()
    content = store.layout.content(id)
    mount_point = store.layout.mount_point(id)
    if os.path.lexists(store.layout.parents_file(id)):
        raise LayerExists(f"layer {id} was made behind our back", id=id)
    if os.path.lexists(store.layout.removal(id)):
        removal.finish_removal(store, id)
    fresh = store.layout.creation(id)
    made: list[str] = []
    try:
        for path in (content, mount_point):
            _make_directory(store, path, id)
            made.append(path)
        # from here on, recovery knows that these directories are of an unfinished create
        write_durably(fresh, "".join(f"{parent}\n" for parent in parents), store.sync)
        if staged:
            if parents:
                above = store.layout.content(parents[0])
                contents.note_origin(staged, above, store.xattr_namespace)
            # replaces the empty directory
            os.rename(staged, content)
        elif parents:
            copy_attributes(store.layout.content(parents[0]), content)
        staging.mark(store, content, parents[0] if parents else None, xattrs)
        if store.sync != "none":
            for path in (content, store.layout.diff, store.layout.mnt):
                fsync(path)
        store.created[id] = os.lstat(fresh).st_mtime
        _commit(store, id, fresh)
    except BaseException as error:
        # if the parents file could not be undone, the layer is whole and stays
        whole = os.path.lexists(store.layout.parents_file(id))
        for path in () if whole else made:
            try:
                os.rmdir(path)
            except OSError:
                if staged:
                    removal.discard_staged(store, path)
        if whole or not any(map(os.path.lexists, made)):
            with contextlib.suppress(OSError):
                os.unlink(fresh)
        if isinstance(error, OSError):
            raise no_space(error, id) or error from error
        raise


def _make_directory(store: Store, path: str, id: LayerId) -> None:
    try:
        os.mkdir(path, 0o755)
    except FileExistsError:
        try:
            os.rmdir(path)
        except OSError as error:
            raise LayerExists(
                f"there is no layer {id}, but {path} exists and is not empty; "
                f"`aufsctl check` says more",
                id=id,
            ) from error
        os.mkdir(path, 0o755)
    os.chown(path, store.uid, store.gid)
    # mkdir(2) applies the umask to the mode
    os.chmod(path, 0o755)


def _commit(store: Store, id: LayerId, fresh: str) -> None:
    """Make the file `fresh` a layer's parents file, durably; undone if it raises OSError."""
    name, at = store.layout.parents_file(id), syscalls.AT_FDCWD
    # a parents file that is there already belongs to a layer: never replace it
    syscalls.renameat2(at, fresh, at, name, syscalls.RENAME_NOREPLACE)
    if store.sync != "none":
        try:
            fsync(store.layout.layers)
        except OSError:
            os.rename(name, fresh)
            raise
