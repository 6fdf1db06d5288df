"""The training set: what get_historical_features gives, checked against loops over rows."""

from __future__ import annotations

import shutil
from datetime import timedelta
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from plait.errors import DataError, SpecError, StoreError, UnknownNameError
from plait.offline.build import build_dataset, read_model
from plait.offline.card import write_card
from plait.offline.dataset import Dataset, find_datasets
from plait.offline.samples import build_samples
from plait.offline.saved import saved_name
from plait.offline.spec import SampleSpec, SplitSpec, parse_label
from tests.dataset.conftest import write


def naive_value(history: list[dict], keys: dict, moment, ttl: timedelta | None, feature: str):
    """The newest value at or before `moment`, if it is not older than ttl; else None."""
    rows = [row for row in history if all(row[k] == v for k, v in keys.items()) and row["event_timestamp"] <= moment]
    if not rows or any(value is None for value in keys.values()):
        return None
    newest = max(rows, key=lambda row: (row["event_timestamp"], row["created"]))
    if ttl is not None and newest["event_timestamp"] + ttl < moment:
        return None
    return newest[feature]


def test_every_feature_is_the_one_known_at_the_samples_time(project: SimpleNamespace) -> None:
    build_samples(project.home, SampleSpec())
    dataset = build_dataset(project.home, "tiny_clicks", store=project.store, chunk_rows=150)
    users, items, cross = (project.features[n].to_pylist() for n in ("user_stats", "item_profile", "user_genre"))
    n = 0
    for part in ("train", "valid", "test"):
        for row in dataset.split(part).to_table().to_pylist():
            moment, user = row["event_timestamp"], {"user_id": row["user_id"]}
            assert row["mean_7d"] == naive_value(users, user, moment, timedelta(days=5), "mean_7d")
            assert row["recent"] == naive_value(users, user, moment, timedelta(days=5), "recent")
            genre = naive_value(items, {"item_id": row["item_id"]}, moment, None, "primary_genre")
            assert row["primary_genre"] == genre
            assert row["n_genre"] == naive_value(cross, {**user, "genre": genre}, moment, None, "n_genre")
            assert row["split"] == part
            n += 1
    assert n == len(project.events["impressions"]) == sum(dataset.manifest.rows.values())
    assert dataset.features == ("mean_7d", "recent", "primary_genre", "n_shown", "n_genre")
    assert dataset.schema.field("recent").type == pa.list_(pa.int64())


def test_a_feature_that_knows_the_outcome_is_named_by_the_build(project: SimpleNamespace) -> None:
    """A table of "user means" computed after the click that they are to predict, dated at the impression."""
    build_samples(project.home, SampleSpec())
    honest = build_dataset(project.home, "tiny_clicks", store=project.store)
    assert not [line for line in write_card(honest).warnings if "leaks" in line]

    clicked = set(project.events["feedback"]["request_id"].to_pylist())
    shown = project.events["impressions"]
    outcome = [float(request in clicked) for request in shown["request_id"].to_pylist()]
    told = pa.table(
        {
            "user_id": shown["user_id"],
            "event_timestamp": shown["timestamp"],
            "created": shown["timestamp"],
            "mean_7d": pa.array(outcome, pa.float32()),
            "recent": pa.array([[]] * len(outcome), pa.list_(pa.int64())),
        }
    )
    write(project.home.features / "user_stats", told)
    leaky = build_dataset(project.home, "tiny_clicks", store=project.store)
    assert leaky.folder != honest.folder
    (leak,) = [line for line in write_card(leaky).warnings if "leaks" in line]
    assert "mean_7d (user_stats) alone predicts click with AUC 1.000" in leak
    assert leak in (leaky.folder / "card.md").read_text()


