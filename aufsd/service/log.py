"""Logging: structlog to standard error, one line an event, JSON unless a person looks on.

A log that nobody reads must not stop the daemon, so nothing here waits for standard error. Lines
that it does not take are kept, up to a limit. Beyond the limit lines are dropped and counted; the
log says how many as soon as it can.
"""

import os
import select
import time
from collections import Counter
from collections.abc import Callable, Mapping, MutableMapping
from contextlib import AbstractContextManager
from json import dumps
from typing import Any, Literal

import msgspec
import structlog

Level = Literal["debug", "info", "warning", "error"]
_LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40, "critical": 50}

# bytes kept while standard error takes nothing
_UNWRITTEN_MAX = 1 << 20
# a pipe that poll(2) reports as writable takes so much without waiting (pipe(7), PIPE_BUF)
_WRITE = 4096
# with so many keys, a RateLimit forgets those that are not limited now
_KEYS = 1000
# sd-daemon(3)
_PRIORITY = {
    "debug": b"<7>",
    "info": b"<6>",
    "warning": b"<4>",
    "error": b"<3>",
    "critical": b"<2>",
}


class Writer:
    """Writes lines to a descriptor that it does not own, and never waits for it.

    As a context manager, it writes all lines of the block in one piece at the end.
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._poll = select.poll()
        self._poll.register(fd, select.POLLOUT)
        self._unwritten = bytearray()
        self._buffering = False
        self.dropped = 0

    def __enter__(self) -> None:
        self._buffering = True

    def __exit__(self, *_: object) -> None:
        self._buffering = False
        self.flush()

    def write(self, line: bytes) -> None:
        """Write the line now or later, or drop it."""
        if len(self._unwritten) + len(line) > _UNWRITTEN_MAX:
            self.dropped += 1
        else:
            self._unwritten += line
            self._unwritten += b"\n"
        if not self._buffering:
            self.flush()

    @property
    def unwritten(self) -> int:
        """Bytes that are not written yet."""
        return len(self._unwritten)

    def _takes_more(self) -> bool:
        try:
            return bool(self._poll.poll(0))
        except OSError:
            # no memory (poll(2)): a line that waits ends no daemon
            return False

    def flush(self) -> None:
        """Write what is not written yet, as far as that needs no waiting."""
        while self._unwritten and self._takes_more():
            try:
                del self._unwritten[: os.write(self.fd, self._unwritten[:_WRITE])]
            except BlockingIOError:
                return
            except OSError:
                # standard error is gone, and nowhere is left to report it
                self._unwritten.clear()
                return
        if self.dropped and not self._unwritten:
            self._unwritten += b'{"event": "log lines were dropped", "count": %d}\n' % self.dropped
            self.dropped = 0
            self.flush()


class _Sink:
    """The level and the writer of all loggers.

    A logger of structlog keeps what it was made with. So a second `configure` changes this object.
    """

    def __init__(self) -> None:
        # `emit` writes nothing before `configure`
        self.level = 100
        self.writer = Writer(2)
        self._second = -1
        self._prefix = ""

    def now(self) -> str:
        """The time as in RFC 3339. The part up to the seconds is formatted once a second."""
        now = time.time()
        if self._second != (second := int(now)):
            self._second = second
            self._prefix = time.strftime("%Y-%m-%dT%H:%M:%S.", time.gmtime(second))
        return f"{self._prefix}{int((now - second) * 1_000_000):06d}Z"

    def msg(self, line: bytes) -> None:
        self.writer.write(line)

    debug = info = warning = error = critical = msg


_sink = _Sink()
_processors: list[Any] = []
# those of them that render an event as a line
_renderers: list[Any] = []


def configure(level: Level = "info", *, json: bool | None = None, fd: int = 2) -> Writer:
    """Set up the log; may be called again. `json` None: unless `fd` is a terminal."""
    _sink.level = _LEVELS[level]
    # what is still held goes out where it was meant to
    if fd != _sink.writer.fd:
        _sink.writer = Writer(fd)
    if json is None:
        json = not os.isatty(fd)
    if not json:
        _renderers[:] = [_render_console()]
        _processors[:] = [_stamp, *_renderers]
    else:
        _renderers[:] = [_render_json, _mark_priority] if _is_journal(fd) else [_render_json]
        # as text: structlog's structured form has the values of local variables
        _processors[:] = [_stamp, structlog.processors.format_exc_info, *_renderers]
    structlog.configure(
        processors=_processors,
        # `_stamp` checks the level
        wrapper_class=structlog.make_filtering_bound_logger("debug"),
        logger_factory=lambda *_: _sink,
        cache_logger_on_first_use=True,
    )
    return _sink.writer


def emit(level: Level, event: str, fields: Mapping[str, object]) -> None:
    """Write a line by the processors of structlog, without a traceback.

    This is for the line of every call. structlog takes as long to reach its processors as they take
    themselves.
    """
    if _LEVELS[level] < _sink.level:
        return
    found: Any = {"timestamp": _sink.now(), "level": level, "event": event, **fields}
    for process in _renderers:
        found = process(None, level, found)
    _sink.writer.write(found)


def written_together() -> AbstractContextManager[None]:
    """Write all that a block logs in one piece, at its end. The block has no await."""
    return _sink.writer


class RateLimit:
    """Limits lines by key: `burst` lines at once, then `rate` lines a second, for each key.

    Lines beyond the limit are counted for `take_left_out`. `now` is in seconds, of any clock.
    """

    def __init__(self, burst: int, rate: float) -> None:
        self._burst = burst
        self._rate = rate
        # key -> lines left, and at what time; a key that is missing has all of them
        self._left: dict[int, tuple[float, float]] = {}
        self._left_out: Counter[int] = Counter()

    def allows(self, key: int, now: float) -> bool:
        """Whether a line of this key may be written now."""
        left, since = self._left.get(key, (float(self._burst), now))
        left = min(self._burst, left + (now - since) * self._rate)
        if left < 1:
            self._left_out[key] += 1
            return False
        if len(self._left) >= _KEYS:
            self._forget(now)
        self._left[key] = left - 1, now
        return True

    def take_left_out(self) -> Mapping[int, int]:
        """How many lines of each key were left out since the last call."""
        found, self._left_out = self._left_out, Counter()
        return found

    def _forget(self, now: float) -> None:
        for key, (left, since) in list(self._left.items()):
            if left + (now - since) * self._rate >= self._burst:
                del self._left[key]


def _stamp(_: object, method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    if _LEVELS[method] < _sink.level:
        raise structlog.DropEvent
    # "event" here fixes its place; its value comes from the dict behind it
    return {"timestamp": _sink.now(), "level": method, "event": "", **event}


_encode = msgspec.json.Encoder(enc_hook=repr).encode


def _render_json(_: object, __: str, event: MutableMapping[str, Any]) -> bytes:
    try:
        return _encode(event)
    except UnicodeEncodeError:
        # a path that is not UTF-8, as os.fsdecode gives it
        return dumps(event, default=repr).encode()


def _mark_priority(_: object, method: str, line: bytes) -> bytes:
    # a traceback is inside its JSON string: there is one line, and one priority
    return _PRIORITY[method] + line


def _render_console() -> Callable[[object, str, MutableMapping[str, Any]], bytes]:
    render = structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)

    def encode(logger: object, method: str, event: MutableMapping[str, Any]) -> bytes:
        return render(logger, method, event).encode("utf-8", "backslashreplace")

    return encode


def _is_journal(fd: int) -> bool:
    """Whether systemd connected this to the journal (systemd.exec(5), JOURNAL_STREAM)."""
    found = os.fstat(fd)
    return os.environ.get("JOURNAL_STREAM") == f"{found.st_dev}:{found.st_ino}"
