#!/usr/bin/python3
"""aufsd-textfile FILE: writes the daemon's metrics for node_exporter's textfile collector.

The file is replaced at once, and also when the daemon does not answer: then it says `aufsd_up 0`
and nothing else, where a file that is left alone would go on telling the last good figures.
"""

import argparse
import json
import os
import socket
import sys

UP = "# HELP aufsd_up Whether the daemon answered\n# TYPE aufsd_up gauge\naufsd_up {}\n"


def metrics(path: str, timeout: float) -> str:
    """The text of `metrics`. OSError and ValueError if the daemon does not give it."""
    answer = b""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(timeout)
        sock.connect(path)
        sock.sendall(b'{"jsonrpc": "2.0", "id": 1, "method": "metrics"}\n')
        while not answer.endswith(b"\n"):
            data = sock.recv(1 << 16)
            if not data:
                raise ConnectionResetError("aufsd closed the connection")
            answer += data
    reply = json.loads(answer)
    if "result" not in reply:
        raise ValueError(f"aufsd refused to answer: {reply['error']['message']}")
    return str(reply["result"]["text"])


def own(text: str) -> str:
    """Without process_*: node_exporter has these of its own, and fails as a whole on two."""
    names = ("aufsd_", "# HELP aufsd_", "# TYPE aufsd_")
    return "".join(line for line in text.splitlines(keepends=True) if line.startswith(names))


def replace(path: str, text: str) -> None:
    """Write the file beside itself, readable to all, and put it in place."""
    with open(f"{path}.new", "w", encoding="utf-8") as file:
        os.fchmod(file.fileno(), 0o644)
        file.write(text)
    os.rename(f"{path}.new", path)


def main() -> int:
    """1 if the daemon did not answer; the file is written all the same."""
    parser = argparse.ArgumentParser("aufsd-textfile", description=__doc__)
    parser.add_argument("file")
    parser.add_argument("--socket", default="/run/aufsd/monitor.sock")
    parser.add_argument("--timeout", type=float, default=10.0, help="seconds")
    given = parser.parse_args()
    try:
        text = UP.format(1) + own(metrics(given.socket, given.timeout))
    except (OSError, ValueError) as error:
        print(f"aufsd-textfile: {given.socket}: {error}", file=sys.stderr)
        replace(given.file, UP.format(0))
        return 1
    replace(given.file, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
