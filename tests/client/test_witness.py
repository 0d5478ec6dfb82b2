"""The rollback guard: a ledger that lacks what this node has signed is found, whoever put it there; and how one goes on."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from flwr.app import Message, RecordDict

from lichen.client.connection import Connection, Credentials
from lichen.client.data import add_source
from lichen.client.ledger import FILE, Ledger, open_ledger
from lichen.client.ledger_book import Limit, Limits
from lichen.client.mailbox import Mailbox
from lichen.client.witness import KEY, LOST, STATE, Witness, write_off
from lichen.common.channel.fleet_pb2 import LedgerState
from lichen.common.channel.spool import Spool
from lichen.common.errors import Code, LichenError
from lichen.common.privacy.accounting import Segment
from lichen.common.records import build_message, message_from_bytes, message_to_bytes

LIMITS = Limits("example", Limit(100, 1e-5), Limit(100, 1e-5))


@pytest.fixture
def home(tmp_path: Path) -> Path:
    home = tmp_path / "home"
    home.mkdir()
    rows = [{"text": f"row {number}", "label": "a", "who": number % 4} for number in range(20)]
    (home / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    add_source(home, home / "rows.jsonl", fields={"text": "text", "label": "label", "patient": "who"}, holdout=6)
    return home


def spend(home: Path, message: str, *records: int) -> None:
    with Ledger(home) as ledger:
        reads = set(ledger.assign("train", records or [1, 2, 3]))
        ledger.reserve("train", "r", message, 1, Segment(2.0, 0.1, 5), LIMITS, reads, as_of=ledger.split_at)
        ledger.released("train", "r", message)


def behind(witness: Witness) -> str:
    return refusal(witness).what


def refusal(witness: Witness) -> LichenError:
    with pytest.raises(LichenError) as caught:
        witness.check()
    assert caught.value.code is Code.LEDGER_BEHIND
    assert witness.sign() is None
    return caught.value


def lose(home: Path) -> None:
    for path in home.glob(f"{FILE}*"):
        path.unlink()


def signed(home: Path) -> LedgerState:
    found = Witness(home).sign()
    assert found is not None
    return found


def asked(home: Path, *states: LedgerState) -> Witness:
    """A restarted agent, told by its coordinator."""
    witness = Witness(home)
    for state in states:
        witness.remember(state)
    return witness


def test_a_ledger_that_goes_on_passes(home: Path) -> None:
    assert Witness(home).sign() is None  # nothing was ever spent
    Witness(home).check()
    spend(home, "a")
    state = signed(home)
    asked(home, state).check()
    spend(home, "b")
    asked(home, state).check()
    asked(home, signed(home), state).check()
    assert signed(home).sequence > state.sequence
    assert (home / KEY).stat().st_mode & 0o777 == 0o600
    assert not (home / LOST).exists()


@pytest.mark.parametrize("fate", ["restored", "deleted", "forked", "another's"])
def test_a_ledger_that_is_behind_is_found(home: Path, fate: str) -> None:
    spend(home, "a")
    old = home.parent / "old.sqlite"
    shutil.copy(home / FILE, old)
    running = Witness(home)
    spend(home, "b")
    state = running.sign()
    assert state is not None
    lose(home)
    if fate in {"restored", "forked"}:
        shutil.copy(old, home / FILE)
    if fate == "forked":  # a clone went on by itself
        spend(home, "c")
    if fate == "another's":
        for number in range(9):
            spend(home, str(number))
    for witness in (running, asked(home, state)):  # while the agent runs, and after a restart
        assert "entry" in behind(witness) or fate == "deleted"
    assert json.loads((home / LOST).read_text())["sequence"] == state.sequence


def test_a_state_that_this_home_has_not_signed_is_refused(home: Path) -> None:
    spend(home, "a")
    state = signed(home)
    forged = LedgerState(sequence=state.sequence, head=state.head, signature=bytes(64))
    assert "another key" in behind(asked(home, forged))
    moved = LedgerState(sequence=state.sequence - 1, head=state.head, signature=state.signature)
    behind(asked(home, moved))
    (home / KEY).unlink()  # the key that could tell is lost
    behind(asked(home, state))


@pytest.mark.parametrize("lost", ["restored", "deleted"])
def test_a_write_off_lets_new_records_train_only(home: Path, lost: str) -> None:
    spend(home, "a")
    shutil.copy(home / FILE, home.parent / "old.sqlite")
    for message in "bcd":
        spend(home, message)
    state = signed(home)
    lose(home)
    if lost == "restored":
        shutil.copy(home.parent / "old.sqlite", home / FILE)
    behind(asked(home, state))
    assert write_off(home) >= 2  # this home's data, which the lost ledger may have known
    witness = asked(home, state)
    witness.check()
    newest = witness.sign()
    assert newest is not None
    assert newest.sequence > state.sequence
    with Ledger(home) as ledger:
        ledger.verify()
        assert all(segment.written_off for segment in ledger.segments())
        assert sum(segment.records for segment in ledger.segments()) >= 2 * 20 + 1 + 4 + 4  # by text; labels and patients, as both
    spend(home, "e", 77)


def test_a_write_off_speaks_for_one_home(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other home's records may have been in the lost ledger, and nobody has read them."""
    monkeypatch.setenv("LICHEN_LEDGER", str(tmp_path / "shared"))
    other = tmp_path / "other"
    shutil.copytree(home, other)
    states = []
    for place in (home, other):
        with open_ledger(place) as ledger:
            reads = set(ledger.assign("train", [hash(place)]))
            ledger.reserve("train", place.name, "m", 1, Segment(2.0, 0.1, 5), LIMITS, reads, as_of=ledger.split_at)
        states.append(signed(place))
    shutil.rmtree(tmp_path / "shared")
    for place, state in zip((home, other), states, strict=True):
        behind(asked(place, state))
    write_off(home)
    asked(home, states[0]).check()
    behind(asked(other, states[1]))
    write_off(other)
    asked(other, states[1]).check()
    asked(home, states[0]).check()


