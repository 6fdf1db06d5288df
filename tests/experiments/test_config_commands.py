"""`plait experiments`: the whole life of a configuration from the command line."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import sqlalchemy as sa
from click.testing import CliRunner, Result

from experiments.live import LiveConfig
from experiments.store import ConfigStore
from plait.cli import cli
from plait.models import ModelRegistry
from plait.settings import Home

YAML = """\
parameters:
  rank.model: {type: model, default: deepfm}
layers:
  rank: {unit: user, parameters: [rank.*]}
experiments:
  trees:
    layer: rank
    state: running
    buckets: 0-4999
    traffic: 100
    where: {attribute: country, equals: SE}
    arms:
      deepfm: {weight: 50, values: {rank.model: deepfm}}
      trees: {weight: 50, values: {rank.model: lightgbm}, testers: [anna]}
"""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    (tmp_path / "feature_store.yaml").write_text("project: p\n")
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "rank.yaml").write_text(YAML)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PLAIT_HOME", raising=False)
    monkeypatch.setenv("PLAIT_AUTHOR", "anna")
    return Home(project=tmp_path, root=tmp_path / ".plait").create()


def plait(*args: str, ok: bool = True) -> Result:
    result = CliRunner().invoke(cli, ["experiments", *args])
    assert (result.exit_code == 0) == ok, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result


def edit(home: Home, old: str, new: str) -> None:
    path = home.project / "experiments" / "rank.yaml"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


def test_validate_counts_what_is_there_and_says_what_it_could_not_check(home):
    result = plait("validate")
    assert "valid: 1 parameters, 1 layers, 1 experiments" in result.output
    assert "no model is registered yet" in result.stderr


def test_a_fault_is_one_message_with_file_and_line_and_exit_2(home):
    edit(home, "rank.model: lightgbm", "rank.modell: lightgbm")
    for command in ("validate", "apply"):
        result = plait(command, ok=False)
        assert result.exit_code == 2
        assert "rank.yaml:14: experiments.trees.arms.trees.values.rank.modell: no parameter" in result.stderr
        assert "did you mean 'rank.model'?" in result.stderr
    assert ConfigStore.at(home).head() is None


def test_one_file_or_another_folder_can_be_named(home, tmp_path):
    assert "valid" in plait("validate", str(home.project / "experiments" / "rank.yaml")).output
    assert "no *.yaml in" in plait("validate", str(tmp_path / "nowhere"), ok=False).stderr


def test_model_names_are_checked_against_the_registry(home):
    ModelRegistry(home).names()  # makes the tables
    engine = sa.create_engine(f"sqlite:///{home.plait_db}")
    with engine.begin() as db:
        for name in ("deepfm", "lightgmb"):
            row = f"('{name}', 1, '2026-03-01 00:00:00.000000', '{{}}')"
            db.exec_driver_sql(f"INSERT INTO model_versions (name, version, created, manifest) VALUES {row}")
    engine.dispose()
    assert "no model 'lightgbm' in the registry; did you mean 'lightgmb'?" in plait("apply", ok=False).stderr
    edit(home, "rank.model: lightgbm", 'rank.model: "lightgmb:1"')
    plait("validate")
    edit(home, "lightgmb:1", "lightgmb:2")
    assert "no model 'lightgmb:2' in the registry" in plait("apply", ok=False).stderr
    plait("apply", "--no-models")


def test_apply_ramp_kill_rollback_and_history(home):
    assert "version 1 is live" in plait("apply", "--note", "start at 100 %").output
    assert "nothing to do" in plait("apply").output
    edit(home, "traffic: 100", "traffic: 50")
    assert plait("diff").output == "~ experiments.trees.traffic: 100 → 50\n"
    assert "version 2 is live" in plait("apply", "--author", "bert").output
    assert "'running' → 'stopped'" in plait("kill", "trees", "--note", "clicks fell").output
    assert LiveConfig(ConfigStore.at(home)).snapshot.assign({"user": "1"}, {"country": "SE"}).arms == ()
    assert "version 4 is live" in plait("rollback", "2").output
    lines = plait("history").output.splitlines()
    assert [line.split()[0] for line in lines] == ["4", "3", "2", "1"]
    assert "back to version 2" in lines[0]
    assert "clicks fell" in lines[1]
    assert "bert" in lines[2]
    assert "+ experiments.trees:" in plait("history", "--diffs").output


def test_files_do_not_undo_a_kill_unless_told_to(home):
    plait("apply")
    plait("kill", "--all", "--note", "fire")
    edit(home, "traffic: 100", "traffic: 50")
    refused = plait("apply", ok=False)
    assert "version 2 was made by anna (kill: fire) and is not in these files" in refused.stderr
    assert "--expect 2" in refused.stderr
    assert "version 3 is live" in plait("apply", "--expect", "2").output


def test_an_old_base_is_refused(home):
    plait("apply")
    edit(home, "traffic: 100", "traffic: 50")
    plait("apply")
    edit(home, "traffic: 50", "traffic: 20")
    assert "based on version 1, but version 2 by anna is live" in plait("apply", "--expect", "1", ok=False).stderr


def test_show_gives_yaml_that_applies_to_the_same(home, tmp_path):
    plait("apply")
    text = plait("show").output
    assert text.startswith("# version 1, ")
    (tmp_path / "again.yaml").write_text(text)
    assert plait("diff", str(tmp_path / "again.yaml")).output == "no difference from version 1\n"


def test_list_shows_layers_shares_and_arms(home):
    edit(home, "traffic: 100", "traffic: 20")
    plait("apply")
    output = plait("list").output
    assert "version 1 (from store)" in output
    assert "layer rank  by user, in default, 50 % free" in output
    assert "trees" in output
    assert "10 %  deepfm 50  trees 50" in output
    (layer,) = json.loads(plait("list", "--json").output)["layers"]
    assert layer["owners"][0]["ranges"] == [[0, 4999]]
    assert layer["owners"][0]["in_use_percent"] == 10


def test_explain_says_what_a_unit_gets_and_why(home):
    plait("apply")
    unit = next(str(i) for i in range(100) if _explained(str(i))["bucket"] < 5000)
    assert "is for others: not (country equals 'SE')" in plait("explain", unit).output
    assert f"→ trees.{_explained(unit, '-a', 'country=SE')['arm']}" in plait("explain", unit, "-a", "country=SE").output
    forced = plait("explain", "anna", "--kind", "user").output
    assert "→ trees.trees (forced): 'anna' is a tester of this arm" in forced
    assert 'rank.model = "lightgbm"' in forced


def _explained(unit: str, *more: str) -> dict[str, object]:
    (layer,) = json.loads(plait("explain", unit, "--json", *more).output)["layers"]
    return layer


def test_explain_works_before_anything_was_applied_and_at_another_moment(home):
    edit(home, "traffic: 100", "start: 2030-01-01")
    unit = next(str(i) for i in range(100) if _explained(str(i))["bucket"] < 5000)
    assert "starts only at 2030-01-01" in plait("explain", unit, "-a", "country=SE").output
    assert "→ trees." in plait("explain", unit, "-a", "country=SE", "--at", "2030-06-01").output
    assert "is not a moment" in plait("explain", unit, "--at", "noon", ok=False).stderr
    assert "must be NAME=VALUE" in plait("explain", unit, "-a", "country", ok=False).stderr


def test_what_does_not_exist_says_what_does(home):
    assert "no version was applied yet" in plait("show", ok=False).stderr
    assert (
        "no version 3 of the experiments' configuration; there is none yet" in plait("rollback", "3", ok=False).stderr
    )
    plait("apply")
    assert "did you mean 'trees'?" in plait("kill", "tree", ok=False).stderr
    assert "name one experiment, or give --all" in plait("kill", ok=False).stderr


def test_the_schema_can_be_printed_for_an_editor(home):
    assert json.loads(plait("schema").output)["title"] == "Plait experiments configuration"


def test_a_database_that_is_gone_is_one_line(home):
    (home.root / "plait.db").mkdir()
    result = plait("history", ok=False)
    assert result.exit_code == 2
    assert result.stderr.startswith("plait: the experiment store does not answer")
    assert result.stderr.count("\n") == 1


def test_help_lists_every_command_without_importing_the_statistics(home):
    output = plait("--help").output
    for name in (
        "validate",
        "diff",
        "apply",
        "rollback",
        "kill",
        "list",
        "explain",
        "history",
        "show",
        "report",
        "power",
    ):
        assert f"  {name} " in output
    assert os.environ["PLAIT_AUTHOR"] == "anna"
