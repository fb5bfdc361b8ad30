"""`python -m coars_fast.credit RUN`: what the teacher says about a run's replies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from coars_fast import credit, train
from coars_fast.state.files import read_json
from tests import tiny


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a model that can speak and follow a reference, before training."""
    folder = tmp_path_factory.mktemp("credit")
    model = tiny.write_model(folder / "model", tiny.taught_decoder(adapters=False))
    train.main(tiny.arguments(out=folder / "run", model__path=model, train__num_steps="0"))
    return folder / "run"


def studied(run: Path, *flags: str) -> dict[str, Any]:
    credit.main([str(run), "--episodes", "8", *flags])
    return read_json(run / "credit.json")


def test_credit_is_split_by_agent_outcome_and_kind(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = studied(run)
    cells = {(c["agent"], c["outcome"], c["kind"]): c for c in found["credit"]}
    assert {agent for agent, *_ in cells} == {"rec", "user"}
    assert all(c["tokens"] > 0 and -1 <= c["mean"] <= 1 and 0 <= c["clipped"] <= 1 for c in cells.values())
    assert any(c["mean_absolute"] > 1e-3 for c in cells.values())
    assert found["reference"] == "template" and set(found["right"]["teacher"]) == {"rec", "user"}
    assert (run / "credit.png").stat().st_size > 1000
    assert "teacher, having read the reference" in " ".join(capsys.readouterr().out.split())


def test_an_empty_reference_earns_no_credit(run: Path) -> None:
    found = studied(run, "--reference", "empty")
    assert max(c["mean_absolute"] for c in found["credit"]) < 1e-5


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere"], "no config.json"),
        (["RUN", "--episodes", "0"], "give at least 1"),
        (["RUN", "--reference", "other_user"], "give --reference template, truth or empty"),
    ],
)
def test_what_cannot_be_studied_is_an_error(
    run: Path, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        credit.main([str(run) if word == "RUN" else word for word in arguments])
    assert words in capsys.readouterr().err
