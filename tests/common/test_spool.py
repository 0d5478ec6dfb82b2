"""The spool: payloads appear only complete and verified, and partial ones go on where they ended."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lichen.common.channel.spool import Spool
from lichen.common.errors import Code, LichenError
from lichen.common.records import PayloadRef


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    return Spool(tmp_path / "spool")


def digest_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_bytes_and_files_lie_under_their_digest(spool: Spool) -> None:
    ref = spool.add_bytes(b"update")
    with spool.temporary() as file:
        file.write(b"another")
    other = spool.add_file(file.name)
    assert ref == PayloadRef(digest_of(b"update"), 6)
    assert spool.path(ref.digest).read_bytes() == b"update"
    assert spool.path(other.digest).read_bytes() == b"another"
    assert not Path(file.name).exists()
    assert spool.has(ref.digest)
    assert spool.length(ref.digest) == 6
    assert spool.length("0" * 64) is None


@pytest.mark.parametrize("digest", ["", "../../etc/passwd", "A" * 64, "0" * 63, "0" * 65, "0" * 63 + "\n"])
def test_a_name_that_is_no_digest_is_refused(spool: Spool, digest: str) -> None:
    with pytest.raises(LichenError) as caught:
        spool.path(digest)
    assert caught.value.code is Code.FRAME_INVALID


@settings(max_examples=30, deadline=None)
@given(data=st.binary(min_size=1, max_size=5000), cuts=st.lists(st.integers(0, 5000), max_size=5))
def test_a_transfer_broken_anywhere_ends_with_the_same_bytes(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, cuts: list[int]
) -> None:
    spool = Spool(tmp_path_factory.mktemp("spool"))
    digest = digest_of(data)
    for cut in sorted(min(cut, len(data)) for cut in [*cuts, len(data)]):
        partial = spool.partial(digest, len(data))
        partial.write([data[partial.offset : cut]])
        assert partial.offset == cut
        assert not spool.has(digest)
        partial.close()
    partial = spool.partial(digest, len(data))
    assert partial.offset == len(data)
    partial.finish()
    assert spool.path(digest).read_bytes() == data
    assert len(os.listdir(spool.directory)) == 1


def test_other_bytes_than_the_digest_says_are_refused_and_gone(spool: Spool) -> None:
    digest = digest_of(b"right")
    partial = spool.partial(digest, 5)
    partial.write([b"wrong"])
    with pytest.raises(LichenError) as caught:
        partial.finish()
    assert caught.value.code is Code.PAYLOAD_CORRUPT
    assert not spool.has(digest)
    assert spool.partial(digest, 5).offset == 0


def test_too_many_bytes_are_refused_before_they_are_written(spool: Spool) -> None:
    partial = spool.partial(digest_of(b"right"), 5)
    partial.write([b"rig"])
    with pytest.raises(LichenError) as caught:
        partial.write([b"ht", b"!"])
    assert caught.value.code is Code.FRAME_INVALID
    assert partial.offset == 3


def test_a_partial_file_longer_than_the_payload_is_begun_anew(spool: Spool) -> None:
    digest = digest_of(b"right")
    spool.path(digest).with_suffix(".part").write_bytes(b"much too long")
    assert spool.partial(digest, 5).offset == 0


def test_an_empty_payload_is_complete_at_once(spool: Spool) -> None:
    partial = spool.partial(digest_of(b""), 0)
    partial.finish()
    assert spool.length(digest_of(b"")) == 0


def test_collect_frees_what_nobody_needs_and_nothing_young_or_foreign(spool: Spool) -> None:
    kept, dropped = spool.add_bytes(b"kept"), spool.add_bytes(b"dropped")
    partial = spool.partial(digest_of(b"never finished"), 14)
    partial.write([b"never"])
    partial.close()
    spool.temporary().close()
    (spool.directory / "README").write_text("not ours")
    assert spool.collect({kept.digest}) == 0
    assert spool.collect({kept.digest}, min_age=-1) == len(b"dropped")
    assert spool.collect({kept.digest}, min_age=-1, partial_age=-1) == len(b"never")
    assert spool.has(kept.digest)
    assert not spool.has(dropped.digest)
    assert sorted(os.listdir(spool.directory)) == sorted(["README", kept.digest])
