"""`lichen plan`, as a shell sees it: output, exit codes, errors; and that it stays light."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lichen.common.cli import COMMANDS, main
from lichen.common.hardware import Profile, work_of
from lichen.common.plan import Plan, load_plan, parse_plan, plan_from_json


def lichen(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    code = "import sys; from lichen.common.cli import main; sys.argv[0] = 'lichen'; main()"
    return subprocess.run([sys.executable, "-c", code, *arguments], cwd=cwd, capture_output=True, text=True, timeout=60, check=False)


def test_new_validate_show_and_schema(tmp_path: Path) -> None:
    made = lichen("plan", "new", "p.yaml", "--name", "mine", cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    assert "lichen plan validate p.yaml" in made.stdout
    plan = load_plan(tmp_path / "p.yaml")
    assert (plan.name, plan.private) == ("mine", True)

    checked = lichen("plan", "validate", "p.yaml", "--set", "rounds=9", cwd=tmp_path)
    assert checked.returncode == 0, checked.stderr
    assert "9 rounds" in checked.stdout
    assert load_plan(tmp_path / "p.yaml", ["rounds=9"]).sha256() in checked.stdout

    shown = lichen("plan", "show", "p.yaml", "--json", cwd=tmp_path)
    assert plan_from_json(shown.stdout) == plan
    (tmp_path / "full.yaml").write_text(lichen("plan", "show", "p.yaml", cwd=tmp_path).stdout)
    assert load_plan(tmp_path / "full.yaml") == plan

    assert "name: r8\n" in lichen("plan", "show", "r8", cwd=tmp_path).stdout  # a scenario, to start from
    assert lichen("plan", "validate", "r8", cwd=tmp_path).returncode == 0
    assert "--set rounds=0" in lichen("plan", "validate", "r8", "--set", "rounds=0", cwd=tmp_path).stderr

    told = json.loads(lichen("plan", "schema", cwd=tmp_path).stdout)
    assert set(told["properties"]) == set(Plan.model_fields)


def test_show_explains_what_a_machine_would_do_and_refuses_what_it_can_not(
    tmp_path: Path, tiny_plan: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)

    def show(*arguments: str) -> tuple[int, str]:  # in this process, since each new one would load torch
        monkeypatch.setattr(sys, "argv", ["lichen", "plan", "show", "p.yaml", "--for", *arguments])
        with pytest.raises(SystemExit) as left:
            main()
        out, err = capsys.readouterr()
        return int(left.value.code or 0), out + err

    large = {**tiny_plan, "local": {"steps": 50, "batch_size": 4096, "max_physical_batch_size": 4096}}
    plan = parse_plan({**large, "cohort": {"size": 2, "deadline_s": 100, "assign": ["steps", "max_physical_batch_size"]}})
    (tmp_path / "p.yaml").write_text(plan.to_yaml())
    profile = Profile(memory_mb=800, threads=2, work=work_of(plan), tokens_per_s=50_000)
    (tmp_path / "node.json").write_text(profile.model_dump_json())
    code, told = show("node.json")
    assert code == 0, told
    assert "cpu, 800 MiB free, 2 threads, 50000 tokens/s" in told
    assert "max_physical_batch_size 2048, not 4096" in told
    assert "steps 30, not 50" in told  # of 80 s, 2.6 s each
    facts = json.loads(show("node.json", "--json")[1])
    assert facts["changes"] == {"max_physical_batch_size": 2048, "steps": 30}
    assert facts["memory_mb"] <= 800 < facts["whole_mb"]
    small = tmp_path / "small.yaml"
    small.write_text("memory_mb: 300\n")
    code, told = show("small.yaml")
    assert code == 15
    assert "such a node can't take part: memory: the least that the plan permits takes" in told
    code, told = show("toaster")
    assert code == 40
    assert "cpu-4gb" in told


def test_a_plan_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_text("mine")
    failed = lichen("plan", "new", "p.yaml", cwd=tmp_path)
    assert failed.returncode == 13
    assert (tmp_path / "p.yaml").read_text() == "mine"
    assert lichen("plan", "new", "none/p.yaml", cwd=tmp_path).returncode == 14


def test_a_bad_name_leaves_no_file(tmp_path: Path) -> None:
    failed = lichen("plan", "new", "p.yaml", "--name", "Not A Name", cwd=tmp_path)
    assert failed.returncode == 21
    assert "name:" in failed.stderr
    assert not (tmp_path / "p.yaml").exists()


@pytest.mark.parametrize(
    ("text", "status", "told"),
    [
        ("rounds: 1\nlocl: {}\n", 21, "nearest valid: local"),
        ("a: [", 20, "line 1"),
        ("format: 99\n", 23, "Upgrade lichen"),
    ],
)
def test_errors_are_numbered_and_on_standard_error(tmp_path: Path, text: str, status: int, told: str) -> None:
    (tmp_path / "p.yaml").write_text(text)
    failed = lichen("plan", "validate", "p.yaml", cwd=tmp_path)
    assert failed.returncode == status
    assert f"error {status} " in failed.stderr
    assert told in failed.stderr
    assert "Traceback" not in failed.stderr
    assert failed.stdout == ""


def test_a_wrong_command_line_is_2_and_a_missing_file_20(tmp_path: Path) -> None:
    assert lichen("plan", "validate", cwd=tmp_path).returncode == 2
    assert lichen("plan", "nonsense", cwd=tmp_path).returncode == 2
    assert lichen("nonsense", cwd=tmp_path).returncode == 2
    assert lichen("plan", "validate", "none.yaml", cwd=tmp_path).returncode == 20


def test_help_names_every_command_and_imports_none(tmp_path: Path) -> None:
    code = (
        "import sys; from lichen.common.cli import main; sys.argv = ['lichen', '--help']\n"
        "try: main()\n"
        "finally: print([m for m in ('torch', 'transformers', 'flwr', 'peft', 'sklearn') if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.stderr.strip() == "[]"
    assert all(name in done.stdout for name in COMMANDS)


def test_checking_a_plan_imports_no_torch(tmp_path: Path) -> None:
    lichen("plan", "new", "p.yaml", cwd=tmp_path)
    code = (
        "import sys; from lichen.common.cli import main; sys.argv = ['lichen', 'plan', 'validate', 'p.yaml']\n"
        "try: main()\n"
        "finally: print([m for m in ('torch', 'transformers', 'flwr', 'peft') if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.stderr.strip() == "[]"
    assert done.returncode == 0
