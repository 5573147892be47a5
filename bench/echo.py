"""The yardstick for calls: lines come back as they are. What Trio itself costs, and nothing else.

python -m bench.echo SOCKET
"""

import socket
import sys

import trio


async def echo(stream: trio.SocketStream) -> None:
    """Send every whole line back."""
    rest = b""
    async for data in stream:
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            await stream.send_all(line + b"\n")


async def main(path: str) -> None:
    """Serve the socket at `path` until killed; a line on standard output says when."""
    listener = trio.socket.socket(socket.AF_UNIX)
    await listener.bind(path)
    listener.listen(128)
    print("ready", flush=True)
    await trio.serve_listeners(echo, [trio.SocketListener(listener)])


if __name__ == "__main__":
    trio.run(main, sys.argv[1])
