"""Makes docs/api.md from api.in.md, the method table and a recorded run: api.py [--record].

In api.in.md a line `@NAME` stands for what the program itself knows of the method NAME: its
parameters, result, errors, and an example. The examples are in api.jsonl, a request and its reply a
line in turn. `--record` makes that file anew: it runs the requests of STORY against a daemon, in a
mount namespace in which /run and /var/lib are new. It needs root.
"""

import array
import json
import os
import platform
import socket
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

from aufsd.rpc.discover import ANYWHERE, document
from aufsd.rpc.methods import TABLE
from aufsd_client.errors import BY_NAME

HERE = Path(__file__).resolve().parent
PAGE, SOURCE, RECORDED = HERE / "api.md", HERE / "api.in.md", HERE / "api.jsonl"
SOCKET = "/run/aufsd/aufsd.sock"

# one request for each method, in an order in which each finds what it needs
STORY: tuple[tuple[str, dict[str, object]], ...] = (
    ("version", {}),
    ("ping", {}),
    ("create", {"id": "base"}),
    ("apply_diff", {"id": "base", "fd": 0, "digest": True}),
    ("create", {"id": "work", "parent": "base"}),
    ("get", {"id": "work"}),
    ("mounts", {}),
    ("holders", {"id": "work"}),
    ("put", {"id": "work"}),
    ("exists", {"id": "work"}),
    ("list", {"limit": 1}),
    ("get_metadata", {"id": "work"}),
    ("changes", {"id": "base", "limit": 2}),
    ("diff_size", {"id": "base"}),
    ("usage", {"id": "base"}),
    ("diff", {"id": "base", "fd": 0}),
    ("checkpoint", {"id": "work", "as": "saved"}),
    ("rollback", {"id": "work"}),
    ("squash", {"id": "work", "onto": "base"}),
    ("convert", {"id": "base", "to": "aufs"}),
    ("check", {}),
    ("seal", {"id": "base"}),
    ("remove", {"id": "work"}),
    ("cleanup", {}),
    ("status", {}),
    ("health", {}),
    ("metrics", {}),
    ("rpc.discover", {}),
)


# --- the page -------------------------------------------------------------------------------------


def page() -> str:
    """The text of docs/api.md."""
    described: Any = document(TABLE)
    schemas = described["components"]["schemas"]
    examples = _examples()
    lines = ["<!-- made by docs/api.py from api.in.md; do not edit -->"]
    for line in SOURCE.read_text().splitlines():
        if line == "@errors":
            lines += _all_errors()
        elif line.startswith("@"):
            (method,) = [each for each in described["methods"] if each["name"] == line[1:]]
            lines += _method(method, schemas, examples[line[1:]])
        else:
            lines.append(line)
            if line.startswith("### "):
                lines += [
                    "",
                    *(each["summary"] for each in described["methods"] if each["name"] == line[4:]),
                ]
    return "\n".join(lines) + "\n"


def _examples() -> dict[str, tuple[str, str]]:
    lines = RECORDED.read_text().splitlines()
    found: dict[str, tuple[str, str]] = {}
    for request, reply in zip(lines[::2], lines[1::2], strict=True):
        found.setdefault(json.loads(request)["method"], (request, reply))
    return found


def _method(method: Any, schemas: Any, example: tuple[str, str]) -> list[str]:
    lines = []
    if method["params"]:
        lines += ["| parameter | type | default |", "|---|---|---|"]
        for param in method["params"]:
            default = "" if param["required"] else f"`{json.dumps(param['schema']['default'])}`"
            lines.append(f"| `{param['name']}` | {_type(param['schema'])} | {default} |")
        lines.append("")
    lines += _result(method["result"]["schema"], schemas)
    own = [error["$ref"].rpartition("/")[2] for error in method["errors"]]
    own = [name for name in own if name not in ANYWHERE]
    where = " Both sockets." if method["x-monitor"] else ""
    lines += [f"Kind: {method['x-kind']}.{where} Errors of its own: {_errors(own)}.", ""]
    return [*lines, "```json", *(_short(json.loads(line)) for line in example), "```"]


def _result(schema: Any, schemas: Any) -> list[str]:
    if "$ref" not in schema:
        return []
    fields = schemas[schema["$ref"].rpartition("/")[2]].get("properties", {})
    if not fields:
        return ["The result is `{}`.", ""]
    rows = [f"| `{name}` | {_type(field, schemas)} |" for name, field in fields.items()]
    return ["| result | type |", "|---|---|", *rows, ""]


