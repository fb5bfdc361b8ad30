"""DESIGN section 4, every tensor of a small batch by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from coars_fast.data.records import TrainedTurn, Trajectory
from coars_fast.learn.packing import pack, split, teacher_inputs

# Header (3) before (4, 5), header (7) before (8): the branches leave at the headers and repeat them.
FIRST = Trajectory(
    episode=2,
    agent=0,
    tokens=(1, 2, 3, 4, 5, 6, 7, 8, 9),
    behaviour_logp=(-0.1, -0.2, -0.3),
    turns=(
        TrainedTurn(fork=2, start=3, end=5, reward=0.5, weight=1.0, reference=(50, 3)),
        TrainedTurn(fork=6, start=7, end=8, reward=-1.0, weight=0.0, reference=(60, 61, 7)),
    ),
)
SECOND = Trajectory(
    episode=2,
    agent=1,
    tokens=(11, 12, 13, 14),
    behaviour_logp=(-0.4, -0.5),
    turns=(TrainedTurn(fork=1, start=2, end=4, reward=0.25, weight=2.0, reference=(70, 12)),),
)
EXPECTED = {
    "token_ids": [1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13, 14],
    "position_ids": [0, 1, 2, 3, 4, 5, 6, 7, 8, 0, 1, 2, 3],
    "cu_seqlens": [0, 9, 13],
    "agent_ids": [0] * 9 + [1] * 4,
    "rows": [2, 3, 6, 10, 11],
    "target": [4, 5, 8, 13, 14],
    "behaviour_logp": [-0.1, -0.2, -0.3, -0.4, -0.5],
    "turn_offsets": [0, 2, 3, 5],
    "turn_reward": [0.5, -1.0, 0.25],
    "turn_weight": [1.0, 0.0, 2.0],
    "turn_agent": [0, 0, 1],
    "branch_tokens": [50, 3, 4, 60, 61, 7, 70, 12, 13],
    "branch_positions": [2, 3, 4, 6, 7, 8, 1, 2, 3],
    "cu_branch": [0, 3, 6, 9],
    "branch_parent": [0, 0, 1],
    "branch_start": [2, 6, 1],
    "teacher_rows": [1, 2, 5, 7, 8],
}
DTYPES = {
    "cu_seqlens": torch.int32,
    "turn_offsets": torch.int32,
    "cu_branch": torch.int32,
    "agent_ids": torch.int8,
    "turn_agent": torch.int8,
    "behaviour_logp": torch.float32,
    "turn_reward": torch.float32,
    "turn_weight": torch.float32,
}


def test_every_tensor_of_a_packed_batch() -> None:
    batch = pack([FIRST, SECOND])
    assert set(EXPECTED) == set(vars(batch)) - {"episodes"}
    for name, expected in EXPECTED.items():
        found = getattr(batch, name)
        assert found.dtype == DTYPES.get(name, torch.int64), name
        torch.testing.assert_close(found, torch.tensor(expected, dtype=found.dtype), msg=name)
    assert batch.episodes == (2, 2)


def test_the_teachers_sequences_are_context_reference_and_reply() -> None:
    inputs = teacher_inputs(pack([FIRST, SECOND]))
    assert inputs.token_ids.tolist() == [1, 2, 50, 3, 4, 1, 2, 3, 4, 5, 6, 60, 61, 7, 11, 70, 12, 13]
    assert inputs.position_ids.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6, 7, 8, 0, 1, 2, 3]
    assert inputs.cu_seqlens.tolist() == [0, 5, 14, 18] and inputs.cu_seqlens.dtype == torch.int32
    assert inputs.agent_ids.tolist() == [0] * 14 + [1] * 4
    assert inputs.rows.tolist() == [3, 4, 13, 16, 17]


def test_the_order_of_trajectories_is_kept() -> None:
    batch = pack([SECOND, FIRST])
    assert batch.agent_ids.tolist() == [1] * 4 + [0] * 9
    assert batch.rows.tolist() == [1, 2, 6, 7, 10]
    assert batch.branch_parent.tolist() == [0, 1, 1]


def test_a_batch_moves_as_a_whole() -> None:
    moved = pack([FIRST, SECOND]).to("meta")
    assert all(getattr(moved, name).device.type == "meta" for name in EXPECTED)
    assert moved.episodes == (2, 2)


def with_turn(**changes) -> list[Trajectory]:
    return [replace(FIRST, turns=(replace(FIRST.turns[0], **changes),))]


@pytest.mark.parametrize(
    "changes",
    [
        {"start": 5},  # no tokens
        {"start": 6},
        {"end": 10},  # beyond the sequence
        {"fork": 4},  # after the reply's start
        {"fork": 0},  # nothing before the branch
    ],
)
def test_a_turn_with_bad_bounds_is_refused(changes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"trajectories\[0\].turns: bad bounds"):
        pack(with_turn(**changes))


def test_a_branch_without_the_role_header_is_refused() -> None:
    with pytest.raises(ValueError, match="role header"):
        pack(with_turn(reference=()))


def test_nothing_cannot_be_packed() -> None:
    with pytest.raises(ValueError, match="nothing to pack"):
        pack([])


def test_a_number_of_log_probs_other_than_of_sampled_tokens_is_refused() -> None:
    for logp in ((-0.1, -0.2), (-0.1, -0.2, -0.3, -0.4)):
        with pytest.raises(ValueError, match="behaviour_logp"):
            pack([replace(FIRST, behaviour_logp=logp), SECOND])


def test_a_budget_is_filled_and_never_exceeded() -> None:
    # Computed tokens: 9 + (2+2+2) + (6+3+1) = 25, and 4 + (1+2+2) = 9.
    assert (FIRST.num_tokens, SECOND.num_tokens) == (25, 9)
    both = [FIRST, SECOND, SECOND, FIRST]
    assert split(both, 1000) == [both]
    assert split(both, 43) == [[FIRST, SECOND, SECOND], [FIRST]]
    assert split(both, 34) == [[FIRST, SECOND], [SECOND, FIRST]]
    assert split(both, 25) == [[FIRST], [SECOND, SECOND], [FIRST]]
    assert split([], 25) == []


def test_a_trajectory_over_the_budget_names_the_setting_and_the_episode() -> None:
    with pytest.raises(ValueError, match=r"train.max_tokens: 24 .* episode 2.* 25"):
        split([SECOND, FIRST], 24)