def test_the_card_counts_rows_and_labels_by_day(project: SimpleNamespace) -> None:
    build_samples(project.home, SampleSpec())
    dataset = build_dataset(project.home, "tiny_clicks", store=project.store)
    days: dict[str, list[int]] = {}
    for part in ("train", "valid", "test"):
        for row in dataset.split(part).to_table().to_pylist():
            days.setdefault(row["event_timestamp"].strftime("%Y-%m-%d"), []).append(row["click"])
    assert len(days) > 10
    assert list(write_card(dataset).by_day) == [
        {"day": day, "rows": len(clicks), "click": pytest.approx(sum(clicks) / len(clicks))}
        for day, clicks in sorted(days.items())
    ]


def test_a_dataset_that_exists_is_reused_and_shared_by_services_of_equal_features(project: SimpleNamespace) -> None:
    build_samples(project.home, SampleSpec())
    first = build_dataset(project.home, "tiny_clicks", store=project.store)
    before = (first.folder / "manifest.json").stat().st_mtime_ns
    for service in ("tiny_clicks", "tiny_same"):
        again = build_dataset(project.home, service, store=project.store)
        assert again.folder == first.folder
    assert (first.folder / "manifest.json").stat().st_mtime_ns == before
    assert build_dataset(project.home, "tiny_users", store=project.store).folder != first.folder


def test_new_features_or_new_samples_are_a_new_dataset(project: SimpleNamespace) -> None:
    build_samples(project.home, SampleSpec())
    first = build_dataset(project.home, "tiny_users", store=project.store)
    source = project.home.features / "user_stats" / "part-0.parquet"
    pq.write_table(pq.read_table(source).slice(1), source)
    second = build_dataset(project.home, "tiny_users", store=project.store)
    build_samples(project.home, SampleSpec(split=SplitSpec(kind="user")))
    third = build_dataset(project.home, "tiny_users", store=project.store)
    assert len({first.folder, second.folder, third.folder}) == 3
    assert find_datasets(project.home.datasets)[0].folder in {second.folder, third.folder}


def test_turning_the_created_cutoff_on_is_a_new_dataset_without_what_became_known_later(
    project: SimpleNamespace,
) -> None:
    if project.offline == "stock":
        pytest.skip("the setting is of Plait's offline store")
    source = project.home.features / "user_stats" / "part-0.parquet"
    table = pq.read_table(source)
    told_later = pc.add(table["event_timestamp"], pa.scalar(timedelta(days=2)).cast(pa.duration("us")))
    pq.write_table(table.set_column(table.schema.get_field_index("created"), "created", told_later), source)
    build_samples(project.home, SampleSpec())
    blind = build_dataset(project.home, "tiny_users", store=project.store)
    config = project.home.project / "feature_store.yaml"
    config.write_text(config.read_text().replace("online_store:", "  created_cutoff: on\nonline_store:"))
    with pytest.warns(UserWarning, match="created_cutoff: view 'user_stats' had newer values that were not known yet"):
        strict = build_dataset(project.home, "tiny_users")
    assert strict.folder != blind.folder
    users, n_differ = table.to_pylist(), 0
    for part in ("train", "valid", "test"):
        seen = zip(*(each.split(part).to_table().to_pylist() for each in (blind, strict)), strict=True)
        for row, known in seen:
            moment, user = row["event_timestamp"], {"user_id": row["user_id"]}
            assert row["mean_7d"] == naive_value(users, user, moment, timedelta(days=5), "mean_7d")
            # Known two days late: what was known at t is what had happened by two days before.
            earlier = naive_value(users, user, moment - timedelta(days=2), timedelta(days=3), "mean_7d")
            assert known["mean_7d"] == earlier
            n_differ += row["mean_7d"] != known["mean_7d"]
    assert n_differ > 10


def test_chunks_give_the_same_bytes_as_one_join(project: SimpleNamespace) -> None:
    build_samples(project.home, SampleSpec())
    first = build_dataset(project.home, "tiny_clicks", store=project.store, chunk_rows=37)
    shutil.rmtree(first.folder)
    second = build_dataset(project.home, "tiny_clicks", store=project.store)
    assert second.manifest.data_hash == first.manifest.data_hash
    assert second.manifest.key == first.manifest.key
    assert not list(second.folder.rglob(".work"))


