"""DESIGN section 4, every tensor of a small batch by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from coars_fast.data.records import TrainedTurn, Trajectory
from coars_fast.errors import ConfigError
from coars_fast.learn.packing import Work, check_budget, pack, split, teacher_inputs
from coars_fast.model.config import DecoderConfig

# Header (3) before (4, 5), header (7) before (8): the branches leave at the headers and repeat them.
FIRST = Trajectory(
    episode=2,
    agent=0,
    tokens=(1, 2, 3, 4, 5, 6, 7, 8, 9),
    behaviour_logp=(-0.1, -0.2, -0.3),
    turns=(
        TrainedTurn(fork=2, start=3, end=5, reward=0.5, weight=1.0, reference=(50, 3)),
        TrainedTurn(fork=6, start=7, end=8, reward=-1.0, weight=0.0, reference=(60, 61, 7), reason=0),
    ),
)
SECOND = Trajectory(
    episode=2,
    agent=1,
    tokens=(11, 12, 13, 14),
    behaviour_logp=(-0.4, -0.5),
    turns=(TrainedTurn(fork=1, start=2, end=4, reward=0.25, weight=2.0, reference=(70, 12), reason=1),),
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
    "turn_reason": [2, 0, 1],
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
    assert set(EXPECTED) == set(vars(batch)) - {"episodes", "teacher_logp", "old_logp"}
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


@pytest.mark.parametrize("name", ["behaviour_logp", "teacher_logp", "old_logp"])
def test_a_number_of_log_probs_other_than_of_sampled_tokens_is_refused(name: str) -> None:
    for logp in ((-0.1, -0.2), (-0.1, -0.2, -0.3, -0.4)):
        with pytest.raises(ValueError, match=name):
            pack([replace(FIRST, **{name: logp}), SECOND])


def test_log_probs_that_are_known_are_packed_if_all_are() -> None:
    first, second = replace(FIRST, teacher_logp=(-1.0, -2.0, -3.0)), replace(SECOND, teacher_logp=(-4.0, -5.0))
    batch = pack([first, second])
    assert batch.teacher_logp is not None and batch.teacher_logp.tolist() == [-1, -2, -3, -4, -5]
    assert batch.old_logp is None
    assert pack([first, SECOND]).teacher_logp is None


# Computed tokens: 9 + (2+2-1) + (3+1-1) = 15, and 4 + (2+2-1) = 7.
def test_tokens_are_those_of_the_sequence_and_of_its_branches() -> None:
    assert (FIRST.num_tokens, SECOND.num_tokens) == (15, 7)
    assert (FIRST.num_teacher_tokens, SECOND.num_teacher_tokens) == (6, 3)


def test_a_budget_is_filled_and_never_exceeded() -> None:
    both = [FIRST, SECOND, SECOND, FIRST]
    assert split(both, 1000) == [both]
    assert split(both, 29) == [[FIRST, SECOND], [SECOND, FIRST]]
    assert split(both, 15) == [[FIRST], [FIRST], [SECOND, SECOND]]
    assert split([], 25) == []


def test_parts_cost_about_the_same() -> None:
    """Four long ones and four short ones in two parts: the first fit would have all long ones in one."""
    parts = split([FIRST] * 4 + [SECOND] * 4, 60)
    assert [sorted(t.num_tokens for t in part) for part in parts] == [[7, 7, 15, 15]] * 2


def test_attention_makes_long_sequences_dearer() -> None:
    config = DecoderConfig(
        family="qwen3", vocab_size=9, hidden_size=8, intermediate_size=24, num_layers=3, num_heads=2, num_kv_heads=1,
        head_dim=4,
    )  # fmt: skip
    work = Work.of(config)
    # per layer 8 x (8 + 4 + 4 + 8 + 3 x 24) multiplications for a token, 2 x 8 for a pair
    assert work.attention == 2 * 8 / (8 * (2 * 8 + 2 * 4 + 3 * 24))
    assert Work().cost(FIRST) == 2 * 9 + 6
    pairs = 3.5 * 81 / 2 + 3 * (2 + 1.5) + 3 * (6 + 1.5)
    assert work.cost(FIRST) == pytest.approx(24 + work.attention * pairs)


def test_a_trajectory_over_the_budget_names_the_setting_the_episode_and_the_way_out() -> None:
    with pytest.raises(ConfigError, match=r"train.max_tokens: 14 .* episode 2.* 15.*--train.over-budget drop"):
        split([SECOND, FIRST], 14)


def test_an_episode_over_the_budget_can_be_left_out_with_both_views() -> None:
    other = replace(SECOND, episode=3)
    kept, dropped = check_budget([FIRST, SECOND, other], 14, drop=True)
    assert kept == [other] and dropped == 1
    assert check_budget([FIRST, SECOND, other], 15, drop=True) == ([FIRST, SECOND, other], 0)
    with pytest.raises(ConfigError, match="all episodes are over it"):
        check_budget([FIRST, SECOND], 14, drop=True)
