"""A configuration is checked whole: every fault, with its line and what was probably meant."""

from __future__ import annotations

from pathlib import Path

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import experiments
from experiments.problems import ConfigError
from experiments.shape import schema
from experiments.source import read_folder, read_text
from experiments.validate import check, load

MODELS = {"deepfm", "deepfm:1", "deepfm@champion", "lightgbm"}
GOOD = """\
parameters:
  rank.model: {type: model, default: deepfm}
  rank.weight: {type: float, default: 0.5, minimum: 0, maximum: 1}
  rank.mode: {type: string, default: plain, allowed: [plain, diverse]}
  recall.channels: {type: list, default: [popular]}
layers:
  rank:
    unit: user
    parameters: [rank.*]
  recall:
    unit: user
    parameters: [recall.channels]
segments:
  nordic: {attribute: country, in: [SE, NO]}
groups:
  big: {unit: user}
experiments:
  trees:
    layer: rank
    state: running
    buckets: 0-4999
    where: {segment: nordic}
    arms:
      deepfm: {weight: 50, values: {rank.model: deepfm}}
      trees: {weight: 50, values: {rank.model: lightgbm}}
  weight:
    layer: rank
    state: running
    buckets: [5000-6999]
    arms:
      low: {weight: 33.34, values: {rank.weight: 0.1}}
      mid: {weight: 33.33}
      high: {weight: 33.33, values: {rank.weight: 0.9}}
  channels:
    layer: recall
    state: draft
    buckets: all
    requires: [{experiment: trees, arms: [trees]}]
    arms:
      one: {weight: 50}
      two: {weight: 50, values: {recall.channels: [popular, similar]}}
"""


def faults(text: str) -> list[str]:
    """Every fault of the text, as it is shown."""
    _, problems = check(read_text(text, file="e.yaml"), models=MODELS)
    return [str(problem) for problem in problems if not problem.warning]


def line_of(text: str, part: str) -> int:
    return next(i for i, line in enumerate(text.splitlines(), start=1) if part in line)


def test_a_good_configuration_has_no_fault():
    assert faults(GOOD) == []
    spec = load(read_text(GOOD), models=MODELS)
    assert spec.layers["rank"].parameters == ("rank.model", "rank.weight", "rank.mode")
    assert [arm.parts for arm in spec.experiments["weight"].arms] == [3334, 3333, 3333]


