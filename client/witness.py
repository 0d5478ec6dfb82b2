"""The rollback guard: what this node has told its coordinator of its ledger, and whether the ledger is still as far.

With each reply the node sends where its ledger stands: how many times it has signed for it, which is an entry of the log as well, and a
salted hash of that entry, signed with a key that lies in the home and not in the ledger. Any reply counts one: the log's own numbers
would tell a coordinator, which chooses the rows that a task reads, whether there is one. The coordinator keeps the newest and gives it
back when the node connects; the home keeps the newest that it has signed or was given back, for a coordinator that knows nothing of the
node. A ledger that was restored from an older copy, deleted or left behind by a clone of this machine has not that entry, and nothing is
trained.

A state under another key than this home's holds only while the coordinator gives it, since anybody can make one: kept for good, it would
let a hostile coordinator shut the node out of every other federation.
"""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from google.protobuf.message import DecodeError

from lichen.client.ledger import FILE, Ledger, ledger_folder, open_ledger
from lichen.common.channel.fleet_pb2 import LedgerState
from lichen.common.errors import Code, LichenError
from lichen.common.private_files import read_private, write_private

log = logging.getLogger(__name__)
KEY = Path("pki/ledger.key")
STATE = Path("pki/ledger.state")
"""The newest state under this home's key, a `LedgerState`."""
LOST = Path("pki/ledger.lost.json")
"""How far a ledger that was found behind should be, for `write_off`."""
FORMAT = 1
_MOST = 2**53
"""No ledger gets so far: a larger number under another key is made up, and would leave no room behind it."""
_CONTEXT = b"lichen ledger state 2"


class Witness:
    """Signs where a home's ledger stands, and compares it with what was signed before; may be used from several threads.

    Args:
        home: the node's home; its key is made if it has none.

    Raises:
        LichenError: KEY_EXPOSED; CERTIFICATE_INVALID, if the key can't be read.
    """

    def __init__(self, home: Path) -> None:
        self._home = home
        path = home / KEY
        if not path.exists():
            pem = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            write_private(path, Ed25519PrivateKey.generate().private_bytes(*pem))
        try:
            key = serialization.load_pem_private_key(read_private(path), None)
        except (ValueError, TypeError, UnsupportedAlgorithm):
            key = None
        if not isinstance(key, Ed25519PrivateKey):
            raise LichenError(Code.CERTIFICATE_INVALID, "the key that signs for the ledger can't be read", where=str(path))
        self._key = key
        self._salt = hashlib.sha256(_CONTEXT + key.private_bytes_raw()).digest()
        self._newest: LedgerState | None = None
        self.due = True
        """Whether a reply should tell: of a plan without privacy nothing is spent, and the log would grow for nothing."""

    @property
    def name(self) -> str:
        """What no other home is called in the ledger."""
        return _name(self._key)

    def remember(self, state: LedgerState) -> None:
        """Take what the coordinator has kept, to be compared by `check`; what this home has signed is from now on kept here too."""
        if self._newest is None or state.sequence > self._newest.sequence or not self._own(self._newest):
            self._newest = state
        if self._own(state):  # a home that went back with its ledger would else forget it when it joins elsewhere
            self._keep(state)

    def sign(self) -> LedgerState | None:
        """Where the ledger stands now; None if there is none yet, if it is not as far as it was, or if it can't be read (see the log)."""
        try:
            self.check()
            if not self._exists():
                return None
            with open_ledger(self._home) as ledger:
                sequence, head = ledger.sign(self.name)
            salted = self._salted(head)
            state = LedgerState(sequence=sequence, head=salted, signature=self._key.sign(_bytes(sequence, salted)))
        except (LichenError, OSError) as error:
            log.warning("where the ledger stands was not signed: %s", error)
            return None
        self._newest = state
        self._keep(state)
        return state

    def check(self) -> None:
        """Refuse a ledger that lacks what was signed last, as the coordinator or this home has kept it.

        Raises:
            LichenError: LEDGER_BEHIND; then how far the ledger was is kept in the home, for `write_off`. PRIVACY_HISTORY, LEDGER_BROKEN,
                OUTPUT_UNUSABLE, if there is no telling; KEY_EXPOSED.
        """
        kept = _kept(self._home)
        for state in (kept,) if kept == self._newest else (self._newest, kept):
            if state is not None:
                self._compare(state)

    def _compare(self, state: LedgerState) -> None:
        own = self._own(state)
        why = "it is not there"
        if self._exists():
            with open_ledger(self._home) as ledger:
                if ledger.written_off_until(self.name) >= state.sequence:
                    return
                found = ledger.signed_hash(self.name, state.sequence)
                if found is not None and own and self._salted(found) == state.head:
                    return
                why = f"its last is number {ledger.signed(self.name)}" if found is None else f"its number {state.sequence} is another one"
        if own or state.sequence <= _MOST:
            _write(self._home / LOST, json.dumps({"format": FORMAT, "sequence": state.sequence}).encode())
        what = f"the ledger lacks entry {state.sequence} of those that this node has signed: {why}"
        if not own:
            what += "; what was kept was signed by another key than this home's"
        raise LichenError(Code.LEDGER_BEHIND, what, where=str(ledger_folder(self._home) / FILE), fix=self._way_on(state, own))

    def _way_on(self, state: LedgerState, own: bool) -> str:
        restore = "Restore the newest ledger."
        if not own:
            if state.sequence > _MOST:
                return "No ledger gets so far: the coordinator is at fault. Tell its operator, and write nothing off."
            restore = f"Restore the newest ledger, and {self._home / KEY} as it was with it."
        on = f"{restore} If it is lost: lichen client ledger --write-off lets only new records train."
        if not own and state is self._newest:  # the coordinator's, kept for an earlier node of that name
            on += " If these records were never another node's: ask the operator for an invite with a new name."
        return on

    def _keep(self, state: LedgerState) -> None:
        """Have the home hold a state that is newer than the one it holds."""
        try:
            kept = _kept(self._home)
        except (LichenError, OSError) as error:  # `check` says so too
            log.warning("where the ledger stands was not kept: %s", error)
            return
        if kept is None or kept.sequence < state.sequence:
            _write(self._home / STATE, state.SerializeToString())

    def _exists(self) -> bool:
        return (ledger_folder(self._home) / FILE).exists() or (self._home / FILE).exists()

    def _own(self, state: LedgerState) -> bool:
        try:
            self._key.public_key().verify(state.signature, _bytes(state.sequence, state.head))
        except InvalidSignature:
            return False
        return True

    def _salted(self, head: bytes) -> bytes:
        return hashlib.sha256(self._salt + head).digest()