def test_a_coordinator_that_knows_nothing_is_no_way_past_it(home: Path) -> None:
    """The home keeps what it has signed: a node that joins another coordinator, or again, is held to it."""
    spend(home, "a")
    signed(home)
    lose(home)
    behind(asked(home))
    assert write_off(home) >= 2  # at once, and behind what was signed
    Witness(home).check()


def test_what_the_coordinator_told_holds_where_nobody_tells_it(home: Path) -> None:
    """A machine that went back with its home, and joins another coordinator, or this one under another name."""
    spend(home, "a")
    signed(home)
    image = home.parent / "image"
    shutil.copytree(home, image)
    spend(home, "b")
    state = signed(home)
    asked(image, state)
    behind(asked(image))
    shutil.copy(home / FILE, image / FILE)  # the newest ledger is a way on
    asked(image).check()


def test_a_damaged_ledger_of_a_home_that_went_back_is_written_off_at_once(home: Path) -> None:
    """Damage is found before anything is compared: what error 57 asks for must do, also where only the coordinator knows how far it was."""
    spend(home, "a")
    signed(home)
    old = (home / STATE).read_bytes()
    spend(home, "b")
    state = signed(home)
    (home / STATE).write_bytes(old)
    with Ledger(home) as ledger, ledger._transaction() as db:
        db.execute("UPDATE log SET body = body || ' ' WHERE sequence = 2")
    witness = asked(home, state)
    with pytest.raises(LichenError) as caught:
        witness.check()
    assert caught.value.code is Code.LEDGER_BROKEN
    lose(home)
    write_off(home)
    witness.check()


def test_a_number_that_no_ledger_reaches_does_no_harm(home: Path) -> None:
    """Such a state is made up; writing off would cost all records and not even satisfy who made it up."""
    spend(home, "a")
    forged = refusal(asked(home, LedgerState(sequence=2**62 - 1, head=bytes(32), signature=bytes(64))))
    assert "write nothing off" in forged.fix
    assert "--write-off" not in forged.fix
    assert not (home / LOST).exists()
    asked(home).check()
    write_off(home)
    spend(home, "b", 99)
    with Ledger(home) as ledger:
        assert ledger.verify() < 99


