"""Which node a peer is, by the certificate that it showed; and how a refusal reads in the log."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from lichen.common.errors import Code, LichenError
from lichen.common.pki import require_role
from lichen.coordinator.store import Node, Store


def admit(store: Store, auth_context: Mapping[str, Iterable[bytes]]) -> tuple[Node, str]:
    """Return the active node whose certificate the peer has shown in the handshake, and that certificate's fingerprint.

    The handshake has checked authority and dates; the store knows whether the certificate still counts.

    Args:
        store: the coordinator's store.
        auth_context: gRPC's ``context.auth_context()``.

    Raises:
        LichenError: CERTIFICATE_MISSING without a certificate; CERTIFICATE_INVALID if it is not a node's; NODE_UNKNOWN if no such
            node was ever enrolled; CERTIFICATE_REVOKED if the node was revoked or has a newer certificate.
    """
    info = require_role(auth_context, "node")
    node = store.node_by_name(info.name)
    if node is None:
        raise LichenError(Code.NODE_UNKNOWN, f"no node named {info.name!r} is enrolled here", fix="Join with a new invite.")
    if not node.active:
        raise revoked(node.name)
    if not node.accepts(info.fingerprint):
        raise LichenError(
            Code.CERTIFICATE_REVOKED,
            f"this certificate of {info.name!r} was replaced by another",
            fix="If this machine did not enrol or renew again, tell the operator; else ask for a new invite.",
        )
    return node, info.fingerprint


def revoked(name: str) -> LichenError:
    """The error that a revoked node is told."""
    return LichenError(Code.CERTIFICATE_REVOKED, f"the node {name!r} was revoked", fix="Ask the operator for a new invite.")


def one_line(error: LichenError) -> str:
    """An error for the log: number, name and what was wrong, in one line whatever the peer sent."""
    return " ".join(str(LichenError(error.code, error.what, where=error.where)).split())
