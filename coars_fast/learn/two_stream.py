"""Student and teacher in one pass through the layers (DESIGN section 7; docs/step.md has a picture).

The teacher's context is the student's context plus a reference. So two streams go through the layers side by side: the
trunk (the packed student sequences, with gradient) and the branches (reference and reply of every turn, without), whose
attention reads the keys and values that the trunk has just made in the same layer, detached, up to the fork, and then
itself. Both agents are in both streams; a token's adapter goes by its agent. Activation checkpointing wraps the trunk
only, and a layer that is computed again in the backward pass computes no branch again.

A teacher of other weights than the student's has other keys and values: `re_prefill` computes its whole contexts.

Shape suffixes: N trunk tokens, NB branch tokens, M turns, R trained tokens, H hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from coars_fast.learn.packing import PackedBatch, teacher_inputs
from coars_fast.model.attention import Attend, PackedAttention, varlen_attention
from coars_fast.model.decoder import Decoder, Rows
from coars_kernels import AgentRows, branch_attention
from coars_kernels.dispatch import has_triton

NUM_AGENTS = 2


class TrunkAttention:
    """`Attend` of the trunk, which leaves each layer's keys and values for the branches until `close`."""

    def __init__(self, inner: Attend) -> None:
        self.inner = inner
        self.kept: tuple[Tensor, Tensor] | None = None
        self.is_open = True

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See `Attend`."""
        if self.is_open:
            self.kept = k.detach(), v.detach()
        return self.inner(layer, q, k, v)

    def close(self) -> None:
        """Keep nothing any more: a checkpointed layer comes here again in the backward pass."""
        self.kept, self.is_open = None, False


class BranchAttention:
    """`Attend` of the branches: the trunk's keys of this layer up to the fork, then their own.

    By `coars_kernels.branch_attention`; on a GPU without Triton keys are gathered for the attention of the trunk, with
    fewer queries than keys.
    """

    def __init__(self, batch: PackedBatch, trunk: TrunkAttention, *, backend: str = "auto") -> None:
        self.trunk, self.backend = trunk, backend
        self.cu_branch = batch.cu_branch
        self.start = batch.cu_seqlens[batch.branch_parent]
        self.length = batch.branch_start.to(torch.int32)
        self.gather: _Gather | None = None
        device = batch.cu_branch.device
        if device.type == "cuda" and not has_triton(batch.cu_branch):
            self.gather = _Gather(self.cu_branch, self.start, self.length, len(batch.token_ids))

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See `Attend`."""
        assert self.trunk.kept is not None, "the trunk goes through each layer first"
        trunk_k, trunk_v = self.trunk.kept
        if self.gather is not None:
            return self.gather(q, k, v, trunk_k, trunk_v, self.backend)
        return branch_attention(q, k, v, trunk_k, trunk_v, self.cu_branch, self.start, self.length)


class _Gather:
    """Each branch's keys copied together, [trunk up to the fork; branch], then ordinary attention over packed rows."""

    def __init__(self, cu_branch: Tensor, start: Tensor, length: Tensor, num_rows: int) -> None:
        own = cu_branch.diff().long()
        keys = length.long() + own
        ends = keys.cumsum(0)
        turn = torch.arange(len(keys), device=keys.device).repeat_interleave(keys)
        place = torch.arange(len(turn), device=keys.device) - (ends - keys)[turn]
        in_trunk = place < length[turn]
        first = torch.where(in_trunk, start.long()[turn], num_rows + cu_branch.long()[turn] - length[turn])
        self.rows = first + place
        self.cu_branch, self.cu_keys = cu_branch, torch.cat([ends.new_zeros(1), ends]).to(torch.int32)
        self.longest = int(own.max()), int(keys.max())

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, trunk_k: Tensor, trunk_v: Tensor, backend: str) -> Tensor:
        all_k, all_v = torch.cat([trunk_k, k])[self.rows], torch.cat([trunk_v, v])[self.rows]
        return varlen_attention(q, all_k, all_v, self.cu_branch, self.cu_keys, *self.longest, backend=backend)


