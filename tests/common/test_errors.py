"""Errors: numbers, texts, and their documentation."""

import copy
from pathlib import Path

import pytest

from lichen.common import cli
from lichen.common.errors import Code, LichenError, name_of

DOCS = Path(__file__).parents[2] / "docs" / "errors.md"


def test_an_error_says_what_where_and_what_to_do():
    error = LichenError(Code.DATA_FIELD, "no field «body»", where="a.csv", fix="Map it.")
    assert str(error) == "error 41 (data-field): a.csv: no field «body»\n  Map it."


def test_a_number_has_a_name():
    assert (name_of(50), name_of(9999)) == ("privacy-budget", "unknown")


def test_an_error_survives_a_copy_between_processes():
    error = copy.copy(LichenError(Code.DATA_FIELD, "what", where="where", fix="fix"))
    assert (error.code, error.what, error.where, error.fix) == (Code.DATA_FIELD, "what", "where", "fix")


@pytest.mark.parametrize("code", Code, ids=lambda code: code.name)
def test_every_number_is_documented_and_a_usable_exit_code(code):
    assert f"## {int(code)} {code.name.lower().replace('_', '-')}\n" in DOCS.read_text(encoding="utf-8")
    assert 2 < code < 126


def test_a_full_disk_is_not_called_a_failure_of_lichen(monkeypatch, capsys):
    def command(**_):
        with open("/dev/full", "wb", buffering=0) as file:
            file.write(b"a checkpoint")

    monkeypatch.setattr(cli, "_root", command)
    with pytest.raises(SystemExit) as left:
        cli.main()
    told = capsys.readouterr().err
    assert (left.value.code, "No space left" in told, "--resume" in told) == (Code.OUTPUT_UNUSABLE, True, True)
