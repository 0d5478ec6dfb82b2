"""The agent's mailbox: what is kept, and what is sent again."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lichen.client.mailbox import Mailbox
from lichen.common.errors import Code, LichenError

A, B = "a" * 32, "b" * 32


@pytest.fixture
def mailbox(tmp_path: Path) -> Iterator[Mailbox]:
    mailbox = Mailbox(tmp_path / "agent.sqlite")
    yield mailbox
    mailbox.close()


def test_a_message_waits_until_it_has_a_reply_and_the_reply_until_it_is_receipted(mailbox: Mailbox) -> None:
    mailbox.put(A, b"message a")
    mailbox.put(B, b"message b")
    mailbox.sync()
    assert mailbox.unhandled() == [(A, b"message a"), (B, b"message b")]
    mailbox.put_reply(A, b"reply a")
    mailbox.put_reply(A, b"another reply a")
    assert mailbox.reply(A) == b"reply a"
    assert mailbox.unhandled() == [(B, b"message b")]
    assert mailbox.unreceipted() == [A]
    assert mailbox.counts() == (1, 1)
    assert sorted(mailbox.live_messages()) == [b"message b", b"reply a"]
    mailbox.receipt(A)
    assert mailbox.unreceipted() == []
    assert mailbox.reply(A) == b"reply a"
    assert mailbox.live_messages() == [b"message b"]


def test_a_withdrawn_message_is_not_handled_unless_it_comes_again(mailbox: Mailbox) -> None:
    mailbox.put(A, b"message a")
    mailbox.cancel([A, B])
    assert mailbox.unhandled() == []
    mailbox.put(A, b"message a")
    assert mailbox.unhandled() == [(A, b"message a")]


def test_where_the_ledger_stood_is_kept_with_the_reply(mailbox: Mailbox) -> None:
    mailbox.put(A, b"message a")
    mailbox.put_reply(A, b"reply a", b"state")
    mailbox.put_reply(A, b"another", b"another")
    mailbox.put_reply(B, b"reply b")
    assert (mailbox.ledger(A), mailbox.ledger(B)) == (b"state", None)


def test_a_mailbox_of_version_1_opens_with_all_it_holds(tmp_path: Path) -> None:
    path = tmp_path / "agent.sqlite"
    mailbox = Mailbox(path)
    mailbox.put_reply(A, b"reply a")
    mailbox.close()
    with sqlite3.connect(path) as db:
        db.execute("ALTER TABLE replies DROP COLUMN ledger")
        db.execute("DROP TABLE models")
        db.execute("PRAGMA user_version = 1")
    db.close()
    mailbox = Mailbox(path)
    assert (mailbox.reply(A), mailbox.ledger(A)) == (b"reply a", None)
    mailbox.close()


def test_who_only_opens_it_writes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "agent.sqlite"
    Mailbox(path).close()
    with sqlite3.connect(path) as db:
        before = db.execute("PRAGMA data_version").fetchone()
        Mailbox(path).close()
        assert db.execute("PRAGMA data_version").fetchone() == before
        other = Mailbox(path)
        other.put(A, b"message a")
        other.close()
        assert db.execute("PRAGMA data_version").fetchone() != before
    db.close()


def test_a_mailbox_of_a_newer_lichen_is_refused(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "agent.sqlite") as db:
        db.execute("PRAGMA user_version = 4")
    db.close()
    with pytest.raises(LichenError) as caught:
        Mailbox(tmp_path / "agent.sqlite")
    assert caught.value.code is Code.STORE_VERSION


def test_messages_and_replies_survive_a_kill(tmp_path: Path) -> None:
    script = f"""
import os, signal
from lichen.client.mailbox import Mailbox
mailbox = Mailbox({str(tmp_path / "agent.sqlite")!r})
mailbox.put({A!r}, b"message a")
mailbox.put_reply({A!r}, b"reply a")
mailbox.put({B!r}, b"message b")
os.kill(os.getpid(), signal.SIGKILL)
"""
    process = subprocess.run([sys.executable, "-c", script], check=False, env=dict(os.environ))
    assert process.returncode == -signal.SIGKILL
    mailbox = Mailbox(tmp_path / "agent.sqlite")
    assert (mailbox.unhandled(), mailbox.unreceipted()) == ([(B, b"message b")], [A])
    mailbox.close()
