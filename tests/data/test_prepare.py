"""Every data set becomes the same event tables; bad files are named by line and change nothing."""

from datetime import UTC, datetime

import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from plait.cli import cli
from plait.clock import Clock
from plait.data.movielens import STEPS, prepare_1m, prepare_100k
from plait.data.synthetic import SLATE, SyntheticSpec, Truth, prepare_synthetic
from plait.data.tables import SCHEMAS, prepared
from plait.errors import DataError
from plait.settings import Home

RATINGS = [(1, 10, 5, 100), (1, 11, 3, 200), (2, 10, 4, 300), (2, 12, 1, 400), (3, 11, 5, 500)]


@pytest.fixture
def home(tmp_path):
    return Home(project=tmp_path, root=tmp_path / ".plait").create()


@pytest.fixture
def folder_100k(tmp_path):
    folder = tmp_path / "ml"
    folder.mkdir()
    rows = "".join(f"{u}\t{i}\t{r}\t{t}\n" for u, i, r, t in RATINGS)
    (folder / "ml-100k.inter").write_text("user_id\titem_id\trating\ttimestamp\n" + rows)
    (folder / "ml-100k.user").write_text("h\n" + "".join(f"{u}\t24\tM\tartist\t85711\n" for u in (1, 2, 3)))
    (folder / "ml-100k.item").write_text(
        "h\n10\tToy Story\t1995\tAnimation Children's\n11\tX\t\t\n12\tHeat\t1995\tAction\n"
    )
    return folder


def table(home, name, side="events"):
    return pq.read_table(home.root / side / name, schema=SCHEMAS[name]).to_pylist()


def test_a_rating_is_an_impression_and_four_stars_are_a_click(home, folder_100k):
    prepare_100k(home, path=folder_100k, holdout=0)
    assert [(row["user_id"], row["item_id"]) for row in table(home, "impressions")] == [
        (u, i) for u, i, _, _ in RATINGS
    ]
    feedback = table(home, "feedback")
    assert [row["value"] for row in feedback if row["type"] == "rating"] == [5, 3, 4, 1, 5]
    clicks = [(row["user_id"], row["item_id"], row["value"]) for row in feedback if row["type"] == "click"]
    assert clicks == [(1, 10, None), (2, 10, None), (3, 11, None)]
    assert len({row["event_id"] for row in feedback}) == len(feedback)
    assert table(home, "items")[1]["genres"] == ["unknown"]
    assert table(home, "items")[1]["release_year"] is None


def test_the_latest_share_is_held_out_and_the_clock_stands_at_its_start(home, folder_100k):
    done = prepare_100k(home, path=folder_100k, holdout=0.4)
    assert done.cutoff == datetime.fromtimestamp(400, UTC)
    assert [row["item_id"] for row in table(home, "impressions", "holdout")] == [12, 11]
    assert abs((Clock.of(home).now() - done.cutoff).total_seconds()) < 60
    assert prepared(home).rows == done.rows


def test_the_1m_layout_gives_the_same_tables(home, tmp_path):
    folder = tmp_path / "1m"
    folder.mkdir()
    (folder / "ratings.dat").write_text("1::10::5::100\n1::11::3::200\n")
    (folder / "users.dat").write_text("1::F::18::10::48067\n")
    (folder / "movies.dat").write_bytes(
        "10::Misérables, Les (1995)::Drama|Musical\n11::B (1931)::War\n".encode("latin-1")
    )
    prepare_1m(home, path=folder, holdout=0)
    (first, _) = table(home, "items")
    assert (first["title"], first["release_year"], first["genres"]) == ("Misérables, Les", 1995, ["Drama", "Musical"])
    assert table(home, "users")[0]["age"] == 18
    assert len(table(home, "impressions")) == 2


def test_each_step_of_movielens_is_told_once_and_in_order(home, folder_100k):
    told = []
    prepare_100k(home, path=folder_100k, holdout=0, progress=lambda *call: told.append(call))
    assert told == [(step, i, len(STEPS)) for i, step in enumerate(STEPS)]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("1\t10\t5\n", "expected 4 columns"),
        ("1\t10\tfive\t100\n", "could not convert"),
        ("1\t10\t9\t100\n", "a rating lies between"),
    ],
)
def test_a_corrupt_line_is_named_and_nothing_is_written(home, folder_100k, line, complaint):
    with (folder_100k / "ml-100k.inter").open("a") as file:
        file.write(line)
    with pytest.raises(DataError, match=rf"line 7: .*{complaint}"):
        prepare_100k(home, path=folder_100k, holdout=0)
    assert prepared(home) is None
    assert not (home.events / "impressions").exists()


def test_a_missing_folder_or_file_is_a_clear_error(home, folder_100k, tmp_path):
    with pytest.raises(DataError, match="no folder"):
        prepare_100k(home, path=tmp_path / "nowhere", holdout=0)
    (folder_100k / "ml-100k.user").unlink()
    with pytest.raises(DataError, match=r"lacks ml-100k\.user"):
        prepare_100k(home, path=folder_100k, holdout=0)