def test_a_made_up_number_leaves_room_for_further_losses(home: Path) -> None:
    spend(home, "a")
    behind(asked(home, LedgerState(sequence=2**53, head=bytes(32), signature=bytes(64))))
    for message in "bc":
        write_off(home)
        asked(home).check()
        spend(home, message, ord(message))
        assert signed(home).sequence > 2**53
        lose(home)
    write_off(home)
    asked(home).check()


def test_the_way_on_after_another_keys_state(home: Path) -> None:
    """A new machine under an old node's name, whose records may be others; and one whose key alone is lost."""
    spend(home, "a")
    state = signed(home)
    new = home.parent / "new"
    shutil.copytree(home, new)
    shutil.rmtree(new / "pki")
    lose(new)
    spend(new, "b", 7, 8)
    told = refusal(asked(new, state)).fix
    assert str(new / KEY) in told
    assert "--write-off" in told
    assert "with a new name" in told
    asked(new).check()  # as it is under the new name
    (home / KEY).unlink()
    assert "with a new name" not in refusal(asked(home)).fix  # which would not help: the home itself says so
    write_off(home)
    asked(home, state).check()


def test_a_disk_that_is_full_does_not_hide_that_the_ledger_is_behind(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spend(home, "a")
    witness = Witness(home)
    state = signed(home)
    (home / STATE).unlink()
    lose(home)

    def full(path: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("lichen.client.witness.write_private", full)
    witness.remember(state)
    behind(witness)
    monkeypatch.undo()
    (home / LOST).write_text("{")
    write_off(home)  # from 0 on
    behind(witness)
    write_off(home)
    witness.check()


def test_a_ledger_that_cannot_be_read_does_not_take_the_reply_along(home: Path, caplog: pytest.LogCaptureFixture) -> None:
    spend(home, "a")
    (home / FILE).write_bytes(b"no database")
    for end in ("-wal", "-shm"):
        (home / f"{FILE}{end}").unlink(missing_ok=True)
    assert Witness(home).sign() is None
    assert "was not signed" in caplog.text


def test_the_agent_replies_whatever_the_ledger_is(home: Path) -> None:
    spend(home, "a")
    with Ledger(home) as ledger, ledger._transaction() as db:
        db.execute("UPDATE log SET body = body || ' ' WHERE sequence = 2")
    mailbox = Mailbox(home / "agent.sqlite")
    connection = Connection("127.0.0.1:1", unreachable, mailbox, Spool(home / "spool"), witness=Witness(home))
    message = build_message(RecordDict(), run_id=1, message_id="a" * 32, src_node_id=1, dst_node_id=2, message_type="train", group_id="1")

    async def work() -> None:
        connection._add("a" * 32, message_to_bytes(message)).wanted = True
        working = asyncio.create_task(connection._work(broken))
        while mailbox.reply("a" * 32) is None:
            assert not working.done(), working.exception()
            await asyncio.sleep(0.01)
        working.cancel()

    async def broken(message: Message) -> Message:
        raise LichenError(Code.LEDGER_BROKEN, "as the worker finds it")

    asyncio.run(asyncio.wait_for(work(), 30))
    kept = mailbox.reply("a" * 32)
    assert kept is not None
    assert message_from_bytes(kept).error.code == Code.LEDGER_BROKEN
    assert mailbox.ledger("a" * 32) is None
    mailbox.close()


def unreachable() -> Credentials:
    raise AssertionError("nothing is sent here")


def test_the_write_off_knows_what_a_plan_would_read(home: Path) -> None:
    """The same records, fingerprinted as the app does it."""
    from lichen.client.data import fingerprints, load

    write_off(home)
    with Ledger(home) as ledger:
        for split in ("train", "holdout"):
            data = load(home, split, ("text", "patient"))
            found = fingerprints(ledger.fingerprint_key, "row", [data.column("text")])
            found += fingerprints(ledger.fingerprint_key, "entity:patient", [data.column("patient")])
            before = ledger.verify()
            of = set(ledger.assign(split, found))
            assert ledger.verify() == before
            _refused(lambda of=of, split=split: ledger.reserve(split, "r", "m", 1, Segment(2.0, 0.1, 5), LIMITS, of, as_of=ledger.split_at))


def _refused(call: Callable[[], object]) -> None:
    with pytest.raises(LichenError) as caught:
        call()
    assert caught.value.code is Code.PRIVACY_BUDGET
