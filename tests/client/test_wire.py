"""Frames: a line is the same line however it arrives."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

import aufsd_client
from aufsd.rpc import dispatch
from aufsd_client.errors import BY_NAME, AufsdError, LayerNotFound, Overloaded
from aufsd_client.wire import BadReply, LineSplitter, decode_reply, encode_request, match

LINES = [b"", b"{}", '{"id": "ü"}'.encode(), b"x" * 50, b" "]
STREAM = b"".join(line + b"\n" for line in LINES)


@pytest.mark.parametrize("at", range(len(STREAM) + 1))
def test_lines_split_at_every_byte(at: int) -> None:
    splitter = LineSplitter()
    assert splitter.feed(STREAM[:at]) + splitter.feed(STREAM[at:]) == LINES
    assert splitter.pending == 0


def test_lines_byte_by_byte() -> None:
    splitter = LineSplitter()
    assert [line for byte in STREAM for line in splitter.feed(bytes([byte]))] == LINES


@given(st.lists(st.binary()), st.integers(0, 5))
def test_lines_are_what_split_says_with_or_without_a_limit(chunks: list[bytes], limit: int) -> None:
    splitter = LineSplitter(limit)
    found = [line for chunk in chunks for line in splitter.feed(chunk)]
    *whole, rest = b"".join(chunks).split(b"\n")
    long = [n for n, line in enumerate([*whole, rest]) if limit and len(line) > limit]
    assert splitter.overlong is bool(long)
    assert found == (whole[: long[0]] if long else whole)
    assert splitter.pending == (0 if long else len(rest))


@pytest.mark.parametrize("size", [1, 3, 100])
def test_a_line_may_be_as_long_as_the_limit_and_no_longer(size: int) -> None:
    for length, fits in ((10, True), (11, False)):
        splitter = LineSplitter(limit=10)
        data = b"a\n" + b"x" * length + b"\nb\n"
        found = [
            line for n in range(0, len(data), size) for line in splitter.feed(data[n : n + size])
        ]
        assert found == ([b"a", b"x" * 10, b"b"] if fits else [b"a"])
        assert splitter.overlong is not fits


def test_a_line_that_never_ends_is_not_kept() -> None:
    splitter = LineSplitter(limit=10)
    assert splitter.feed(b"x" * 11) == []
    assert splitter.overlong
    assert splitter.pending == 0
    assert splitter.feed(b"\nafter\n") == []


@pytest.mark.parametrize("text", ["plain", 'ü\n\\"', "\udc80", "\x00", "x" * 10_000])
def test_the_daemon_reads_what_the_client_writes(text: str) -> None:
    frame = encode_request("me:get#1", "get", {"id": text})
    assert frame.count(b"\n") == 1
    assert frame.endswith(b"\n")
    if text != "\udc80":
        assert dispatch.decode(frame[:-1]) == {
            "jsonrpc": "2.0",
            "method": "get",
            "params": {"id": text},
            "id": "me:get#1",
        }


def test_the_client_reads_what_the_daemon_writes() -> None:
    reply = match(decode_reply(dispatch.success("me", {"path": "ü"})), "me")
    assert (reply.result, reply.error) == ({"path": "ü"}, None)
    reply = match(decode_reply(dispatch.failure("me", LayerNotFound("none", id="a"))), "me")
    assert isinstance(reply.error, LayerNotFound)
    assert (reply.error.message, reply.error.data) == ("none", {"id": "a"})


@pytest.mark.parametrize("name", BY_NAME)
def test_an_error_crosses_as_its_class_with_its_sentence_and_data(name: str) -> None:
    raised = BY_NAME[name]("a sentence", id="a", errno="EBUSY")
    found = decode_reply(dispatch.failure("me", raised)).error
    assert found is not None
    assert type(found) is BY_NAME[name]
    assert getattr(aufsd_client, name) is BY_NAME[name]
    assert (found.code, found.message, found.data) == (raised.code, raised.message, raised.data)


def test_an_error_that_this_client_does_not_know_keeps_its_code() -> None:
    line = b'{"jsonrpc":"2.0","error":{"code":999,"message":"m","data":{"name":"New"}},"id":"me"}'
    found = decode_reply(line).error
    assert found is not None
    assert type(found) is AufsdError
    assert (found.code, found.message) == (999, "m")
    assert AufsdError.code != 999


@pytest.mark.parametrize(
    "line", [b"", b"garbage", b"[]", b"{}", b'{"id": 1, "result": 5}', b"\xff"]
)
def test_what_is_no_answer_is_a_bad_reply(line: bytes) -> None:
    with pytest.raises(BadReply):
        decode_reply(line)


def test_an_answer_to_another_call_is_not_taken() -> None:
    with pytest.raises(BadReply):
        match(decode_reply(dispatch.success("other", {})), "me")


def test_an_error_of_the_connection_is_raised() -> None:
    with pytest.raises(Overloaded):
        match(decode_reply(dispatch.failure(None, Overloaded("too many"))), "me")
