"""The blocking client. Standard library only."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from types import TracebackType
from typing import Self, TypeVar

from aufsd_client import calls, checkpoints, parsing, results, streams
from aufsd_client.calls import Hold, Request
from aufsd_client.errors import LayerExists
from aufsd_client.link import Link, deadline_after
from aufsd_client.methods import Methods
from aufsd_client.wire import DEFAULT_SOCKET, encode_request, match

T = TypeVar("T")

# idle connections that are kept for the next calls
_KEPT = 8


class Client(Methods):
    """A client of the daemon on the socket at `path`; for any number of threads.

    `timeout` is in seconds, for each call, with connecting. After a TimeoutError it is not known
    whether the daemon carries the call out. Errors of the API are the classes in
    `aufsd_client.errors`; DaemonUnreachable and ConnectionLost are errors of the connection. No
    call is repeated. Use it in a `with` block, or close it.
    """

    def __init__(
        self, path: str | os.PathLike[str] = DEFAULT_SOCKET, *, timeout: float | None = None
    ) -> None:
        self.path = os.fspath(path)
        self.timeout = timeout
        self._lock = threading.Lock()
        self._idle: list[Link] = []
        self._pid = os.getpid()
        self._numbers = count(1)
        self._closed = False

    def close(self) -> None:
        """Close the idle connections. A connection in use closes after its call."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for link in idle:
            link.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    # --- methods that the two kinds of client have each in its own way ------------------------

    def diff(
        self,
        id: str,
        out: streams.HasFileno | streams.Path | bytearray,
        *,
        parent: str = "",
        digest: bool = False,
    ) -> results.Streamed:
        """Write the layer's changes as a tar to `out`: an open file, a path, or a bytearray."""
        with streams.sink(out) as fd:
            return self._ask(calls.diff(id, parent=parent, digest=digest), fd)

    def apply_diff(
        self,
        id: str,
        source: streams.HasFileno | streams.Path | bytes,
        *,
        parent: str = "",
        digest: bool = False,
    ) -> results.Streamed:
        """Unpack the tar that `source` is into the layer: an open file, a path, or bytes."""
        with streams.source(source) as fd:
            return self._ask(calls.apply_diff(id, parent=parent, digest=digest), fd)

    def discover(self) -> dict[str, object]:
        """The OpenRPC document."""
        return self.call("rpc.discover", {})

    def iter_changes(self, id: str, *, parent: str = "") -> Iterator[results.Change]:
        """All changes of a layer, page after page."""
        after = ""
        while True:
            page = self.changes(id, parent=parent, after=after)
            yield from page.changes
            if not (after := page.next):
                return

    def iter_layers(self, *, prefix: str = "") -> Iterator[results.LayerRow]:
        """All layers, page after page; with a `prefix`, those whose ids begin so."""
        after = ""
        while True:
            page = self.list(after=after, prefix=prefix)
            yield from page.layers
            if not (after := page.next):
                return

    @contextmanager
    def mounted(self, id: str, mount_label: str = "", *, hold: Hold = "manual") -> Iterator[str]:
        """`get` before the block and `put` after it. Gives the layer's path."""
        path = self.get(id, mount_label=mount_label, hold=hold).path
        try:
            yield path
        finally:
            self.put(id)

    def checkpoint_next(self, id: str, as_: str = "") -> results.Checkpointed:
        """Checkpoint a layer as `as_`, or as ID.1, ID.2, and so on. LayerExists, UnmountBusy."""
        if as_:
            return self._ask(calls.checkpoint(id, as_))
        for _ in range(checkpoints.TRIES):
            taken = [row.id for row in self.iter_layers(prefix=checkpoints.stem(id))]
            with suppress(LayerExists):
                return self._ask(calls.checkpoint(id, checkpoints.next_name(id, taken)))
        return self._ask(calls.checkpoint(id, checkpoints.next_name(id, taken)))

    def fork(self, id: str, new: str, as_: str = "") -> results.Checkpointed:
        """Checkpoint a layer, and create the layer `new` on the checkpoint, which is the result.

        If `new` cannot be created the checkpoint stays. Raises LayerExists, UnmountBusy.
        """
        if self.exists(new).exists:
            raise LayerExists(f"layer {new} exists already", id=new)
        made = self.checkpoint_next(id, as_)
        self.create(new, parent=made.parent)
        return made

    def log(self, id: str) -> list[checkpoints.LogRow]:
        """A layer's chain, newest first: when each layer was made, and how large it is."""
        own = self.get_metadata(id).metadata
        found = [checkpoints.row(id, own, self.usage(id))]
        for each in checkpoints.chain(id, own)[1:]:
            metadata = self.get_metadata(each).metadata
            found.append(checkpoints.row(each, metadata, self.usage(each)))
        return found

    @contextmanager
    def attempt(self, id: str, as_: str = "") -> Iterator[str]:
        """Checkpoint a layer before the block, and roll it back unless the block ends well.

        Gives the block the name of the checkpoint. What the block changes in the layer stays, or is
        thrown away if the block raises. Raises UnmountBusy, also at the roll back, if it is in use.
        """
        name = self.checkpoint_next(id, as_).parent
        try:
            yield name
        except BaseException:
            self.rollback(id)
            raise

    # --- how a call is made -------------------------------------------------------------------

    def call(
        self, method: str, params: dict[str, object], *, fd: int | None = None
    ) -> dict[str, object]:
        """Any method by name, its result object as it came; `fd` is sent along, not closed."""
        deadline = deadline_after(self.timeout)
        id = f"{os.getpid()}:{method}#{next(self._numbers)}"
        link = self._take() or Link(self.path, deadline)
        try:
            reply = match(link.exchange(encode_request(id, method, params), fd, deadline), id)
        except BaseException:
            # a late answer must not be taken for that of another call
            link.close()
            raise
        self._give_back(link)
        if reply.error:
            raise reply.error
        return reply.result

    def _ask(self, request: Request[T], fd: int | None = None) -> T:
        found = parsing.parse(request.result, self.call(request.method, request.params, fd=fd))
        request.judge(found)
        return found

    def _take(self) -> "Link | None":
        with self._lock:
            if self._closed:
                raise ValueError("the client is closed")
            if self._pid != os.getpid():
                # After a fork these belong to the parent. The daemon would take this process for
                # the parent, and the two would read each other's answers.
                self._pid, forked, self._idle = os.getpid(), self._idle, []
                for link in forked:
                    link.close()
            while self._idle:
                if (link := self._idle.pop()).usable():
                    return link
                link.close()
        return None

    def _give_back(self, link: "Link") -> None:
        with self._lock:
            if not self._closed and len(self._idle) < _KEPT:
                self._idle.append(link)
                return
        link.close()