EDITS = [
    # old, new, the line the fault is on (a part of it), what it says
    (
        "rank.model: deepfm}",
        "rank.modell: deepfm}",
        "rank.modell",
        "no parameter 'rank.modell'; did you mean 'rank.model'?",
    ),
    (
        "rank.model: lightgbm",
        "rank.model: lightgmb",
        "lightgmb",
        "no model 'lightgmb' in the registry; did you mean 'lightgbm'?",
    ),
    (
        "rank.model: lightgbm",
        'rank.model: "deepfm:9"',
        "deepfm:9",
        "no model 'deepfm:9' in the registry; did you mean 'deepfm:1'",
    ),
    (
        "rank.model: lightgbm",
        "recall.channels: [x]",
        "recall.channels: [x]",
        "layer 'rank' does not own this parameter",
    ),
    (
        "parameters: [recall.channels]",
        "parameters: [recall.channels, rank.mode]",
        "[recall.channels, rank.mode]",
        "parameter 'rank.mode' is in two layers of domain 'default': 'rank', 'recall'",
    ),
    ("parameters: [recall.channels]", "parameters: [recal.*]", "recal.*", "no parameter 'recal.*'"),
    (
        "buckets: [5000-6999]",
        "buckets: [4990-6999]",
        "4990-6999",
        "buckets 4990-4999 of layer 'rank' already belong to experiments.trees",
    ),
    ("buckets: [5000-6999]", "buckets: [5000-6999, 6000-7000]", "6000-7000", "overlaps another of its own ranges"),
    ("buckets: [5000-6999]", "buckets: 6999-5000", "6999-5000", "runs backwards"),
    ("buckets: [5000-6999]", "buckets: some", "some", 'are not buckets; write "0-4999"'),
    ("weight: 33.34", "weight: 33.33", "arms:", "the weights add up to 99.99 %, not 100 %"),
    ("weight: 33.34", "weight: 33.345", "33.345", "too fine"),
    ("weight: 33.34", "weight: -1", "-1", "less than the minimum of 0"),
    ("rank.weight: 0.1", "rank.weight: 1.1", "1.1", "above the maximum 1"),
    ("rank.weight: 0.1", "rank.weight: low", "rank.weight: low", "'low' is not of type float"),
    ("rank.weight: 0.1", "rank.mode: odd", "odd", "'odd' is not among the allowed"),
    ("layer: recall", "layer: recal", "layer: recal", "no layer 'recal'; did you mean 'recall'?"),
    (
        "state: draft",
        "state: runing",
        "runing",
        "'runing' is not one of draft, running, stopped; did you mean 'running'?",
    ),
    ("state: draft", "staet: draft", "staet", "no such key; did you mean 'state'?"),
    (
        "experiment: trees, arms",
        "experiment: tree, arms",
        "experiment: tree,",
        "no experiment 'tree'; did you mean 'trees'?",
    ),
    ("arms: [trees]", "arms: [tree]", "arms: [tree]", "has no arm 'tree'; did you mean 'trees'?"),
    (
        "experiment: trees, arms: [trees]",
        "experiment: channels",
        "experiment: channels",
        "prerequisites in a cycle: channels → channels",
    ),
    ("{segment: nordic}", "{segment: nordics}", "nordics", "no segment 'nordics'; did you mean 'nordic'?"),
    ("{segment: nordic}", "{attribute: age, atleast: 3}", "atleast", "no operator 'atleast'; did you mean 'at_least'?"),
    (
        "{segment: nordic}",
        "{attribute: app, version_at_least: 2.10}",
        "2.10",
        "must be in quotes, so that 2.10 does not become 2.1",
    ),
    (
        "{segment: nordic}",
        "{all: [], any: []}",
        "all: []",
        "needs exactly one of all, any, not, segment, attribute; it has both all and any",
    ),
    ("{segment: nordic}", "{any: [{segment: nordic}, {attribute: a}]}", "{attribute: a}", "needs exactly one operator"),
    ("{segment: nordic}", '{attribute: a, matches: "(a+)+"}', "(a+)+", "could take too long"),
    ("{segment: nordic}", "{attribute: age, at_least: ten}", "ten", "must be a number, not 'ten'"),
    ("default: 0.5", "default: 5", "default: 5", "5 is above the maximum 1"),
    ("default: plain", "default: odd", "default: odd", "not among the allowed"),
    ("state: draft", "state: draft\n    group: big", "group: big", "`group` and `group_buckets` go together"),
    (
        "state: draft",
        "state: draft\n    group: bgi\n    group_buckets: all",
        "bgi",
        "no group 'bgi'; did you mean 'big'?",
    ),
    ("state: draft", "state: draft\n    control: on", "control: on", "no arm 'on'"),
    ("state: draft", "state: draft\n    start: soon", "start: soon", "'soon' is not a date"),
    ("state: draft", "state: draft\n    start: 2026-03-02\n    end: 2026-03-01", "end:", "ends before it starts"),
    (
        "state: draft",
        "state: draft\n    ramp: [{at: 2026-03-02, traffic: 50}, {at: 2026-03-03, traffic: 10}]",
        "ramp:",
        "never down",
    ),
    (
        "state: draft",
        "state: draft\n    traffic: 5\n    ramp: [{at: 2026-03-02, traffic: 50}]",
        "traffic: 5",
        "either `traffic` or `ramp`",
    ),
    (
        "two: {weight: 50, values: {recall.channels: [popular, similar]}}",
        "two: {weight: 50}",
        "arms:",
        "nobody could tell the arms apart",
    ),
    (
        "    unit: user\n    parameters: [recall",
        "    unit: user\n    domain: half\n    parameters: [recall",
        "domain: half",
        "no domain 'half'; known: default",
    ),
    (
        "    unit: user\n    parameters: [recall",
        "    unit: user\n    salt: rank\n    parameters: [recall",
        "salt: rank",
        "'rank' has the same salt",
    ),
]


@pytest.mark.parametrize(("old", "new", "where", "message"), EDITS)
def test_faults_are_found_with_their_line(old, new, where, message):
    text = GOOD.replace(old, new, 1)
    assert text != GOOD
    found = faults(text)
    lines = (
        {line_of(text, where)}
        if where != "arms:"
        else {i for i, line in enumerate(text.splitlines(), 1) if line == "    arms:"}
    )
    assert any(message in fault and any(fault.startswith(f"e.yaml:{line}: ") for line in lines) for fault in found), (
        found
    )


