"""The report: everything in one file, made from whatever a run has left so far, with all foreign text escaped."""

from html.parser import HTMLParser
from pathlib import Path

import pytest

from coars_fast import report
from coars_fast.cli import config_to_dict
from coars_fast.config import Config
from coars_fast.state.run_folder import RunFolder

EVIL = "<script>alert('x')</script> & {{ 7 * 7 }} \"quoted\"</pre>"
ESTIMATE = {"value": 0.5, "low": 0.4, "high": 0.6}


def turn(hit=False, valid=True, score: float | None = 0.3, **more):
    return {
        "rec_text": f"Reason: {EVIL}\nItem: 1. A",
        "item_title": "A <b>",
        "hit": hit,
        "rec_valid": True,
        "user_text": EVIL,
        "action": "skip",
        "score": score,
        "user_valid": valid,
        "reward_rec": -0.25,
        "reward_user": None,
        "excluded": False,
        **more,
    }


def episode(kind="train", step=1, user=0, *turns):
    titles = ["Alien (1979)", EVIL]
    record = {"kind": kind, "step": step, "user": user, "target": 3, "target_title": EVIL, "history": titles}
    return {**record, "candidates": titles, "turns": list(turns) or [turn()]}


def make_run(folder: Path) -> Path:
    with RunFolder.open(folder, config_to_dict(Config(out=EVIL)), resume=False) as run:
        for step in (1, 2, 3):
            run.append_metrics({"kind": "train", "step": step, "hit@1": 0.1 * step, "seconds_train": 1.0})
        run.append_metrics({"kind": "evaluation", "step": 3, "metrics": {"hit@1": ESTIMATE}})
        run.append_episodes([episode("eval_before", 0, 7), episode(), episode("train", 3, 1, turn(), turn(hit=True))])
        run.append_episodes([episode("eval_after", 2, 7, turn(item_title="stale")), episode("eval_after", 3, 7)])
        difference = {
            "hit@1": {"value": 0.1, "low": 0.05, "high": 0.2},
            "acceptance": {"value": 0.0, "low": -1, "high": 1},
        }
        run.write_evaluation(
            {
                "before": {"hit@1": ESTIMATE, "acceptance": ESTIMATE, EVIL: {"value": 0.1}},
                "after": {"hit@1": {**ESTIMATE, "value": 0.6}, "acceptance": ESTIMATE, "new": ESTIMATE},
                "difference": difference,
                "warnings": [f"collapse {EVIL}"],
                "info": {"dataset": EVIL, "versions": {"torch": "9.9.9"}},
            }
        )
    return folder


class Page(HTMLParser):
    """Tags, open elements and text of a page."""

    def __init__(self, path: Path):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words = ""
        self.feed(path.read_text(encoding="utf-8"))
        assert not self.open, "every element is closed"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words += data


def test_report(tmp_path):
    path = report.write_report(make_run(tmp_path / "run"))
    assert path == tmp_path / "run" / "report.html"
    page = Page(path)
    names = [tag for tag, _ in page.tags]
    assert "script" not in names and "b" not in names and "link" not in names
    images = [attributes["src"] or "" for tag, attributes in page.tags if tag == "img"]
    assert len(images) == 2 and all(source.startswith("data:image/png;base64,iVBOR") for source in images)
    for part in (
        EVIL,
        "0.500 [0.400, 0.600]",
        "+0.100 [+0.050, +0.200]",
        f"collapse {EVIL}",
        "The same user after training",
        "Last training step",
        "train.learning_rate",
        "9.9.9",
        "3 training steps",
    ):
        assert part in page.words, part
    assert "stale" not in page.words
    # Only the difference whose interval leaves out zero is marked.
    assert [attributes.get("class") for _, attributes in page.tags].count("number clear") == 1


def test_report_of_a_run_that_has_only_begun(tmp_path):
    RunFolder.open(tmp_path, config_to_dict(Config()), resume=False).close()
    page = Page(report.write_report(tmp_path))
    assert "There is no evaluation yet" in page.words and "img" not in [tag for tag, _ in page.tags]
    assert "the installation that wrote this report" in page.words


def test_chosen_episodes():
    episodes = [episode("train", step, step, turn(hit=step % 2 == 0)) for step in range(1, 9)]
    episodes.insert(3, episode("train", 2, 50, turn(valid=False)))
    episodes.insert(3, episode("train", 3, 51, turn(score=0.7)))
    chosen = dict(report.choose_episodes(episodes))
    assert chosen["First training step"]["step"] == 1 and chosen["Last training step"]["step"] == 8
    assert chosen["A hit, late in training"]["user"] == 6 and chosen["A miss, late in training"]["user"] == 7
    assert chosen["An invalid reply"]["user"] == 50 and chosen["A wrong item, accepted"]["user"] == 51
    assert list(report.choose_episodes([])) == []
    assert len(list(report.choose_episodes(episodes, count=3))) == 3
    broken_off = {"kind": "train", "step": 1}
    assert [caption for caption, _ in report.choose_episodes([broken_off])] == ["First training step"]


def test_command(tmp_path, capsys):
    make_run(tmp_path / "run")
    report.main([str(tmp_path / "run")])
    assert capsys.readouterr().out.strip() == str(tmp_path / "run" / "report.html")
    for folder, message in [(tmp_path / "no", "no such folder"), (tmp_path, "config.json: no such file")]:
        with pytest.raises(SystemExit) as exit_info:
            report.main([str(folder)])
        assert exit_info.value.code == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and message in error and error.count("\n") == 1