def test_the_command_refuses_to_mix_data_sets_and_says_how_to_go_on(folder_100k, tmp_path, monkeypatch):
    (tmp_path / "feature_store.yaml").write_text("")
    monkeypatch.chdir(tmp_path)
    run = CliRunner().invoke(cli, ["data", "prepare", "movielens-100k", "--path", str(folder_100k)])
    assert run.exit_code == 0, run.output
    again = CliRunner().invoke(cli, ["data", "prepare", "synthetic"])
    assert again.exit_code == 2
    assert "--replace" in again.output
    assert "Traceback" not in again.output
    assert len(list((tmp_path / ".plait/events/impressions").iterdir())) == 1


@pytest.fixture
def small():
    return SyntheticSpec(n_users=300, n_items=60, n_requests=4_000, days=20, seed=3)


def test_synthetic_clicks_come_as_often_as_the_truth_says(home, small):
    prepare_synthetic(home, small, holdout=0.2)
    truth = Truth.load(home)
    shown = table(home, "impressions")
    clicks = {(row["request_id"], row["item_id"]) for row in table(home, "feedback") if row["type"] == "click"}
    expected = truth.click_probability(
        np.array([row["user_id"] for row in shown]),
        np.array([row["item_id"] for row in shown]),
        np.array([row["timestamp"].timestamp() for row in shown]),
        np.array([row["position"] for row in shown]),
    )
    clicked = np.array([(row["request_id"], row["item_id"]) in clicks for row in shown])
    for part in (expected < 0.1, expected >= 0.1):
        # Five standard errors of a sum of independent draws; clicks after the cutoff are few and lie in the holdout.
        tolerance = 5 * np.sqrt((expected[part] * (1 - expected[part])).sum()) + 5
        assert abs(clicked[part].sum() - expected[part].sum()) < tolerance


def test_synthetic_slates_hold_distinct_items_that_have_arrived(home, small):
    prepare_synthetic(home, small, holdout=0)
    truth = Truth.load(home)
    shown = table(home, "impressions")
    assert len(shown) == small.n_requests * SLATE
    assert len({(row["request_id"], row["item_id"]) for row in shown}) == len(shown)
    for row in shown:
        assert truth.item_arrival[row["item_id"] - 1] <= row["timestamp"].timestamp()
        assert truth.user_arrival[row["user_id"] - 1] <= row["timestamp"].timestamp()
        assert 0 < row["propensity"] <= 1


def test_synthetic_data_is_the_same_for_the_same_seed(tmp_path, small):
    homes = [Home(project=tmp_path, root=tmp_path / name).create() for name in "ab"]
    for home in homes:
        prepare_synthetic(home, small, holdout=0.1)
    for name in SCHEMAS:
        assert table(homes[0], name) == table(homes[1], name)


def test_progress_of_synthetic_data_reaches_the_number_of_requests(home):
    told = []
    spec = SyntheticSpec(n_users=30, n_items=20, n_requests=50_001, days=2)  # two chunks
    prepare_synthetic(home, spec, holdout=0, progress=lambda *call: told.append(call[1:]))
    assert told == [(0, 50_001), (50_000, 50_001), (50_001, 50_001)]


def test_synthetic_stars_grow_with_the_appeal(home, small):
    prepare_synthetic(home, small, holdout=0)
    truth = Truth.load(home)
    ratings = [row for row in table(home, "feedback") if row["type"] == "rating"]
    stars = np.array([row["value"] for row in ratings])
    appeal = truth.appeal(
        np.array([row["user_id"] for row in ratings]),
        np.array([row["item_id"] for row in ratings]),
        np.array([row["timestamp"].timestamp() for row in ratings]),
    )
    assert set(stars) <= {1, 2, 3, 4, 5}
    assert stars[appeal > 0.6].mean() > stars[appeal < 0.3].mean() + 0.5


def test_own_events_are_imported_by_command(tmp_path, monkeypatch):
    (tmp_path / "feature_store.yaml").write_text("")
    (tmp_path / "clicks.csv").write_text("who,sku,at\n1,10,1000\n2,11,2000\n")
    monkeypatch.chdir(tmp_path)
    command = ["data", "import", "feedback", "clicks.csv", "--unit", "ms", "--constant", "type=click"]
    columns = [part for pair in ("user_id=who", "item_id=sku", "timestamp=at") for part in ("--column", pair)]
    run = CliRunner().invoke(cli, [*command, *columns])
    assert run.exit_code == 0, run.output
    rows = table(Home(project=tmp_path, root=tmp_path / ".plait"), "feedback")
    assert [(row["user_id"], row["item_id"], row["type"], row["timestamp"].timestamp()) for row in rows] == [
        (1, 10, "click", 1.0),
        (2, 11, "click", 2.0),
    ]
    wrong = CliRunner().invoke(cli, [*command, "--column", "itme_id=sku"])
    assert wrong.exit_code == 2
    assert "did you mean 'item_id'" in wrong.output