def test_all_faults_are_told_at_once():
    text = (
        GOOD.replace("rank.model: lightgbm", "rank.modell: x")
        .replace("weight: 33.34", "weight: 1")
        .replace("layer: recall", "layer: recal")
    )
    found = faults(text)
    assert [
        part for part in ("rank.modell", "the weights add up", "no layer 'recal'") if not any(part in f for f in found)
    ] == []
    with pytest.raises(ConfigError, match="faults; nothing was changed"):
        load(read_text(text))


@pytest.mark.parametrize("state", ["stopped", "draft"])
def test_a_running_experiment_cannot_wait_for_one_that_does_not_run(state):
    text = GOOD.replace("state: draft", "state: running").replace("state: running", f"state: {state}", 1)
    assert any("dead prerequisite: 'trees' is" in fault for fault in faults(text))


def test_a_prerequisite_in_the_same_layer_is_dead():
    text = GOOD.replace("buckets: [5000-6999]", "buckets: [5000-6999]\n    requires: [{experiment: trees}]")
    assert any("'trees' is in other buckets of the same layer" in fault for fault in faults(text))


def test_a_prerequisite_on_arms_without_weight_is_dead():
    text = GOOD.replace("{weight: 50, values: {rank.model: deepfm}}", "{weight: 100}").replace(
        "{weight: 50, values: {rank.model: l", "{weight: 0, values: {rank.model: l"
    )
    assert any("the arms trees of 'trees' have no weight" in fault for fault in faults(text))


def test_a_prerequisite_in_the_same_exclusion_group_is_dead():
    text = GOOD.replace("state: draft", "state: draft\n    group: big\n    group_buckets: 0-10")
    text = text.replace("where: {segment: nordic}", "group: big\n    group_buckets: 11-20")
    assert any("takes a unit into one of them only" in fault for fault in faults(text))


def test_a_chain_of_prerequisites_that_excludes_itself_is_dead():
    text = GOOD.replace("buckets: [5000-6999]", "buckets: [5000-6999]\n    requires: [{experiment: channels}]")
    text = text.replace("state: draft", "state: running")
    assert any("dead prerequisite: no unit can be in both 'weight' and 'trees'" in fault for fault in faults(text))


def test_a_longer_cycle_of_prerequisites_is_named():
    text = GOOD.replace("where: {segment: nordic}", "requires: [{experiment: channels}]").replace(
        "state: draft", "state: running"
    )
    assert any("prerequisites in a cycle: " in fault and "→" in fault for fault in faults(text))


def test_overlap_is_allowed_for_stopped_experiments_and_for_one_after_the_other():
    clash = GOOD.replace("buckets: [5000-6999]", "buckets: all")
    assert faults(clash)
    stopped = clash.replace(
        "  weight:\n    layer: rank\n    state: running", "  weight:\n    layer: rank\n    state: stopped"
    )
    assert faults(stopped) == []
    after = clash.replace("where: {segment: nordic}", "end: 2026-03-01").replace(
        "buckets: all\n    arms:\n      low", "buckets: all\n    start: 2026-03-01\n    arms:\n      low"
    )
    assert faults(after) == []


def test_group_shares_may_not_overlap():
    text = GOOD.replace("where: {segment: nordic}", "group: big\n    group_buckets: 0-10").replace(
        "buckets: [5000-6999]", "buckets: [5000-6999]\n    group: big\n    group_buckets: 10-20"
    )
    assert any("overlap those of 'trees' in group 'big'" in fault for fault in faults(text))


def test_a_tester_has_one_arm_per_layer():
    text = GOOD.replace("deepfm: {weight: 50,", "deepfm: {weight: 50, testers: [anna],").replace(
        "mid: {weight: 33.33}", "mid: {weight: 33.33, testers: [anna]}"
    )
    assert any("'anna' is already a tester of trees.deepfm in the same layer" in fault for fault in faults(text))