def test_the_manifest_says_what_the_dataset_is(project: SimpleNamespace) -> None:
    samples = build_samples(project.home, SampleSpec())
    dataset = build_dataset(project.home, "tiny_clicks", store=project.store)
    manifest = dataset.manifest
    assert manifest.samples_hash == samples.data_hash
    assert manifest.rows == samples.rows
    assert manifest.positives == {name: dict(counts) for name, counts in samples.positives.items()}
    assert manifest.derived_keys == {"genre": "item_profile:primary_genre"}
    assert manifest.schema == {field.name: str(field.type) for field in dataset.schema}
    assert manifest.label == "click"
    assert [feature.side for feature in manifest.features] == ["request", "request"] + ["candidate"] * 3
    assert dataset.split("valid").to_table(["click"]).num_rows == samples.rows["valid"]


def test_feast_knows_the_dataset_as_a_saved_dataset(project: SimpleNamespace) -> None:
    build_samples(project.home, SampleSpec())
    dataset = build_dataset(project.home, "tiny_clicks", store=project.store)
    saved = project.store.get_saved_dataset(saved_name(dataset))
    assert saved.feature_service_name == "tiny_clicks"
    assert saved.tags["plait.data_hash"] == dataset.manifest.data_hash
    read = saved.to_df()
    assert len(read) == sum(dataset.manifest.rows.values())
    assert set(dataset.features) <= set(read.columns)


