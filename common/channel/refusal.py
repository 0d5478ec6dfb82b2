"""How a server tells a client a numbered error: in the trailing metadata of a gRPC status, whose details hold the text."""

from __future__ import annotations

from typing import Any, NoReturn

import grpc
import grpc.aio

from lichen.common.errors import Code, LichenError

_NUMBER = "lichen-error"
_FIX = "lichen-fix-bin"
_MAX_CHARACTERS = 500


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


def _plain(text: str) -> str:
    """Keep what a terminal may show: the other end's text must not steer it."""
    return "".join(c if c.isprintable() else " " for c in text[:_MAX_CHARACTERS])
