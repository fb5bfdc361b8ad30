"""Operations for policy-gradient training of language models with token-level credit, usable without the trainer.

One folder per operation: `reference.py` is plain torch and says what the operation means; `op.py` is the public
function, with its input checks and the fast path (Triton on CUDA, plain torch on a CPU). Triton is imported where a
CUDA tensor first needs it; on a CPU only torch is needed.
"""

from coars_kernels.agent_lora import AgentRows, agent_lora
from coars_kernels.branch_attention import branch_attention
from coars_kernels.checks import checked_values
from coars_kernels.credit_policy_loss import CreditOptions, credit_policy_loss
from coars_kernels.fused_credit_loss import FusedCreditLoss, fused_credit_loss
from coars_kernels.fused_linear_divergence import fused_linear_divergence
from coars_kernels.linear_logprob import linear_logprob
from coars_kernels.paged_decode_attention import PrefixGroups, paged_decode_attention
from coars_kernels.paged_prefill_attention import paged_prefill_attention
from coars_kernels.paired_linear_logprob import paired_linear_logprob
from coars_kernels.sample_with_logprob import sample_with_logprob

__version__ = "0.1.0"

__all__ = [
    "AgentRows",
    "CreditOptions",
    "FusedCreditLoss",
    "PrefixGroups",
    "__version__",
    "agent_lora",
    "branch_attention",
    "checked_values",
    "credit_policy_loss",
    "fused_credit_loss",
    "fused_linear_divergence",
    "linear_logprob",
    "paged_decode_attention",
    "paged_prefill_attention",
    "paired_linear_logprob",
    "sample_with_logprob",
]
