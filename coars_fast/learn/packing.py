"""Trajectories -> packed batches (DESIGN section 4): all turns of both agents in one row of tokens.

The teacher's contexts are written here as branches (what follows a fork of the student's sequence); `teacher_inputs`
unrolls them into whole sequences for a plain re-prefill. The two-stream step will read the branches as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from coars_fast.data.records import Trajectory
from coars_fast.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class PackedBatch:
    """The tensors of DESIGN section 4; N tokens, S sequences, R trained tokens, M turns, NB branch tokens."""

    token_ids: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor
    agent_ids: Tensor
    rows: Tensor
    target: Tensor
    behaviour_logp: Tensor
    turn_offsets: Tensor
    turn_reward: Tensor
    turn_weight: Tensor
    turn_agent: Tensor
    branch_tokens: Tensor
    branch_positions: Tensor
    cu_branch: Tensor
    branch_parent: Tensor
    branch_start: Tensor
    teacher_rows: Tensor
    episodes: tuple[int, ...]
    """Episode of each sequence."""

    def to(self, device: torch.device | str) -> PackedBatch:
        """The same batch with its tensors on a device."""
        moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in vars(self).items()}
        return PackedBatch(**moved)  # pyright: ignore[reportArgumentType]


def _bounds(lengths: Sequence[int]) -> Tensor:
    return torch.tensor(np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]), dtype=torch.int32)


def pack(trajectories: Sequence[Trajectory]) -> PackedBatch:
    """Concatenate trajectories; turn rewards and weights are taken as they are.

    Raises:
        ValueError: there is no trajectory, a turn has no tokens, its bounds do not lie in its sequence, or a sequence
            has another number of log-probs than of sampled tokens.
    """
    if not trajectories:
        raise ValueError("trajectories: nothing to pack")
    rows, target, teacher_rows, branch, branch_positions, parents = [], [], [], [], [], []
    base = branch_base = 0
    for s, trajectory in enumerate(trajectories):
        for turn in trajectory.turns:
            if not 0 < turn.fork <= turn.start < turn.end <= len(trajectory.tokens):
                raise ValueError(f"trajectories[{s}].turns: bad bounds {turn.fork}, {turn.start}, {turn.end}")
            if not turn.reference:
                raise ValueError(f"trajectories[{s}].turns: a branch needs at least the role header")
            reply = trajectory.tokens[turn.start : turn.end]
            rows.extend(range(base + turn.start - 1, base + turn.end - 1))
            target.extend(reply)
            first = branch_base + len(turn.reference)
            teacher_rows.extend(range(first - 1, first - 1 + len(reply)))
            # The branch's last token predicts nothing that is trained, so it is left out.
            length = len(turn.reference) + len(reply) - 1
            branch.extend((*turn.reference, *reply[:-1]))
            branch_positions.extend(range(turn.fork, turn.fork + length))
            parents.append(s)
            branch_base += length
        num_sampled = sum(turn.end - turn.start for turn in trajectory.turns)
        if len(trajectory.behaviour_logp) != num_sampled:
            raise ValueError(
                f"trajectories[{s}].behaviour_logp: {len(trajectory.behaviour_logp)} values for {num_sampled} tokens"
            )
        base += len(trajectory.tokens)
    turns = [turn for trajectory in trajectories for turn in trajectory.turns]
    lengths = [len(trajectory.tokens) for trajectory in trajectories]
    num_turns = [len(trajectory.turns) for trajectory in trajectories]
    agents = torch.tensor([trajectory.agent for trajectory in trajectories], dtype=torch.int8)
    return PackedBatch(
        token_ids=torch.tensor([t for trajectory in trajectories for t in trajectory.tokens]),
        position_ids=torch.cat([torch.arange(n) for n in lengths]),
        cu_seqlens=_bounds(lengths),
        agent_ids=agents.repeat_interleave(torch.tensor(lengths)),
        rows=torch.tensor(rows, dtype=torch.int64),
        target=torch.tensor(target, dtype=torch.int64),
        behaviour_logp=torch.tensor([p for t in trajectories for p in t.behaviour_logp], dtype=torch.float32),
        turn_offsets=_bounds([turn.end - turn.start for turn in turns]),
        turn_reward=torch.tensor([turn.reward for turn in turns], dtype=torch.float32),
        turn_weight=torch.tensor([turn.weight for turn in turns], dtype=torch.float32),
        turn_agent=agents.repeat_interleave(torch.tensor(num_turns)),
        branch_tokens=torch.tensor(branch, dtype=torch.int64),
        branch_positions=torch.tensor(branch_positions, dtype=torch.int64),
        cu_branch=_bounds([len(turn.reference) + turn.end - turn.start - 1 for turn in turns]),
        branch_parent=torch.tensor(parents, dtype=torch.int64),
        branch_start=torch.tensor([turn.fork for turn in turns], dtype=torch.int64),
        teacher_rows=torch.tensor(teacher_rows, dtype=torch.int64),
        episodes=tuple(trajectory.episode for trajectory in trajectories),
    )


@dataclass(frozen=True, kw_only=True)
class TeacherInputs:
    """The teacher's sequences in full: for each turn the student's context up to the fork, then the branch."""

    token_ids: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor
    agent_ids: Tensor
    rows: Tensor
    """[R] index of the hidden state that predicts each trained token."""


def teacher_inputs(batch: PackedBatch) -> TeacherInputs:
    """Unroll the branches for a re-prefill: the same tokens are computed once per turn."""
    device = batch.token_ids.device
    context = batch.branch_start
    branch = batch.cu_branch.diff().to(torch.int64)
    lengths = context + branch
    ends = lengths.cumsum(0)
    starts = ends - lengths
    turn = torch.arange(len(lengths), device=device).repeat_interleave(lengths)
    positions = torch.arange(int(ends[-1]), device=device) - starts[turn]
    in_branch = positions >= context[turn]
    from_trunk = batch.cu_seqlens.to(torch.int64)[batch.branch_parent][turn] + positions
    from_branch = batch.cu_branch.to(torch.int64)[turn] + positions - context[turn]
    token_ids = torch.where(
        in_branch,
        batch.branch_tokens[from_branch.clamp(min=0)],
        batch.token_ids[from_trunk.clamp(max=len(batch.token_ids) - 1)],
    )
    # A teacher row in branch coordinates moves by what lies before its branch in the unrolled batch.
    branch_of_row = torch.arange(len(branch), device=device).repeat_interleave(
        batch.turn_offsets.diff().to(torch.int64)
    )
    shift = starts + context - batch.cu_branch[:-1].to(torch.int64)
    return TeacherInputs(
        token_ids=token_ids,
        position_ids=positions,
        cu_seqlens=torch.cat([ends.new_zeros(1), ends]).to(torch.int32),
        agent_ids=batch.turn_agent[turn],
        rows=batch.teacher_rows + shift[branch_of_row],
    )


def split(trajectories: Sequence[Trajectory], max_tokens: int) -> list[list[Trajectory]]:
    """Groups of trajectories of at most `max_tokens` computed tokens each, in order.

    Raises:
        ConfigError: one trajectory alone is over the budget.
    """
    groups: list[list[Trajectory]] = []
    room = 0
    for trajectory in trajectories:
        size = trajectory.num_tokens
        if size > max_tokens:
            raise ConfigError(
                f"train.max_tokens: {max_tokens} is too small for episode {trajectory.episode}, which needs {size}"
            )
        if size > room:
            groups.append([])
            room = max_tokens
        groups[-1].append(trajectory)
        room -= size
    return groups
