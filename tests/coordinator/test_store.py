"""The coordinator's store: what it promises to others, across restarts, crashes and threads."""

from __future__ import annotations

import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from lichen.common.errors import Code, LichenError
from lichen.coordinator.store import Store, random_id

A, B, C = (f"{number:032x}" for number in (10, 11, 12))


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(tmp_path / "store.sqlite")
    yield store
    store.close()


def refused(code: Code, function: object, *values: object) -> None:
    with pytest.raises(LichenError) as caught:
        function(*values)  # type: ignore[operator]
    assert caught.value.code is code


def test_an_invite_works_once_and_in_time(store: Store) -> None:
    store.add_invite("clinic-a", "secret-a", 100.0)
    store.add_invite("clinic-b", "secret-b", 100.0)
    assert store.take_invite("secret-a", 99.9) == "clinic-a"
    refused(Code.INVITE_USED, store.take_invite, "secret-a", 99.9)
    refused(Code.INVITE_EXPIRED, store.take_invite, "secret-b", 100.0)
    refused(Code.INVITE_INVALID, store.take_invite, "secret-c", 1.0)


def test_one_invite_taken_by_many_at_once_has_one_winner(store: Store) -> None:
    store.add_invite("clinic-a", "secret", 100.0)
    answers: list[str] = []

    def take() -> None:
        try:
            answers.append(store.take_invite("secret", 1.0))
        except LichenError as error:
            answers.append(error.code.name)

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(answers) == ["INVITE_USED"] * 7 + ["clinic-a"]


def test_a_name_is_free_again_only_when_its_node_was_revoked(store: Store) -> None:
    first = store.add_node("clinic-a", "f1")
    refused(Code.NAME_TAKEN, store.add_node, "clinic-a", "f2")
    revoked = store.revoke_node("clinic-a", 5.0)
    assert (revoked.node_id, revoked.revoked_at, revoked.active) == (first, 5.0, False)
    assert store.node_by_name("clinic-a") == revoked
    refused(Code.NODE_UNKNOWN, store.revoke_node, "clinic-a", 6.0)
    second = store.add_node("clinic-a", "f2")
    assert second != first
    node = store.node_by_name("clinic-a")
    assert node is not None
    assert node.node_id == second
    assert store.node_by_id(first) == revoked
    assert [item.node_id for item in store.nodes()] == [first, second]
    assert store.node_by_name("clinic-z") is None


def test_node_ids_fit_sqlite_and_flower() -> None:
    assert all(1 <= random_id() < 2**63 for _ in range(1000))


def test_the_old_certificate_is_good_until_the_new_one_was_seen(store: Store) -> None:
    node_id = store.add_node("clinic-a", "old")
    store.renew_node("clinic-a", "new")
    node = store.node_by_name("clinic-a")
    assert node is not None
    assert node.accepts("old")
    assert node.accepts("new")
    store.saw_node(node_id, "old", 7.0)
    store.renew_node("clinic-a", "newer")  # the answer with "new" was lost
    node = store.node_by_name("clinic-a")
    assert node is not None
    assert (node.accepts("old"), node.accepts("new"), node.accepts("newer"), node.last_seen) == (True, False, True, 7.0)
    store.saw_node(node_id, "newer", 8.0)
    node = store.node_by_name("clinic-a")
    assert node is not None
    assert (node.accepts("old"), node.accepts("newer")) == (False, True)
    refused(Code.NODE_UNKNOWN, store.renew_node, "clinic-z", "f")


def test_runs_and_rounds(store: Store) -> None:
    run_id = random_id()
    store.add_run(run_id, '{"rounds": 2}', "/runs/x")
    assert [(run.run_id, run.status, run.plan, run.directory, run.error) for run in store.runs()] == [
        (run_id, "queued", '{"rounds": 2}', "/runs/x", None)
    ]
    store.set_run_status(run_id, "failed", "error 89")
    assert (store.run(run_id).status, store.run(run_id).error) == ("failed", "error 89")
    refused(Code.RUN_UNKNOWN, store.run, 1)
    refused(Code.RUN_UNKNOWN, store.set_run_status, 1, "running")
    assert store.load_round(run_id, 1) is None
    store.save_round(run_id, 1, {"cohort": [1, 2]})
    store.save_round(run_id, 1, {"cohort": [1, 2], "done": True})
    assert store.load_round(run_id, 1) == {"cohort": [1, 2], "done": True}


def test_the_outbox_keeps_the_first_bytes_and_the_first_reply(store: Store) -> None:
    node = store.add_node("clinic-a", "f")
    store.put_outbox([(A, 1, node, b"first"), (B, 1, node, b"b")])
    store.put_outbox([(A, 1, node, b"second")])
    assert store.outstanding(node) == [A, B]
    assert store.message(A) == b"first"
    assert store.awaits(A, node) == (1, True)
    assert store.awaits(A, node + 1) is None
    store.ack(A, node)
    assert store.save_replies([(A, node, b"reply"), (A, node, b"again"), (B, node + 1, b"of another node"), (C, node, b"unknown")]) == [
        True,
        False,
        False,
        False,
    ]
    assert store.reply(A) == b"reply"
    assert store.reply(B) is None
    assert store.outstanding(node) == [B]
    assert store.message(A) is None
    assert store.awaits(A, node) == (1, False)
    assert sorted(store.live_messages()) == [b"b", b"first", b"reply"]