def write_off(home: Path) -> int:
    """Take every record that the ledger or this home's data has as spent for life, and go on behind what was lost.

    It speaks for this home alone: another one on the same ledger, whose records may have been in the lost one, must do it too.

    Args:
        home: the node's home.

    Returns:
        How many data segments were written off.

    Raises:
        LichenError: PRIVACY_HISTORY, LEDGER_BROKEN, OUTPUT_UNUSABLE; KEY_EXPOSED; DATA_… if the home's data can't be read.
    """
    after = _lost(home)
    if (state := _kept(home)) is not None:
        after = max(after, state.sequence)
    with open_ledger(home) as ledger:
        _read_all(home, ledger)
        count = ledger.write_off(Witness(home).name, after)
    (home / LOST).unlink(missing_ok=True)
    return count


def _kept(home: Path) -> LedgerState | None:
    path = home / STATE
    if not path.exists():
        return None
    try:
        return LedgerState.FromString(read_private(path))
    except DecodeError:  # as good as lost: the coordinator has another
        log.warning("%s can't be read", path)
        return None


def _lost(home: Path) -> int:
    try:
        return int(json.loads((home / LOST).read_text(encoding="utf-8"))["sequence"])
    except FileNotFoundError:
        return 0
    except (ValueError, KeyError, TypeError):  # then `check` refuses, and writes it anew
        log.warning("%s can't be read", home / LOST)
        return 0


def _write(path: Path, data: bytes) -> None:
    """Write what helps later; a full disk must not hide what is told now."""
    try:
        write_private(path, data)
    except OSError as error:
        log.warning("%s can't be written: %s", path, error)


def _name(key: Ed25519PrivateKey) -> str:
    return hashlib.sha256(key.public_key().public_bytes_raw()).hexdigest()[:16]


def _read_all(home: Path, ledger: Ledger) -> None:
    """Have the ledger know every record of this home's data, under each field by which a plan may know it."""
    from lichen.client.data import MANIFEST, fingerprints, load, read_manifest

    if not (home / MANIFEST).exists() or not (sources := read_manifest(home).sources):
        return
    fields = [field for field in sources[0].fields if all(field in source.fields for source in sources)]
    for split in ("train", "holdout"):
        data = load(home, split, fields)
        found: list[int] = []
        for field in fields:
            column = data.column(field)
            found += fingerprints(ledger.fingerprint_key, "row", [column])
            found += fingerprints(ledger.fingerprint_key, f"entity:{field}", [column])
        ledger.assign(split, found)


def _bytes(sequence: int, head: bytes) -> bytes:
    return _CONTEXT + sequence.to_bytes(8, "big") + head