NESTED = """\
parameters:
  a: {type: int, default: 0}
  b: {type: int, default: 0}
layers:
  outer: {unit: user, parameters: [a]}
  inner: {unit: device, domain: half, parameters: [a]}
domains:
  half: {layer: outer, buckets: 0-4999}
"""


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("", "", None),
        ("half, parameters: [a]", "half, parameters: [b]", "'b' is not one of layer 'outer', which"),
        ("{layer: outer, b", "{layer: inner, b", "nested in itself"),
        ("{layer: outer, b", "{layer: outr, b", "no layer 'outr'; did you mean 'outer'?"),
        ("domain: half, parameters", "domain: half, launch: true, parameters", "a launch layer runs over all traffic"),
        ("outer: {unit: user,", "outer: {unit: user, launch: true,", "a launch layer holds no domains"),
        ("half: {layer", "default: {layer", "is the domain of everybody"),
    ],
)  # fmt: skip
def test_domains_and_launch_layers(old, new, message):
    found = faults(NESTED.replace(old, new, 1))
    assert found == [] if message is None else any(message in fault for fault in found), found


def test_a_launch_layer_may_share_a_parameter_with_a_layer_but_not_with_another_launch_layer():
    one = GOOD.replace("segments:", "  ship: {unit: user, launch: true, parameters: [rank.*]}\nsegments:")
    assert faults(one) == []
    two = one.replace("segments:", "  ship2: {unit: user, launch: true, parameters: [rank.mode]}\nsegments:")
    assert any("is in two launch layers" in fault for fault in faults(two))


@pytest.mark.parametrize(
    ("holdout", "message"),
    [
        ("{layer: rank, buckets: 9000-9999}", None),
        ("{unit: user, buckets: 0-99, layers: [rank]}", None),
        ("{layer: rank, buckets: 4999-5001}", "already belong to holdouts.h"),
        ("{buckets: 0-99}", "needs either `layer`"),
        ("{layer: rank, unit: user, buckets: 0-99}", "needs either `layer`"),
        ("{layer: rnk, buckets: 0-99}", "no layer 'rnk'; did you mean 'rank'?"),
        ("{unit: user, buckets: 0-99, layers: [rnk]}", "no layer 'rnk'; did you mean 'rank'?"),
        ("{layer: rank, salt: x, buckets: 9000-9999}", "uses that layer's buckets and salt"),
    ],
)
def test_holdouts(holdout, message):
    found = faults(GOOD + f"holdouts:\n  h: {holdout}\n")
    assert found == [] if message is None else any(message in fault for fault in found), found


def test_a_sticky_request_is_refused():
    text = GOOD.replace("state: draft", "state: draft\n    sticky: true").replace(
        "    unit: user\n    parameters: [recall", "    unit: request\n    parameters: [recall"
    )
    assert any("a request is seen once" in fault for fault in faults(text))


def test_the_shipped_configuration_is_valid():
    folder = Path(experiments.__path__[0])
    spec = load(read_folder(folder), models={"deepfm", "lightgbm"})
    defaults = {name: parameter.default for name, parameter in spec.parameters.items()}
    assert defaults == {
        "rank.model": "deepfm",
        "rank.interleave_with": "",
        "rank.interleave_method": "team_draft",
        "rank.exploration": 0.0,
        "recall.exclude_seen": False,
        "recall.max_candidates": 500,
    }
    assert {e.layer for e in spec.experiments.values()} == {"rank", "recall"}


def test_the_published_schema_is_a_schema_and_accepts_what_is_accepted():
    jsonschema.Draft202012Validator.check_schema(schema())
    jsonschema.Draft202012Validator(schema()).validate(read_text(GOOD).document)


scalars = (
    st.none()
    | st.booleans()
    | st.integers(-5, 20_000)
    | st.floats(allow_nan=False)
    | st.sampled_from(["rank", "all", "0-4999", "running", ""])
)
keys = st.sampled_from(
    [
        "layer",
        "state",
        "buckets",
        "arms",
        "weight",
        "values",
        "where",
        "all",
        "not",
        "attribute",
        "in",
        "rank",
        "trees",
        "unit",
        "parameters",
        "type",
        "default",
        "ramp",
        "at",
        "traffic",
        "requires",
        "experiment",
    ]
)
junk = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=4), max_leaves=12
)


@given(
    st.dictionaries(
        st.sampled_from(
            ["parameters", "layers", "domains", "segments", "groups", "holdouts", "experiments", "enabled"]
        ),
        junk | st.dictionaries(st.sampled_from(["rank", "trees"]), junk, max_size=2),
        max_size=4,
    )
)
@settings(max_examples=300, deadline=None)
def test_whatever_document_comes_is_answered_with_problems_not_with_a_crash(document):
    from experiments.source import Source

    spec, problems = check(Source(document), models=MODELS)
    assert (spec is None) == any(not problem.warning for problem in problems)