def test_withdrawn_messages_are_not_sent_and_their_replies_not_kept_until_they_are_wanted_again(store: Store) -> None:
    node = store.add_node("clinic-a", "f")
    store.put_outbox([(A, 1, node, b"a"), (B, 1, node, b"b")])
    store.save_replies([(A, node, b"reply")])
    assert store.cancel([A, B, C], 5.0) == [(B, node)]
    assert store.outstanding(node) == []
    assert store.save_replies([(B, node, b"late")]) == [False]
    assert store.reply(A) == b"reply"
    store.put_outbox([(B, 1, node, b"b")])
    assert store.outstanding(node) == [B]


def test_released_messages_are_erased_for_good(store: Store) -> None:
    node = store.add_node("clinic-a", "f")
    store.put_outbox([(A, 1, node, b"a")])
    store.save_replies([(A, node, b"reply")])
    store.release([A], 5.0)
    store.put_outbox([(A, 1, node, b"a")])
    assert store.outstanding(node) == []
    assert store.reply(A) is None
    assert list(store.live_messages()) == []
    assert store.awaits(A, node) == (1, False)


def test_what_was_used_is_told_from_what_came_too_late(store: Store) -> None:
    store.put_outbox([("a", 7, 1, b"used"), ("b", 7, 2, b"late"), ("c", 7, 3, b"open")])
    store.save_replies([("a", 1, b"reply")])
    assert not store.used("a")
    store.cancel(["a", "b"], 1.0)
    store.release(["a", "b"], 2.0)
    assert [store.used(message_id) for message_id in ("a", "b", "c", "none")] == [True, False, False, False]


def test_revoking_a_node_withdraws_what_it_was_to_be_sent(store: Store) -> None:
    node = store.add_node("clinic-a", "f")
    store.put_outbox([(A, 1, node, b"a")])
    store.revoke_node("clinic-a", 5.0)
    assert store.outstanding(node) == []


def test_all_is_there_after_closing_and_in_a_backup(store: Store, tmp_path: Path) -> None:
    node = store.add_node("clinic-a", "f")
    store.put_outbox([(A, 1, node, b"a")])
    store.backup(tmp_path / "backup.sqlite")
    store.close()
    for path in (store.path, tmp_path / "backup.sqlite"):
        again = Store(path)
        assert again.outstanding(node) == [A]
        again.close()


def test_where_a_ledger_stands_only_grows(store: Store) -> None:
    node, other = store.add_node("clinic-a", "f"), store.add_node("clinic-b", "g")
    assert store.ledger_of(node) is None
    for sequence, head in ((5, b"five"), (9, b"nine"), (9, b"fork"), (7, b"seven")):
        store.note_ledger(node, sequence, head, b"s" + head)
    assert store.ledger_of(node) == (9, b"nine", b"snine")
    assert store.ledger_of(other) is None
    # one that joins again, as a machine restored from an old image must, is held to it
    store.revoke_node("clinic-a", 1.0)
    again = store.add_node("clinic-a", "h")
    assert store.ledger_of(again) == (9, b"nine", b"snine")


def test_a_store_of_version_1_opens_with_all_it_holds(tmp_path: Path) -> None:
    path = tmp_path / "store.sqlite"
    store = Store(path)
    node = store.add_node("clinic-a", "f")
    store.close()
    with sqlite3.connect(path) as db:
        for column in ("ledger_sequence", "ledger_head", "ledger_signature"):
            db.execute(f"ALTER TABLE nodes DROP COLUMN {column}")
        db.execute("PRAGMA user_version = 1")
    db.close()
    store = Store(path)
    assert store.nodes()[0].name == "clinic-a"
    store.note_ledger(node, 1, b"h", b"s")
    assert store.ledger_of(node) == (1, b"h", b"s")
    store.close()


def test_a_store_of_a_newer_lichen_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "store.sqlite"
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version = 99")
    db.close()
    refused(Code.STORE_VERSION, Store, path)


def test_what_was_said_to_be_kept_survives_a_kill(tmp_path: Path) -> None:
    script = f"""
import os, signal
from lichen.coordinator.store import Store
store = Store({str(tmp_path / "store.sqlite")!r})
node = store.add_node("clinic-a", "f")
store.put_outbox([({A!r}, 1, node, b"a")])
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == -signal.SIGKILL
    store = Store(tmp_path / "store.sqlite")
    assert store.outstanding(store.nodes()[0].node_id) == [A]
    store.close()
