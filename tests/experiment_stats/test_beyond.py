"""Interleaving, bandits, off-policy evaluation and uplift, against exact sums, synthetic truth and real logs."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from scipy import stats

from experiments.bandits import LinearBandit, ThompsonSampling, explore
from experiments.interleaving import credit, credit_test, probabilistic_credit
from experiments.offpolicy import clipping_table, greedy_probabilities, importance_weights, policy_value
from experiments.slates import Interleaved, probabilistic, softmax_rank, team_draft
from experiments.stats.bayes import beta_posterior
from experiments.uplift import fit_t_learner, uplift_quality
from plait.errors import DataError, SpecError

# -- interleaving ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mix", [team_draft, probabilistic])
@pytest.mark.parametrize("seed", range(20))
def test_a_list_shows_k_distinct_items_of_either_ranker(mix, seed):
    rng = np.random.default_rng(seed)
    a, b = list(rng.permutation(12)[:8]), list(rng.permutation(12)[:8])
    shown = mix(a, b, k=6, rng=rng)
    assert len(shown.items) == len(shown.teams) == len(set(shown.items)) == 6
    for item, team in zip(shown.items, shown.teams, strict=True):
        assert item in (a if team == "a" else b)


def test_team_draft_is_fair_round_by_round():
    rng = np.random.default_rng(1)
    for _ in range(50):
        shown = team_draft(range(10), range(20, 30), k=6, rng=rng)
        for i in range(0, 6, 2):
            assert set(shown.teams[i : i + 2]) == {"a", "b"}


def test_a_list_ends_when_both_rankers_have_nothing_left():
    rng = np.random.default_rng(2)
    for mix in (team_draft, probabilistic):
        assert sorted(mix([1, 2], [2, 3], k=9, rng=rng).items) == [1, 2, 3]
        assert mix([], [], k=3, rng=rng).items == ()
        assert mix([], [5], k=3, rng=rng).items == (5,)


@pytest.mark.parametrize("mix", [team_draft, probabilistic])
def test_random_clicks_prefer_nobody(mix):
    """Clicks that ignore the items are won by either ranker equally often, whatever the lists."""
    rng = np.random.default_rng(3)
    a, b = list(range(10)), list(range(9, -1, -1))
    given = []
    for _ in range(3000):
        shown = mix(a, b, k=5, rng=rng)
        given.append(credit(shown, {item for i, item in enumerate(shown.items) if rng.random() < 0.5 / (i + 1)}))
    assert stats.ttest_1samp(given, 0).pvalue > 0.001


@pytest.mark.parametrize("mix", [team_draft, probabilistic])
def test_the_better_ranker_wins(mix):
    rng = np.random.default_rng(4)
    good, poor = list(range(10)), [3, 1, 4, 0, 5, 9, 2, 6, 8, 7]
    given, users = [], []
    for user in range(400):
        for _ in range(3):
            shown = mix(good, poor, k=5, rng=rng)
            clicked = {item for item in shown.items if rng.random() < 0.5 * 0.6**item}
            given.append(credit(shown, clicked))
            users.append(user)
    result = credit_test(given, users)
    assert result.effect.high < 0  # a is better
    assert result.sign_p_value < 0.001
    assert result.wins_a + result.wins_b + result.ties == 400
    assert result.delta < 0


def test_marginal_credit_is_the_mean_over_all_team_assignments():
    a, b, tau = [1, 2, 3], [3, 1, 2], 2.0
    items, clicked = [2, 3, 1], {2, 1}

    def likelihood(teams):
        p = 1.0
        left = {t: {i: softmax_rank(r, tau) for r, i in enumerate(ranked, 1)} for t, ranked in (("a", a), ("b", b))}
        for item, team in zip(items, teams, strict=True):
            p *= left[team][item] / sum(left[team].values())
            for pool in left.values():
                pool.pop(item)
        return p

    every = list(itertools.product("ab", repeat=3))
    total = sum(likelihood(teams) for teams in every)
    expected = sum(
        likelihood(teams) / total * credit(Interleaved(items=tuple(items), teams=teams), clicked) for teams in every
    )
    assert probabilistic_credit(items, a, b, clicked, tau=tau) == pytest.approx(expected, rel=1e-12)


def test_the_credit_test_is_a_t_test_over_users():
    given, users = [1.0, 1.0, -1.0, 2.0, 0.0], [7, 7, 8, 9, 10]
    result = credit_test(given, users)
    theirs = stats.ttest_1samp([2.0, -1.0, 2.0, 0.0], 0)
    assert result.effect.p_value == pytest.approx(theirs.pvalue)
    assert (result.wins_b, result.wins_a, result.ties) == (2, 1, 1)
    assert credit_test([], []).sign_p_value == 1.0


# -- bandits -----------------------------------------------------------------------------------------------------------


def test_thompson_propensities_are_how_often_an_arm_is_chosen():
    policy = ThompsonSampling(successes={"a": 12, "b": 15, "c": 2}, trials={"a": 100, "b": 100, "c": 30}, floor=0.02)
    rng = np.random.default_rng(5)
    draws = np.column_stack(
        [beta_posterior(s, n).rvs(200_000, random_state=rng) for s, n in ((12, 100), (15, 100), (2, 30))]
    )
    best = np.bincount(draws.argmax(axis=1), minlength=3) / 200_000
    np.testing.assert_allclose([policy.probabilities[a] for a in "abc"], best, atol=0.004)  # none is below the floor
    chosen = [policy.choose(rng) for _ in range(5000)]
    assert np.mean([c.arm == "b" for c in chosen]) == pytest.approx(policy.probabilities["b"], abs=0.03)
    assert all(c.propensity == pytest.approx(policy.probabilities[c.arm]) for c in chosen)


def test_thompson_sampling_finds_the_best_arm():
    rng = np.random.default_rng(6)
    truth = {"a": 0.05, "b": 0.08, "c": 0.04}
    policy = ThompsonSampling.fresh(list(truth))
    for _ in range(40):
        arms = [policy.choose(rng).arm for _ in range(200)]
        policy = policy.update(arms, [float(rng.random() < truth[arm]) for arm in arms])
    assert policy.probabilities["b"] > 0.8
    assert policy.trials["b"] > 4000


def test_a_floor_keeps_every_propensity_large_enough_to_divide_by():
    policy = ThompsonSampling(successes={"a": 900, "b": 1}, trials={"a": 1000, "b": 1000}, floor=0.05)
    assert policy.probabilities["b"] == pytest.approx(0.05, abs=1e-9)
    assert sum(explore({"a": 3.0, "b": 1.0}, 0.1).values()) == pytest.approx(1.0)
    with pytest.raises(SpecError, match="impossible"):
        explore({"a": 1.0, "b": 0.0}, 0.6)


def test_linucb_is_ridge_regression_and_its_bound():
    rng = np.random.default_rng(7)
    x, y = rng.normal(size=(50, 3)), rng.normal(size=50)
    bandit = LinearBandit.fresh(["a", "b"], 3, ridge=0.5, width=2.0).update(["a"] * 50, x, y)
    inverse = np.linalg.inv(x.T @ x + 0.5 * np.eye(3))
    context = rng.normal(size=3)
    expected = context @ inverse @ x.T @ y + 2.0 * math.sqrt(context @ inverse @ context)
    assert bandit.upper_bounds(context)[0] == pytest.approx(expected, rel=1e-9)
    assert bandit.upper_bounds(context)[1] == pytest.approx(2.0 * math.sqrt(context @ context / 0.5), rel=1e-9)


def test_a_contextual_bandit_learns_whom_to_show_what_and_its_log_values_other_policies():
    """Two kinds of users like opposite arms; the log's propensities price the best policy and a constant one."""
    rng = np.random.default_rng(8)
    bandit = LinearBandit.fresh(["a", "b"], 2, floor=0.05)
    log = []
    for batch in range(30):
        rows = []
        for _ in range(60):
            kind = int(rng.random() < 0.5)
            choice = bandit.choose(np.eye(2)[kind], rng)
            reward = float(rng.random() < (0.6 if (choice.arm == "a") == (kind == 0) else 0.3))
            rows.append((kind, choice.arm, choice.propensity, reward))
        bandit = bandit.update([r[1] for r in rows], np.eye(2)[[r[0] for r in rows]], [r[3] for r in rows])
        log += rows if batch > 4 else []
    late = log[-300:]
    assert np.mean([(arm == "a") == (kind == 0) for kind, arm, *_ in late]) > 0.8
    kinds, arms, propensities, rewards = (np.array(column) for column in zip(*log, strict=True))
    for target, truth in (((arms == "a") == (kinds == 0), 0.6), (arms == "a", 0.45)):
        weights = importance_weights(target.astype(float), propensities)
        value = policy_value(rewards, weights, method="ips")
        assert abs(value.value - truth) < 4 * value.se


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: ThompsonSampling(successes={"a": 2, "b": 0}, trials={"a": 1, "b": 0}),
        lambda: ThompsonSampling.fresh(["a"]),
        lambda: ThompsonSampling.fresh(["a", "b"]).update(["a"], [2.0]),
        lambda: ThompsonSampling.fresh(["a", "b"]).update(["c"], [1.0]),
        lambda: LinearBandit.fresh(["a", "b"], 2).choose([1.0], np.random.default_rng(0)),
        lambda: LinearBandit.fresh(["a", "b"], 1).update(["a"], [[math.nan]], [1.0]),
    ],
)
def test_a_bandit_refuses_what_cannot_be(wrong):
    with pytest.raises(SpecError):
        wrong()


