"""The examples of docs/kernels.md run as they stand, one after the other."""

import re
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn

import coars_kernels

PAGE = Path(__file__).parents[2] / "docs" / "kernels.md"


def test_every_example_runs() -> None:
    torch.manual_seed(0)
    hidden_size, vocab, length = 8, 20, 97
    body = nn.Embedding(vocab, hidden_size)
    model = SimpleNamespace(
        model=lambda ids: SimpleNamespace(last_hidden_state=body(ids)),
        lm_head=nn.Linear(hidden_size, vocab, bias=False).requires_grad_(False),
    )
    mask = torch.ones(1, length)
    mask[0, 0] = 0
    names = {
        "coars_kernels": coars_kernels, "model": model, "H": hidden_size, "response_mask": mask,
        "input_ids": torch.randint(vocab, (1, length)), "with_reference": torch.randint(vocab, (1, length)),
        "teacher_rows": torch.arange(length - 1), "old_logp": torch.full((length - 1,), -3.0),
        "rollout_logp": torch.full((length - 1,), -3.0), "advantage": torch.randn(length - 1),
        "log": lambda metrics: None, "monitor": lambda value: None, "linear": nn.Linear(8, 4), "x": torch.randn(5, 8),
        "a": torch.randn(2, 2, 8), "b": torch.randn(2, 4, 2), "agent_ids": torch.tensor([0, 1, 1, 0, 1]), "scale": 2.0,
        "q": torch.randn(5, 4, 8), "k": torch.randn(5, 2, 8), "v": torch.randn(5, 2, 8),
        "trunk_k": torch.randn(9, 2, 8), "trunk_v": torch.randn(9, 2, 8),
        "cu_branch": torch.tensor([0, 3, 5]).int(), "trunk_start": torch.tensor([0, 4]).int(),
        "trunk_len": torch.tensor([3, 5]).int(), "logits": torch.randn(3, vocab), "sequence_id": torch.arange(3),
        "position": torch.arange(3), "new_q": torch.randn(7, 4, 8),
        "k_pages": torch.randn(9, 2, 2, 8), "v_pages": torch.randn(9, 2, 2, 8),
        "page_table": torch.tensor([[4, 1, -1], [4, 2, 8], [4, 3, 0], [6, -1, -1], [5, -1, -1]]).int(),
        "cu_q": torch.tensor([0, 1, 4, 5, 7, 7]).int(), "lengths": torch.tensor([3, 6, 5, 2, 1]).int(),
        "row_offsets": torch.tensor([0, 3, 5]).int(), "prefix_length": torch.tensor([2, 0]).int(),
    }  # fmt: skip
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    assert len(blocks) == 11
    setup, *examples = blocks
    for block in examples:
        body.weight.grad = None
        exec(setup, names)
        if "fused_credit_loss(...)" in block:
            block = block.replace("(...)", "(states, teacher_states, weight, target, rollout_logp, reward, offsets)")
        exec(block, names)
        if "backward" in block:
            assert body.weight.grad is not None and body.weight.grad.isfinite().all() and body.weight.grad.any()