def _type(schema: Any, schemas: Any = None) -> str:
    """A schema in words; an object is shown with its fields."""
    if "$ref" in schema:
        fields = (schemas or {})[schema["$ref"].rpartition("/")[2]].get("properties", {})
        return f"object: {', '.join(f'`{name}`' for name in fields)}"
    if "enum" in schema:
        return " or ".join(f"`{json.dumps(value)}`" for value in schema["enum"])
    if "anyOf" in schema:
        return " or ".join(_type(each, schemas) for each in schema["anyOf"])
    if schema.get("type") == "array":
        items = schema.get("items")
        return f"list of {_type(items, schemas)}" if items else "list of pairs"
    return str(schema.get("type", "any"))


def _errors(names: list[str]) -> str:
    return ", ".join(f"{BY_NAME[name].code} `{name}`" for name in names) or "none"


def _all_errors() -> list[str]:
    rows = sorted(BY_NAME.values(), key=lambda kind: (kind.code, kind.__name__))
    return [
        "| code | name | when |",
        "|---|---|---|",
        *(
            f"| {kind.code} | `{kind.__name__}` | {(kind.__doc__ or '').splitlines()[0]} |"
            for kind in rows
            if kind.__name__ in BY_NAME and kind.code
        ),
    ]


def _short(value: Any) -> str:
    return json.dumps(_cut(value), ensure_ascii=False)


def _cut(value: Any, most: int = 3) -> Any:
    """A value with `...` for what would be long to read."""
    if isinstance(value, str):
        return value if len(value) <= 120 else value[:60] + "..."
    if isinstance(value, list):
        return [_cut(each) for each in value[:most]] + (["..."] if len(value) > most else [])
    if isinstance(value, dict):
        found = {key: _cut(each) for key, each in list(value.items())[:14]}
        return found if "openrpc" not in found else {"openrpc": value["openrpc"], "...": "..."}
    return value


# --- the recording --------------------------------------------------------------------------------


def record() -> list[str]:
    """The requests and replies of STORY, run against a daemon here and now."""
    for place in ("/run", "/var/lib"):
        subprocess.run(["mount", "-t", "tmpfs", "none", place], check=True)
    os.mkdir("/run/aufsd")
    serve = [sys.executable, "-m", "aufsd", "serve", "--backend", "overlay"]
    with subprocess.Popen(serve, stderr=subprocess.DEVNULL) as daemon:
        try:
            return _record(daemon)
        finally:
            daemon.terminate()


def _record(daemon: "subprocess.Popen[bytes]") -> list[str]:
    peer = socket.socket(socket.AF_UNIX)
    while True:
        try:
            peer.connect(SOCKET)
            break
        except OSError:
            assert daemon.poll() is None, "the daemon has ended"
            time.sleep(0.05)  # until it listens
    lines = []
    with peer, peer.makefile() as answers:
        for number, (name, params) in enumerate(STORY, 1):
            request = {"jsonrpc": "2.0", "id": number, "method": name, "params": params}
            line = json.dumps(request)
            fds = [_stream(name)] if "fd" in params else []
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
            peer.sendmsg([line.encode() + b"\n"], rights)
            for fd in fds:
                os.close(fd)
            reply = answers.readline().rstrip("\n")
            if name in ("metrics", "rpc.discover"):
                reply = _short(json.loads(reply))
            lines += [line, reply.replace(platform.release(), "6.12.0")]
    return lines


def _stream(name: str) -> int:
    """A tar to be applied, or where a diff goes."""
    if name == "diff":
        return os.open("/run/out.tar", os.O_WRONLY | os.O_CREAT)
    os.makedirs("/run/root/etc")
    Path("/run/root/etc/motd").write_text("hello\n")
    with tarfile.open("/run/in.tar", "w") as archive:
        archive.add("/run/root", ".")
    return os.open("/run/in.tar", os.O_RDONLY)


def main() -> None:
    """Write the page, or record first."""
    if "--record-here" in sys.argv:
        print("\n".join(record()))
        return
    if "--record" in sys.argv:
        here = ["unshare", "-m", sys.executable, __file__, "--record-here"]
        RECORDED.write_text(
            subprocess.run(here, check=True, stdout=subprocess.PIPE, text=True).stdout
        )
    PAGE.write_text(page())


if __name__ == "__main__":
    main()
