"""Both directions once through, before a job comes: a layer of a few entries in, and out again.

A child shares the fork server's memory until one of them writes to it, and each first write to a
page costs microseconds. The interpreter writes into code that it runs for the first few times
(PEP 659), and counts references everywhere; so the server does the one, and a child that waits for
its job the other. It made a one-file layer three times as fast.
"""

import os
from contextlib import ExitStack
from typing import Final

from aufsd.archive import headers, requests
from aufsd.archive.erase import erase
from aufsd.archive.fingerprint import fingerprint
from aufsd.archive.meter import Meter
from aufsd.archive.pack import Packer, pack
from aufsd.archive.reader import Reader
from aufsd.archive.requests import Branch, Settings
from aufsd.archive.sink import Sink
from aufsd.archive.source import Source
from aufsd.archive.unpack import Unpacker
from aufsd.archive.view import Layer
from aufsd.store.dialect import Dialect

# as often as the interpreter wants to see code before it settles on a form of it
_ROUNDS: Final = 12


def warm_up(rounds: int = _ROUNDS) -> None:
    """Do it that often, below a new directory of the root; nothing is left.

    Needs a root directory that may be written to and holds little else.
    """
    request = requests.Request(requests.Convert(Dialect.AUFS), Settings())
    requests.decode_request(requests.encode(request))
    name = b"%d" % os.getpid()
    for _ in range(rounds):
        os.chdir("/")
        _there_and_back(name)
        os.chdir("/")
        for _ in erase(name):
            pass


def _there_and_back(name: bytes) -> None:
    with ExitStack() as opened:
        stream = os.memfd_create("archive")
        opened.callback(os.close, stream)
        os.write(stream, _archive(name))
        os.lseek(stream, 0, os.SEEK_SET)
        settings = Settings(sync="none")
        meter = Meter(lambda size, entries: None)
        reader = Reader(Source(stream, meter, digest=False), meter)
        Unpacker(reader, Dialect.AUFS, settings, meter, lambda path: False).run()
        # not the whole root: another child may be at it, and what it removes is missed here
        os.chdir(b"/" + name)
        here = os.open(".", os.O_RDONLY | os.O_DIRECTORY)
        opened.callback(os.close, here)
        own = Layer(Branch("warm", Dialect.AUFS), here, settings.namespace)
        fingerprint(own, settings, meter)
        os.chdir(b"/" + name)
        pack(Packer(Sink(stream, meter, digest=False), settings, meter), own)


def _archive(name: bytes) -> bytes:
    rows = [(b"/", b"5"), (b"/d/", b"5"), (b"/d/f", b"0"), (b"/d/g", b"0"), (b"/e/h", b"0")]
    return b"".join(
        headers.encode(name + below, kind, mode=0o755, uid=0, gid=0, size=kind == b"0")
        + (b"x".ljust(512, b"\0") if kind == b"0" else b"")
        for below, kind in rows
    ) + bytes(1024)
