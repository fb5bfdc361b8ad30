"""Trajectories -> packed batches (DESIGN section 4): all turns of both agents in one row of tokens.

What the teacher sees is written here as branches (what follows a fork of the student's sequence), which the two-stream
forward reads as they are; `teacher_inputs` unrolls them into whole sequences for a teacher that cannot share keys and
values with the student. Nothing is ever cut off: `split` makes micro-batches within a budget of tokens, balanced by
what they cost, and says what does not fit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from coars_fast.data.records import Trajectory
from coars_fast.errors import ConfigError
from coars_fast.model.config import DecoderConfig


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
    turn_reason: Tensor
    """[M] int64, how many of a turn's tokens come before its decision."""
    branch_tokens: Tensor
    branch_positions: Tensor
    cu_branch: Tensor
    branch_parent: Tensor
    branch_start: Tensor
    teacher_rows: Tensor
    episodes: tuple[int, ...]
    """Episode of each sequence."""
    teacher_logp: Tensor | None = None
    """[R] fp32, if the teacher's log-probs are known: its branches are then not computed."""
    old_logp: Tensor | None = None
    """[R] fp32, the trainer's log-probs before the update, where they are known apart."""

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
        for name in ("behaviour_logp", "teacher_logp", "old_logp"):
            values = getattr(trajectory, name)
            if values is not None and len(values) != num_sampled:
                raise ValueError(f"trajectories[{s}].{name}: {len(values)} values for {num_sampled} tokens")
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
        turn_reason=torch.tensor([turn.end - turn.start if turn.reason is None else turn.reason for turn in turns]),
        branch_tokens=torch.tensor(branch, dtype=torch.int64),
        branch_positions=torch.tensor(branch_positions, dtype=torch.int64),
        cu_branch=_bounds([len(turn.reference) + turn.end - turn.start - 1 for turn in turns]),
        branch_parent=torch.tensor(parents, dtype=torch.int64),
        branch_start=torch.tensor([turn.fork for turn in turns], dtype=torch.int64),
        teacher_rows=torch.tensor(teacher_rows, dtype=torch.int64),
        episodes=tuple(trajectory.episode for trajectory in trajectories),
        teacher_logp=_known([trajectory.teacher_logp for trajectory in trajectories]),
        old_logp=_known([trajectory.old_logp for trajectory in trajectories]),
    )


def _known(columns: Sequence[tuple[float, ...] | None]) -> Tensor | None:
    """[R] the values one after the other, or None unless every trajectory has them."""
    if any(column is None for column in columns):
        return None
    return torch.tensor([value for column in columns if column is not None for value in column], dtype=torch.float32)


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


# ----------------------------------------------------------------------------------------------------- micro-batches


@dataclass(frozen=True, kw_only=True)
class Work:
    """How much work a step is, by model. A token's own part (the layers' weights) counts 1 forward."""

    attention: float = 0.0
    """A pair of query and key, in units of a token: 2 Hq D over the weights of a layer."""

    @classmethod
    def of(cls, config: DecoderConfig) -> Work:
        """Of a decoder: multiplications with weights and with keys and values are counted, nothing else."""
        heads, groups = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        weights = config.hidden_size * (2 * heads + 2 * groups + 3 * config.intermediate_size)
        return cls(attention=2 * heads / weights)

    def cost(self, trajectory: Trajectory) -> float:
        """Of a trajectory's student (forward and backward: frozen weights take 1 forward more, attention 2.5) and of
        its teacher's branches (forward)."""
        length = len(trajectory.tokens)
        linear = 2.0 * length + trajectory.num_teacher_tokens
        pairs = 3.5 * length**2 / 2
        for turn in trajectory.turns:
            branch = len(turn.reference) + turn.end - turn.start - 1
            pairs += branch * (turn.fork + branch / 2)
        return linear + self.attention * pairs


def check_budget(
    trajectories: Sequence[Trajectory], max_tokens: int, *, drop: bool = False
) -> tuple[list[Trajectory], int]:
    """(trajectories, number of episodes left out): those of episodes that a forward pass of `max_tokens` can hold.

    An episode is left out with both of its views, so that both agents learn from the same ones.

    Raises:
        ConfigError: an episode is over the budget and `drop` is off, or all are; names it and its size.
    """
    over = {t.episode: t.num_tokens for t in trajectories if t.num_tokens > max_tokens}
    kept = [t for t in trajectories if t.episode not in over]
    if over and not (drop and kept):
        episode, size = max(over.items(), key=lambda item: item[1])
        every = "; all episodes are over it" if drop else ""
        raise ConfigError(
            f"train.max_tokens: {max_tokens} is too small for episode {episode}, which needs {size}{every}; raise it, "
            "or leave such episodes out with --train.over-budget drop"
        )
    return kept, len(over)


def split(trajectories: Sequence[Trajectory], max_tokens: int, work: Work | None = None) -> list[list[Trajectory]]:
    """Micro-batches of at most `max_tokens` computed tokens each, of about the same cost; at most twice as many as any
    packing needs, and one if all fit. The order of trajectories within each is kept.

    Raises:
        ConfigError: one trajectory alone is over the budget.
    """
    check_budget(trajectories, max_tokens)
    if not trajectories:
        return []
    costs = [(work or Work()).cost(t) for t in trajectories]
    parts = -(-sum(t.num_tokens for t in trajectories) // max_tokens)
    while True:
        groups = _balanced(trajectories, costs, parts, max_tokens)
        if groups is not None:
            return [[trajectories[index] for index in sorted(group)] for group in groups if group]
        parts += 1


def _balanced(
    trajectories: Sequence[Trajectory], costs: Sequence[float], parts: int, max_tokens: int
) -> list[list[int]] | None:
    """Largest first, each to the cheapest part that has room; None if one finds no room."""
    groups: list[list[int]] = [[] for _ in range(parts)]
    room, spent = [max_tokens] * parts, [0.0] * parts
    for index in sorted(range(len(trajectories)), key=lambda i: -trajectories[i].num_tokens):
        size = trajectories[index].num_tokens
        fitting = [part for part in range(parts) if room[part] >= size]
        if not fitting:
            return None
        chosen = min(fitting, key=lambda part: spent[part])
        groups[chosen].append(index)
        room[chosen] -= size
        spent[chosen] += costs[index]
    return groups
