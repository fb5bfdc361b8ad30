"""Figures: drawn from what is there, whatever is missing."""

import math
from pathlib import Path

import pytest
from matplotlib import image

from coars_fast import plots


def estimate(value, width=0.05):
    return {"value": value, "low": value - width, "high": value + width}


TRAIN = [
    {
        "kind": "train",
        "step": step,
        "hit@1": 0.3 + 0.01 * math.sin(step),
        "reward_rec": -0.1,
        "reward_user": 0.1,
        "precision": 0.5,
        "credit_mean_rec": -0.01,
        "clip_fraction": 0.0,
        "parse_failure_rec": 0,
        "seconds_rollout": 0.5,
    }
    for step in range(1, 61)
]
EVALUATIONS = [
    {"kind": "evaluation", "step": step, "metrics": {"hit@1": estimate(0.4), "user_f1": {"value": 0.5}}}
    for step in (0, 30, 60)
]
EVALUATION = {
    "before": {"hit@1": estimate(0.4), "mean_turns": estimate(2.5), "only_before": estimate(1)},
    "after": {"hit@1": estimate(0.5), "mean_turns": {"value": 2.0, "low": None, "high": None}, "x": {"value": None}},
}


def is_figure(path: Path | None) -> bool:
    assert path is not None
    pixels = image.imread(path)
    return pixels.shape[0] > 200 and pixels.shape[1] > 300 and float(pixels.std()) > 0.01


def test_learning_curves(tmp_path):
    path = plots.learning_curves(TRAIN, EVALUATIONS, tmp_path)
    assert path == tmp_path / "learning_curves.png" and is_figure(path)


@pytest.mark.parametrize(
    ("train", "evaluations"),
    [
        (TRAIN[:1], []),
        ([], EVALUATIONS),
        (
            [{"step": 1, "reward_rec": None, "hit@1": 0.5}, {"step": 2, "reward_user": 0.5}],
            [{"step": 1, "metrics": None}],
        ),
        ([], [{"step": 1, "metrics": {"hit@1": {"value": None}, "user_f1": {"value": 0.5, "low": None}}}]),
    ],
)
def test_missing_keys_are_skipped(tmp_path, train, evaluations):
    assert is_figure(plots.learning_curves(train, evaluations, tmp_path))


def test_nothing_to_draw(tmp_path):
    assert plots.learning_curves([], [], tmp_path) is None
    assert plots.learning_curves([{"step": 1, "unknown": 3}], [{"step": 1, "metrics": {}}], tmp_path) is None
    assert plots.before_after({}, tmp_path) is None
    assert plots.before_after({"before": {"hit@1": estimate(1)}, "after": {}}, tmp_path) is None
    assert not list(tmp_path.iterdir())


def test_before_after(tmp_path):
    path = plots.before_after(EVALUATION, tmp_path)
    assert path == tmp_path / "before_after.png" and is_figure(path)
    assert plots.plt.get_fignums() == [], "figures are closed"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("hit@1", "Hit@1"),
        ("hit@1_sampled", "Hit@1, sampled"),
        ("hit@1_first_turn_sampled", "Hit@1, first turn, sampled"),
        ("user_f1_disc@1:3", "User F1-disc, 1:3"),
        ("new_metric", "new metric"),
    ],
)
def test_labels(name, text):
    assert plots.label(name) == text


def test_a_label_is_no_formula(tmp_path):
    with plots.plt.rc_context(plots.STYLE):
        figure, axes = plots.plt.subplots()
        axes.set_title("costs $\\foo$")
        figure.savefig(tmp_path / "label.svg")
    assert "foo" in (tmp_path / "label.svg").read_text()
