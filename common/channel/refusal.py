"""How a server tells a client a numbered error: in the trailing metadata of a gRPC status, whose details hold the text."""

from __future__ import annotations

from typing import Any, NoReturn

import grpc
import grpc.aio

from lichen.common.errors import Code, LichenError

_NUMBER = "lichen-error"
_FIX = "lichen-fix-bin"
_MAX_CHARACTERS = 500
_UNTRUSTED = "CERTIFICATE_VERIFY_FAILED"
_NAME_MISMATCH = "Hostname Verification"


async def refuse(context: grpc.aio.ServicerContext[Any, Any], error: LichenError) -> NoReturn:
    """End a call with a numbered error that the client may know in full."""
    metadata = ((_NUMBER, str(int(error.code))), (_FIX, error.fix.encode()))
    await context.abort(grpc.StatusCode.PERMISSION_DENIED, error.what, metadata)
    raise RuntimeError("abort returned")  # it always raises, but its stub does not say so


def told(failure: Any, where: str) -> LichenError | None:
    """Return the numbered error that the server told, or None if it told none.

    Args:
        failure: a call's failure, as raised by grpc or grpc.aio (whose stubs share no type that has both).
        where: the server's address.
    """
    try:
        metadata = dict(failure.trailing_metadata() or ())
        code = Code(int(metadata[_NUMBER]))
        fix = bytes(metadata.get(_FIX, b"")).decode()
    except (KeyError, ValueError, TypeError):
        return None
    return LichenError(code, _plain(failure.details() or ""), where=where, fix=_plain(fix))


def passing(failure: Any) -> bool:
    """Whether trying a failed call again may help: the network failed, not one of the two ends.

    Args:
        failure: a call's failure, as raised by grpc or grpc.aio.
    """
    details = failure.details() or ""
    failed = failure.code() in {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED}
    return failed and told(failure, "") is None and not any(text in details for text in (_UNTRUSTED, _NAME_MISMATCH))


def explain(failure: Any, where: str) -> LichenError:
    """Return a failed call as a numbered error: what the server told, else CONNECT_FAILED with what is likely wrong.

    Args:
        failure: a call's failure, as raised by grpc or grpc.aio.
        where: the server's address.
    """
    error = told(failure, where)
    if error is not None:
        return error
    details = _plain(failure.details() or "")
    status: grpc.StatusCode = failure.code()
    if status is grpc.StatusCode.RESOURCE_EXHAUSTED:
        return LichenError(Code.CONNECT_FAILED, details or "the coordinator is busy", where=where, fix="Wait a minute and try again.")
    if _UNTRUSTED in details:
        what, fix = "the server there did not prove to be this federation's coordinator", "Check the address and this machine's clock."
    elif _NAME_MISMATCH in details:
        what, fix = (
            "the coordinator's certificate is not for this address",
            "Use the address in the invite, or have its operator add this one.",
        )
    else:
        what = "the coordinator could not be reached, or ended the connection"
        fix = "Check the address, the network and that the coordinator runs; its log says why it refuses a certificate."
    return LichenError(Code.CONNECT_FAILED, f"{what} ({status.name}: {details})", where=where, fix=fix)


def _plain(text: str) -> str:
    """Keep what a terminal may show: the other end's text must not steer it."""
    return "".join(c if c.isprintable() else " " for c in text[:_MAX_CHARACTERS])
