"""Nothing of an unexpected failure reaches a peer but the number of an incident."""

import errno
import os

import pytest
import trio
from structlog.testing import capture_logs

from aufsd.rpc.faults import is_cancellation, translate
from aufsd_client.errors import InternalError, LayerInUse, LayerNotFound, NoSpace, Overloaded

KNOWN = LayerNotFound("there is no layer a", id="a")
FROM_A_JOB = InternalError("the archive job failed: /secret/path", traceback="/secret/code.py")


@pytest.mark.parametrize(
    "raised",
    [
        OSError(5, "I/O error", "/secret/path"),
        FROM_A_JOB,
        BaseExceptionGroup("g", [KNOWN, ValueError("/secret/value")]),
        BaseExceptionGroup("g", [FROM_A_JOB]),
    ],
    ids=["unexpected", "an archive job's", "a group with one", "a group of a job's"],
)
def test_an_unexpected_failure_is_an_incident(raised: BaseException) -> None:
    with capture_logs() as logged:
        error = translate(raised)
    assert type(error) is InternalError
    assert "/secret" not in str(error.to_wire())
    (line,) = [line for line in logged if line["event"] == "incident"]
    assert line["incident"] == error.data["incident"]
    assert line["exc_info"] is raised


@pytest.mark.parametrize(
    "raised", [KNOWN, BaseExceptionGroup("g", [KNOWN, LayerInUse("another")])], ids=["one", "group"]
)
def test_an_error_of_the_api_goes_out_as_it_is(raised: BaseException) -> None:
    assert translate(raised) is KNOWN


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_no_incident_wherever_it_is_met(number: int) -> None:
    error = translate(OSError(number, os.strerror(number), "/secret/path"))
    assert isinstance(error, NoSpace)
    assert error.data == {"errno": errno.errorcode[number]}
    assert "/secret" not in error.message


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS])
def test_what_the_host_has_too_little_of_is_no_incident(number: int) -> None:
    error = translate(OSError(number, os.strerror(number), "/secret/path"))
    assert isinstance(error, Overloaded)
    assert error.data == {"errno": errno.errorcode[number]}
    assert "/secret" not in error.message
    assert isinstance(translate(RuntimeError("can't start new thread")), Overloaded)


def test_what_is_not_ours_to_handle_is_raised_again() -> None:
    group = BaseExceptionGroup("g", [KeyboardInterrupt()])
    with pytest.raises(BaseExceptionGroup):
        translate(group)


async def cancellation() -> trio.Cancelled:
    """One of Trio's own, which cannot be made otherwise."""
    caught: list[trio.Cancelled] = []
    with trio.CancelScope() as scope:
        scope.cancel()
        try:
            await trio.lowlevel.checkpoint()
        except trio.Cancelled as cancelled:
            caught.append(cancelled)
            raise
    return caught[0]


async def test_a_group_of_cancellations_is_a_cancellation() -> None:
    cancelled = await cancellation()
    assert is_cancellation(cancelled)
    assert is_cancellation(BaseExceptionGroup("g", [cancelled, cancelled]))
    assert not is_cancellation(BaseExceptionGroup("g", [cancelled, KNOWN]))
    assert not is_cancellation(KNOWN)


async def test_a_cancellation_inside_a_group_hides_nothing() -> None:
    assert translate(BaseExceptionGroup("g", [await cancellation(), KNOWN])) is KNOWN
