"""Lines that are no JSON-RPC: each is told what it is, and nothing of it is carried out."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aufsd.rpc.connection import MONITOR_MAX_LINE
from aufsd.rpc.framing import ReceiveBuffer
from aufsd_client.errors import InvalidRequest
from tests.rpc.raw_peer import code, line
from tests.rpc.serving import Connect, Served

CALL = {"jsonrpc": "2.0", "method": "create", "params": {"id": "smuggled"}, "id": 7}


@given(st.lists(st.binary(max_size=9).filter(lambda each: b"\n" not in each)), st.data())
def test_lines_come_out_as_they_went_in_wherever_reads_cut_them(
    lines: list[bytes], data: st.DataObject
) -> None:
    sent = b"".join(each + b"\n" for each in lines) + b"rest"
    cuts = sorted(data.draw(st.lists(st.integers(0, len(sent)))))
    buffer, found = ReceiveBuffer(9), []
    for start, end in zip([0, *cuts], [*cuts, len(sent)], strict=True):
        buffer.feed(sent[start:end])
        while (each := buffer.next_line()) is not None:
            found.append(each)
        assert not buffer.unsearched
    assert found == lines
    assert len(buffer) == len(b"rest")


@pytest.mark.parametrize("end", [b"", b"\n"], ids=["unfinished", "whole"])
def test_a_line_beyond_the_limit_is_not_taken_out(end: bytes) -> None:
    buffer = ReceiveBuffer(4)
    buffer.feed(b"1234\n12345" + end)
    assert buffer.next_line() == b"1234"
    with pytest.raises(InvalidRequest):
        buffer.next_line()


@pytest.mark.parametrize(
    "first",
    [
        *("POST / HTTP/1.1\r\n", "GET /metrics HTTP/1.0\r\n", "\r\nPUT /x HTTP/1.1\n"),
        *("PROPFIND /x HTTP/1.1\r\n", "post / http/1.1\n", "POST  /a b HTTP/1.1 \r\n"),
        *("X!#$%&'*+.^_`|~9 / HTTP/1.1\r\n", "POST /\r\n", "SETUP rtsp://x/y RTSP/1.0\r\n"),
        *("Content-Type: application/json\r\n", f"GET /{'a' * 9000} HTTP/1.1\r\n"),
    ],
)
async def test_no_line_of_an_http_request_is_carried_out(
    served: Served, connect: Connect, first: str
) -> None:
    peer = connect(served.control)
    head = f"{first}Host: localhost\r\nContent-Length: 9\r\n\r\n"
    await peer.send(head.encode() + json.dumps(CALL).encode() + b"\n")
    answers = []
    while text := await peer.receive_line():
        answers.append(json.loads(text))
    assert "HTTP" in answers[-1]["error"]["message"]
    assert len(answers) <= 2, "the blank line before it, and it"
    assert served.driver.calls == []
    assert served.server.statistics().dropped == {"http": 1}


@pytest.mark.parametrize(
    ("sent", "told"),
    [
        (b"\xef\xbb\xbf" + line("ping", None), "byte order mark"),
        (b"\n", "empty line"),
        (b" \r\n", "empty line"),
        (b"{\n", "does not end on its line"),
    ],
    ids=["BOM", "empty", "blank", "unfinished"],
)
async def test_what_is_no_json_is_told_what_it_is(
    served: Served, connect: Connect, sent: bytes, told: str
) -> None:
    peer = connect(served.control)
    await peer.send(sent)
    answer = await peer.receive()
    assert (code(answer), answer["id"]) == (-32700, None)
    assert told in answer["error"]["message"]
    await peer.settle()


@pytest.mark.parametrize(
    "sent",
    [
        b'\xef\xbb\xbf{"jsonrpc":"2.0","method":"ping","id":%b}',
        b'{"jsonrpc":"2.0","method":"exists","params":{"id":"\xff"},"id":%b}',
        b'{"jsonrpc":"2.0","id":%b,"method":"exists","params":{"id":"\\ud800"}}',
        b'{"jsonrpc":"2.0","id":%b,"method":"list","params":{"limit":1e400}}',
    ],
    ids=["BOM", "no UTF-8", "half a pair", "a number too large"],
)
@pytest.mark.parametrize("id", [7, "seven", 7.5, None])
async def test_json_that_cannot_be_read_is_refused_with_its_id_where_that_can(
    served: Served, connect: Connect, sent: bytes, id: object
) -> None:
    peer = connect(served.control)
    await peer.send(sent % json.dumps(id).encode() + b"\n")
    answer = await peer.receive()
    assert (code(answer), answer["id"]) == (-32700, id)
    assert "one line" not in answer["error"]["message"]
    await peer.settle()


@pytest.mark.parametrize("id", [b'"\xff"', b"1e400", b'"\\ud800"', b"[1]", b"NaN"])
async def test_an_id_that_cannot_be_said_again_is_null(
    served: Served, connect: Connect, id: bytes
) -> None:
    peer = connect(served.control)
    await peer.send(b'\xef\xbb\xbf{"jsonrpc":"2.0","method":"ping","id":%b}\n' % id)
    answer = await peer.receive()
    assert (code(answer), answer["id"]) == (-32700, None)
    await peer.settle()


@pytest.mark.parametrize("value", [CALL, [CALL, CALL]], ids=["request", "batch"])
async def test_json_over_several_lines_is_told_once_and_not_carried_out(
    served: Served, connect: Connect, value: object
) -> None:
    peer = connect(served.control)
    await peer.send(json.dumps(value, indent=2).encode() + b"\n")
    assert "one line" in (await peer.receive())["error"]["message"]
    await peer.settle()
    assert served.driver.calls == []


async def test_a_call_inside_of_an_unfinished_value_is_refused_with_its_id(
    served: Served, connect: Connect
) -> None:
    peer = connect(served.control)
    await peer.send(b"[\n" + json.dumps(CALL).encode() + b"\n]\n")
    assert code(await peer.receive()) == -32700
    answer = await peer.receive()
    assert (code(answer), answer["id"]) == (-32600, 7)
    await peer.settle()
    assert served.driver.calls == []


async def test_a_value_that_does_not_end_soon_ends_the_connection(
    served: Served, connect: Connect
) -> None:
    peer = connect(served.control)
    await peer.send(b"[\n" + b"1,\n" * 3000)
    assert code(await peer.receive()) == -32700
    assert "does not end within" in (await peer.receive())["error"]["message"]
    assert await peer.receive_line() == b""


async def test_lines_on_the_monitor_socket_are_short(served: Served, connect: Connect) -> None:
    peer = connect(served.monitor)
    await peer.send(b" " * (MONITOR_MAX_LINE - 100) + line("ping"))
    assert "result" in await peer.receive()
    await peer.send(b" " * MONITOR_MAX_LINE + line("ping"))
    assert code(await peer.receive()) == -32600
    assert await peer.receive_line() == b""
