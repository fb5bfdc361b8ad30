"""Credit by turn and by place in a reply: by hand, and the same however an update is split."""

from __future__ import annotations

import pytest
import torch

from coars_fast.learn.metrics import credit_by_place, whole
from coars_fast.learn.packing import pack
from tests import tiny


def by_hand(trajectories, logp, teacher_logp, clip):
    """name -> mean over tokens, from the trajectories themselves."""
    found: dict[str, list[float]] = {}
    row = 0
    for trajectory in trajectories:
        agent = ("rec", "user")[trajectory.agent]
        for number, turn in enumerate(trajectory.turns, start=1):
            length = turn.end - turn.start
            for position in range(length):
                credit = max(-clip, min(clip, teacher_logp[row] - logp[row]))
                row += 1
                if turn.weight:
                    found.setdefault(f"credit_turn{number}_{agent}", []).append(credit)
                    found.setdefault(f"credit_quarter{4 * position // length + 1}_{agent}", []).append(credit)
    return {name: sum(values) / len(values) for name, values in found.items()}


@pytest.fixture(scope="module")
def trajectories():
    return tiny.scripted_trajectories(tiny.random_decoder(), 6)


def values(trajectories) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(1)
    count = sum(len(t.behaviour_logp) for t in trajectories)
    return -torch.rand(count, generator=rng), -2 * torch.rand(count, generator=rng)


def test_means_by_turn_and_quarter(trajectories) -> None:
    assert any(turn.weight == 0 for t in trajectories for turn in t.turns), "some turn is left out"
    assert max(len(t.turns) for t in trajectories) == 3
    logp, teacher_logp = values(trajectories)
    first = whole([metrics(trajectories, logp, teacher_logp)])
    expected = by_hand(trajectories, logp.tolist(), teacher_logp.tolist(), 0.7)
    found = {name: value for name, value in first.items() if name.startswith(("credit_turn", "credit_quarter"))}
    assert found == pytest.approx(expected)
    assert "credit_turn4_rec" not in found and "credit_turn3_rec" in found
    # In two micro-batches: the same.
    cut = sum(len(t.behaviour_logp) for t in trajectories[:3])
    parts = [
        metrics(trajectories[:3], logp[:cut], teacher_logp[:cut]),
        metrics(trajectories[3:], logp[cut:], teacher_logp[cut:]),
    ]
    assert {name: value for name, value in whole(parts).items() if name in found} == pytest.approx(expected)


def test_what_is_not_finite_in_an_excluded_turn_does_not_show(trajectories) -> None:
    logp, teacher_logp = values(trajectories)
    excluded = torch.cat(
        [torch.full((turn.end - turn.start,), turn.weight == 0) for t in trajectories for turn in t.turns]
    )
    damaged = teacher_logp.where(~excluded, torch.nan)
    assert whole([metrics(trajectories, logp, damaged)]) == whole([metrics(trajectories, logp, teacher_logp)])


def test_without_a_teacher_there_is_no_credit(trajectories) -> None:
    assert credit_by_place(pack(trajectories), values(trajectories)[0], None, 1.0) == {}


def metrics(trajectories, logp, teacher_logp):
    """Of a micro-batch, with what `whole` needs beside them."""
    zero = torch.zeros(())
    batch = pack(trajectories)
    found = credit_by_place(batch, logp, teacher_logp, 0.7)
    return found | {"advantage_mean": zero, "advantage_std": zero, "num_tokens": torch.tensor(float(len(logp)))}