def test_a_registration_that_failed_is_made_up_for_by_the_next_build(
    project: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_samples(project.home, SampleSpec())

    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("database is locked")

    with monkeypatch.context() as patched:
        patched.setattr(project.store.registry, "apply_saved_dataset", refuse)
        with pytest.raises(StoreError, match=r"is complete, but Feast's registry .*database is locked"):
            build_dataset(project.home, "tiny_users", store=project.store)
    (dataset,) = find_datasets(project.home.datasets)
    assert build_dataset(project.home, "tiny_users", store=project.store).folder == dataset.folder
    assert project.store.get_saved_dataset(saved_name(dataset)).tags["plait.data_hash"] == dataset.manifest.data_hash


def test_a_truncated_part_is_named_on_opening_and_the_next_build_repairs_it(project: SimpleNamespace) -> None:
    build_samples(project.home, SampleSpec())
    dataset = build_dataset(project.home, "tiny_users", store=project.store)
    part = dataset.folder / dataset.manifest.parts[0].path
    part.write_bytes(part.read_bytes()[:-7])
    with pytest.raises(DataError, match=r"part-00000\.parquet: \d+ bytes where \d+ bytes were written"):
        Dataset.open(dataset.folder)
    repaired = build_dataset(project.home, "tiny_users", store=project.store)
    assert repaired.manifest.data_hash == dataset.manifest.data_hash


def test_a_flipped_byte_is_found_by_verifying(project: SimpleNamespace) -> None:
    build_samples(project.home, SampleSpec())
    dataset = build_dataset(project.home, "tiny_users", store=project.store)
    part = dataset.folder / dataset.manifest.parts[0].path
    content = bytearray(part.read_bytes())
    content[60] ^= 1
    part.write_bytes(content)
    with pytest.raises(DataError, match="SHA-256 differs"):
        Dataset.open(dataset.folder, verify=True)


def test_a_failed_retrieval_leaves_no_dataset(project: SimpleNamespace) -> None:
    build_samples(project.home, SampleSpec())
    source = project.home.features / "user_stats" / "part-0.parquet"
    source.write_bytes(b"PAR1 torn")
    with pytest.raises(StoreError):
        build_dataset(project.home, "tiny_users", store=project.store)
    assert list(project.home.datasets.iterdir()) == []


def test_names_that_are_nearly_right_are_suggested(project: SimpleNamespace) -> None:
    with pytest.raises(DataError, match="run `plait samples build` first"):
        build_dataset(project.home, "tiny_clicks", store=project.store)
    build_samples(project.home, SampleSpec())
    with pytest.raises(UnknownNameError, match="did you mean 'tiny_clicks'"):
        build_dataset(project.home, "tiny_click", store=project.store)
    with pytest.raises(UnknownNameError, match="did you mean 'click'"):
        build_dataset(project.home, "tiny_clicks", label="clik", store=project.store)
    with pytest.raises(UnknownNameError, match="did you mean 'tiny'"):
        read_model(project.home, "tinny")
    dataset = build_dataset(project.home, "tiny_users", store=project.store)
    with pytest.raises(UnknownNameError, match="did you mean 'train'"):
        dataset.split("tain")
    with pytest.raises(UnknownNameError, match="did you mean 'mean_7d'"):
        dataset.split("train").to_table(["mean7d"])


def test_a_model_configuration_without_its_keys_says_which(project: SimpleNamespace) -> None:
    config = project.home.project / "trainers" / "configs" / "odd.yaml"
    config.write_text("name: odd\nlabel: click\n")
    with pytest.raises(SpecError, match="lacks feature_service"):
        read_model(project.home, "odd")
    config.write_text("name: [odd\n")
    with pytest.raises(SpecError, match="not YAML"):
        read_model(project.home, "odd")


def test_a_dataset_reused_for_another_label_is_checked_for_leaks_of_that_label(
    project: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A feature that knows what is bought is no leak to a model of clicks."""
    from plait.cli import cli

    monkeypatch.chdir(project.home.project)
    monkeypatch.delenv("PLAIT_HOME", raising=False)
    shown = project.events["impressions"]
    bought = [i % 2 == 0 for i in range(len(shown))]
    buys = [{**row, "event_id": f"b{i}", "type": "buy"} for i, row in enumerate(shown.to_pylist()) if bought[i]]
    write(project.home.events / "feedback", pa.Table.from_pylist(buys, project.events["feedback"].schema), "b.parquet")
    told = {"mean_7d": pa.array([float(told) for told in bought], pa.float32())}
    told |= {"user_id": shown["user_id"], "event_timestamp": shown["timestamp"], "created": shown["timestamp"]}
    told |= {"recent": pa.array([[]] * len(shown), pa.list_(pa.int64()))}
    write(project.home.features / "user_stats", pa.table(told))
    build_samples(project.home, SampleSpec(labels=(parse_label("click"), parse_label("buy"))))
    build = ["dataset", "build", "--service", "tiny_users", "--label"]
    for label, word, leaks in (
        ("click", "built", 0),
        ("buy", "reused", 1),
        ("buy", "reused", 1),
        ("click", "reused", 0),
    ):
        done = CliRunner().invoke(cli, [*build, label])
        assert done.exit_code == 0 and done.output.startswith(word)
        assert done.output.count("mean_7d (user_stats) alone predicts buy with AUC 1.000") == leaks
    assert "label `buy`" in CliRunner().invoke(cli, ["dataset", "show", "--label", "buy"]).output


def test_the_command_builds_for_a_model_then_reuses_and_shows_the_card(
    project: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    from plait.cli import cli

    monkeypatch.chdir(project.home.project)
    monkeypatch.delenv("PLAIT_HOME", raising=False)
    build_samples(project.home, SampleSpec())
    first = CliRunner().invoke(cli, ["dataset", "build", "tiny"])
    assert first.exit_code == 0, first.output
    assert "built " in first.output
    assert "5 features of tiny_clicks" in first.output
    again = CliRunner().invoke(cli, ["dataset", "build", "--service", "tiny_clicks"])
    assert "reused " in again.output
    shown = CliRunner().invoke(cli, ["dataset", "show"])
    assert "| mean_7d | user_stats | float |" in shown.output
    assert "## Label rate by day" in shown.output
    listed = CliRunner().invoke(cli, ["dataset", "list"])
    assert "5 features" in listed.output
    wrong = CliRunner().invoke(cli, ["dataset", "build", "tny"])
    assert wrong.exit_code == 2
    assert "did you mean 'tiny'" in wrong.output
    both = CliRunner().invoke(cli, ["dataset", "build"])
    assert both.exit_code == 2
    assert "name one of MODEL and --service" in both.output