# -- off-policy evaluation ---------------------------------------------------------------------------------------------


def synthetic_log(seed, n=20_000):
    """Five actions, context of three numbers; a softmax log, and the true value of a sharper policy."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, 3))
    theta = rng.normal(size=(3, 5))
    truth = 1 / (1 + np.exp(-(x @ theta - 1.0)))
    logged = greedy_probabilities(x @ theta, temperature=4.0)
    target = greedy_probabilities(x @ theta, temperature=1.0)
    action = (logged.cumsum(axis=1) > rng.random((n, 1))).argmax(axis=1)
    rows = np.arange(n)
    reward = (rng.random(n) < truth[rows, action]).astype(float)
    model = np.clip(truth + rng.normal(0, 0.1, truth.shape), 0, 1)  # a reward model that is only roughly right
    return {
        "rewards": reward, "target": target[rows, action], "logged": logged[rows, action],
        "predicted": model[rows, action], "expected": (target * model).sum(axis=1),
        "truth": float((target * truth).sum(axis=1).mean()),
    }  # fmt: skip


@pytest.mark.parametrize("method", ["ips", "snips", "dr"])
def test_estimators_find_the_synthetic_truth(method):
    misses, errors = 0, []
    for seed in range(40):
        log = synthetic_log(seed, 4000)
        weights = importance_weights(log["target"], log["logged"])
        value = policy_value(
            log["rewards"], weights, method=method, predicted=log["predicted"], expected=log["expected"]
        )
        misses += not value.low <= log["truth"] <= value.high
        errors.append((value.value - log["truth"]) / value.se)
        assert value.supported
    assert misses <= 6
    assert abs(np.mean(errors)) < 0.6


def test_doubly_robust_is_the_narrowest_and_the_model_alone_is_not_trusted_with_an_interval():
    log = synthetic_log(1)
    weights = importance_weights(log["target"], log["logged"])
    se = {
        method: policy_value(
            log["rewards"], weights, method=method, predicted=log["predicted"], expected=log["expected"]
        ).se
        for method in ("ips", "snips", "dr")
    }
    assert se["dr"] < se["snips"] < se["ips"]


def test_ips_and_snips_are_their_formulas():
    r, p, q = np.array([1.0, 0.0, 1.0, 1.0]), np.array([0.5, 0.2, 0.1, 0.4]), np.array([0.25, 0.4, 0.5, 0.1])
    w = p / q
    weights = importance_weights(p, q)
    assert policy_value(r, weights, method="ips").value == pytest.approx((w * r).mean())
    assert policy_value(r, weights, method="ips").se == pytest.approx((w * r).std(ddof=1) / 2)
    assert policy_value(r, weights, method="snips").value == pytest.approx((w * r).sum() / w.sum())
    assert weights.effective_sample_size == pytest.approx(w.sum() ** 2 / (w**2).sum())
    assert importance_weights(q, q).effective_sample_size == pytest.approx(4)


def test_clipping_cuts_variance_and_reports_what_it_cut():
    log = synthetic_log(2)
    rows = clipping_table(log["rewards"], log["target"], log["logged"], clips=(1, 1.5, math.inf), method="ips")
    assert [row.value.se for row in rows] == sorted(row.value.se for row in rows)
    assert rows[0].clipped_mass > rows[1].clipped_mass > rows[2].clipped_mass == 0
    assert rows[-1].value.value == pytest.approx(log["truth"], abs=4 * rows[-1].value.se)


def test_a_policy_that_the_log_never_followed_is_not_supported():
    weights = importance_weights(np.r_[np.zeros(995), np.ones(5)], np.full(1000, 0.5))
    assert not weights.supported
    assert not policy_value(np.ones(1000), weights).supported


@pytest.mark.parametrize("propensity", [0.0, -0.1, 1.5, math.nan])
def test_propensities_that_cannot_be_divided_by_are_refused(propensity):
    with pytest.raises(DataError, match="1 of 2 logged propensities"):
        importance_weights([0.5, 0.5], [0.5, propensity])


def test_rows_of_one_unit_are_one_observation():
    log = synthetic_log(3, 500)
    weights = importance_weights(np.tile(log["target"], 4), np.tile(log["logged"], 4))
    rewards, units = np.tile(log["rewards"], 4), np.tile(np.arange(500), 4)
    once = policy_value(log["rewards"], importance_weights(log["target"], log["logged"]))
    assert policy_value(rewards, weights, clusters=units).se == pytest.approx(once.se, rel=1e-9)
    assert policy_value(rewards, weights).se == pytest.approx(once.se / 2, rel=0.01)


@pytest.mark.parametrize("campaign", ["men", "women"])
def test_the_open_bandit_log_of_one_policy_prices_the_other(shared_data, campaign):
    """Thompson sampling's action probabilities, by item and position, replayed on the uniform policy's log."""
    folder = shared_data("open_bandit")
    columns = ["item_id", "position", "click", "propensity_score", "timestamp"]
    uniform, thompson = (
        pq.read_table(folder / f"{name}_{campaign}.parquet", columns=columns).to_pandas() for name in ("random", "bts")
    )
    shares = thompson.groupby(["position", "item_id"]).size() / thompson.groupby("position").size()
    keys = pd.MultiIndex.from_frame(uniform[["position", "item_id"]])
    target = shares.reindex(keys, fill_value=0.0).to_numpy()
    weights = importance_weights(target, uniform["propensity_score"])
    assert weights.supported
    assert weights.mean == pytest.approx(1.0, abs=0.06)
    own = thompson["click"].mean()
    own_se = thompson["click"].std() / math.sqrt(len(thompson))
    for method in ("ips", "snips"):
        value = policy_value(uniform["click"], weights, method=method)
        assert abs(value.value - own) < 2.6 * math.hypot(value.se, own_se)
    # And back: the uniform policy from Thompson's log, whose propensities are tiny for items it seldom shows.
    back = importance_weights(np.full(len(thompson), uniform["propensity_score"].iloc[0]), thompson["propensity_score"])
    assert back.effective_sample_size < 0.5 * len(thompson)
    value = policy_value(thompson["click"], back, method="snips")
    assert abs(value.value - uniform["click"].mean()) < 3 * value.se


# -- uplift ------------------------------------------------------------------------------------------------------------


def test_the_t_learner_finds_whom_the_treatment_moves():
    rng = np.random.default_rng(9)
    n = 12_000
    x = rng.normal(size=(n, 4))
    t = rng.integers(0, 2, n)
    effect = np.where(x[:, 0] > 0, 1.0, 0.0)
    y = x[:, 1] + effect * t + rng.normal(0, 1, n)
    half = n // 2
    model = fit_t_learner(x[:half], t[:half], y[:half])
    predicted = model.uplift(x[half:])
    assert predicted[effect[half:] == 1].mean() == pytest.approx(1.0, abs=0.15)
    assert predicted[effect[half:] == 0].mean() == pytest.approx(0.0, abs=0.15)
    quality = uplift_quality(predicted, t[half:], y[half:])
    assert quality.groups[0].estimate > 0.8 > 0.3 > quality.groups[-1].estimate
    assert quality.trend_p_value < 1e-6
    assert quality.qini_score > 0
    noise = uplift_quality(rng.normal(size=half), t[half:], y[half:])
    assert noise.trend_p_value > 0.001
    assert abs(noise.qini_score) < quality.qini_score / 2


def test_hillstroms_womens_mail_moves_buyers_of_womens_wear(shared_data):
    """The known finding: the women's e-mail works on those who bought women's merchandise before."""
    frame = pd.read_csv(shared_data("hillstrom") / "hillstrom.csv")
    assert frame.groupby("segment")["visit"].mean().round(4).to_dict() == {
        "Mens E-Mail": 0.1828, "No E-Mail": 0.1062, "Womens E-Mail": 0.1514,
    }  # fmt: skip
    frame = frame[frame["segment"] != "Mens E-Mail"].reset_index(drop=True)
    numbers = frame[["recency", "history", "mens", "womens", "newbie"]]
    features = pd.concat([numbers, pd.get_dummies(frame[["zip_code", "channel"]])], axis=1).to_numpy(dtype=float)
    treated = (frame["segment"] == "Womens E-Mail").to_numpy(dtype=float)
    outcome = frame["visit"].to_numpy(dtype=float)
    test = np.random.default_rng(10).random(len(frame)) < 0.5
    model = fit_t_learner(features[~test], treated[~test], outcome[~test])
    predicted = model.uplift(features[test])
    assert predicted.mean() == pytest.approx(0.1514 - 0.1062, abs=0.01)
    womens = frame["womens"].to_numpy()[test] == 1
    assert predicted[womens].mean() > predicted[~womens].mean() + 0.03
    quality = uplift_quality(predicted, treated[test], outcome[test])
    assert quality.trend_p_value < 0.001
    assert quality.groups[0].low > quality.groups[-1].high
    assert quality.qini_score > 0


@pytest.mark.parametrize(
    ("treated", "outcome"),
    [
        ([1, 1, 1], [0, 1, 0]),
        ([0, 1, 2], [0, 1, 0]),
        ([0, 1, 1], [0, 1, math.inf]),
        ([0, 1], [0, 1]),
    ],
)
def test_uplift_refuses_what_cannot_be_compared(treated, outcome):
    with pytest.raises(DataError):
        fit_t_learner(np.zeros((3, 1)), treated, outcome)