def two_stream(
    decoder: Decoder, batch: PackedBatch, *, teacher: bool = True, adapters: bool = True, backend: str = "auto"
) -> tuple[Tensor, Tensor | None]:
    """Hidden states that predict the trained tokens, by the student and by the teacher.

    Args:
        decoder: with its `gradient_checkpointing` for the trunk.
        batch: on the decoder's device.
        teacher: whether the branches are computed at all.
        adapters: False runs the base model alone.
        backend: attention of the trunk, as `PackedAttention` takes it.

    Returns:
        [R, H] of the student, with gradient unless that is off, and [R, H] of the teacher, without, or None.
    """
    trunk_agents = AgentRows(batch.agent_ids, NUM_AGENTS) if adapters else None
    attend = TrunkAttention(PackedAttention(batch.cu_seqlens, backend=backend))
    hidden, rope = decoder.embed(batch.token_ids), decoder.rope(batch.position_ids)
    branches = _Branches(decoder, batch, attend, adapters=adapters, backend=backend) if teacher else None
    again = decoder.gradient_checkpointing and torch.is_grad_enabled()
    *inner, last = decoder.layers
    for layer in (*inner, last):
        rows = _rows(batch.rows, batch.agent_ids, adapters=adapters) if layer is last else None
        if again:
            hidden = checkpoint(layer, hidden, rope, attend, trunk_agents, rows, use_reentrant=False)
            assert isinstance(hidden, Tensor)
        else:
            hidden = layer(hidden, rope, attend, trunk_agents, rows)
        if branches is not None:
            branches.go_through(layer, last=layer is last)
    attend.close()
    return decoder.norm(hidden), None if branches is None else branches.result()


def _rows(index: Tensor, agent_ids: Tensor, *, adapters: bool) -> Rows:
    """Only tokens that predict a trained one go on after the last layer's attention."""
    return Rows(index, AgentRows(agent_ids[index], NUM_AGENTS) if adapters else None)


class _Branches:
    """The teacher's stream: hidden states of all branches, moved on by one layer at a time."""

    def __init__(
        self, decoder: Decoder, batch: PackedBatch, trunk: TrunkAttention, *, adapters: bool, backend: str
    ) -> None:
        self.decoder = decoder
        self.attend = BranchAttention(batch, trunk, backend=backend)
        agents = batch.turn_agent.repeat_interleave(batch.cu_branch.diff().long())
        self.agent_ids = AgentRows(agents, NUM_AGENTS) if adapters else None
        self.rows = _rows(batch.teacher_rows, agents, adapters=adapters)
        with torch.no_grad():
            self.hidden = decoder.embed(batch.branch_tokens)
            self.rope = decoder.rope(batch.branch_positions)

    @torch.no_grad()
    def go_through(self, layer: torch.nn.Module, *, last: bool) -> None:
        self.hidden = layer(self.hidden, self.rope, self.attend, self.agent_ids, self.rows if last else None)

    @torch.no_grad()
    def result(self) -> Tensor:
        return self.decoder.norm(self.hidden)


@torch.no_grad()
def re_prefill(decoder: Decoder, batch: PackedBatch, *, max_tokens: int = 2**30, backend: str = "auto") -> Tensor:
    """[R, H] hidden states of the teacher from its whole contexts: every turn's conversation is computed again.

    Turns go together as long as they have at most `max_tokens`; a longer one goes alone.
    """
    inputs = teacher_inputs(batch)
    bounds, offsets = inputs.cu_seqlens.tolist(), batch.turn_offsets.tolist()
    found, first = [], 0
    while first < len(bounds) - 1:
        last = first + 1
        while last < len(bounds) - 1 and bounds[last + 1] - bounds[first] <= max_tokens:
            last += 1
        tokens, rows = slice(bounds[first], bounds[last]), slice(offsets[first], offsets[last])
        attend = PackedAttention(inputs.cu_seqlens[first : last + 1] - bounds[first], backend=backend)
        hidden = decoder(inputs.token_ids[tokens], inputs.position_ids[tokens], attend, inputs.agent_ids[tokens])
        found.append(hidden[inputs.rows[rows] - bounds[first]])
        first = last
    return torch.cat(found)
