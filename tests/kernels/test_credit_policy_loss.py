"""`credit_policy_loss` against a naive loop in float64, with a worked example, its edge cases and its refusals."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from coars_kernels import credit_policy_loss
from coars_kernels.credit_policy_loss import torch_credit
from coars_kernels.credit_policy_loss.reference import OBJECTIVES, credit_policy_loss_reference
from tests.kernels.credit_cases import FP32_TOLERANCE, Case, make_case


def naive(case: Case, **options: Any) -> tuple[Tensor, Tensor, dict[str, float]]:
    """(loss, gradient in logp, some metrics) by loops over turns and tokens, in float64."""
    values = {name: t.double() if t.is_floating_point() else t for name, t in case.items() if t is not None}
    logp = values["logp"].clone().requires_grad_()
    offsets = values["turn_offsets"].tolist()
    turns = len(offsets) - 1
    weight = values.get("turn_weight", torch.full((turns,), 1 / max(turns, 1), dtype=torch.float64))
    agent = values.get("turn_agent", torch.zeros(turns, dtype=torch.int64))
    behaviour, old = values.get("behaviour_logp"), values.get("old_logp")
    anchor = behaviour if old is None else old
    low, high = 1 - options.get("clip_low", 0.2), 1 + options.get("clip_high", 0.2)
    clip, dual = options.get("credit_clip", 1.0), options.get("dual_clip")
    credits: dict[int, float] = {}
    for m in range(turns):
        for n in range(offsets[m], offsets[m + 1]):
            if weight[m] != 0:
                teacher = values.get("teacher_logp")
                delta = 0.0 if teacher is None else float(teacher[n] - values["logp"][n])
                credits[n] = max(-clip, min(clip, delta))
    raw = dict(credits)
    turn_of = {n: m for m in range(turns) for n in range(offsets[m], offsets[m + 1])}
    if options.get("credit_center"):
        for which in (0, 1):
            mine = [n for n in credits if int(agent[turn_of[n]]) == which]
            for n in mine:
                credits[n] = raw[n] - sum(raw[k] for k in mine) / len(mine)
    loss, by_agent = torch.zeros((), dtype=torch.float64), [0.0, 0.0]
    advantages, clipped = [], 0
    for m in range(turns):
        span = range(offsets[m], offsets[m + 1])
        if weight[m] == 0 or len(span) == 0:
            continue
        for n in span:
            advantage = float(values["turn_reward"][m]) + options.get("credit_weight", 0.1) * credits[n]
            advantages.append(advantage)
            ratio = torch.exp(logp[n] - anchor[n]) if anchor is not None else torch.ones(())
            objective = options.get("objective", "clipped")
            if objective == "gspo":
                assert anchor is not None
                mean = sum(float(logp[k].detach() - anchor[k]) for k in span) / len(span)
                ratio = math.exp(mean) * torch.exp(logp[n] - logp[n].detach())
            value = float(ratio.detach())
            if objective == "faithful":
                term = advantage * logp[n]
            elif objective == "cispo":
                term = ratio.detach().clamp(low, high) * advantage * logp[n]
                clipped += not low <= value <= high
            else:
                term = torch.min(ratio * advantage, ratio.clamp(low, high) * advantage)
                cut = value > high if advantage > 0 else value < low
                if dual is not None and advantage < 0:
                    cut = cut or value > dual
                    term = torch.clamp(term, min=dual * advantage)
                clipped += cut
            if old is not None:
                assert behaviour is not None
                term = term * min(math.exp(float(old[n] - behaviour[n])), options.get("importance_cap", 2.0))
            if "reference_logp" in values:
                difference = values["reference_logp"][n] - logp[n]
                term = term - options.get("kl_weight", 0.0) * (torch.exp(difference) - difference - 1)
            part = -weight[m] / len(span) * term
            loss = loss + part
            by_agent[int(agent[m])] += float(part.detach())
    count = max(len(advantages), 1)
    mean_advantage = sum(advantages) / count
    metrics = {
        "num_tokens": len(advantages),
        "num_turns": sum(1 for m in range(turns) if weight[m] != 0 and offsets[m + 1] > offsets[m]),
        "advantage_mean": mean_advantage,
        "advantage_std": math.sqrt(sum((a - mean_advantage) ** 2 for a in advantages) / count),
        "credit_mean": sum(raw.values()) / count,
        "credit_abs_mean": sum(map(abs, raw.values())) / count,
        "clip_fraction": clipped / count,
        "loss_rec": by_agent[0],
        "loss_user": by_agent[1],
    }
    grad = torch.autograd.grad(loss, logp)[0] if loss.requires_grad else torch.zeros_like(logp)
    return loss.detach(), grad, metrics


def check_against_naive(case: Case, **options: Any) -> None:
    expected, expected_grad, expected_metrics = naive(case, **options)
    arguments = dict(case)
    logp = arguments.pop("logp").clone().requires_grad_()
    teacher, behaviour = arguments.pop("teacher_logp", None), arguments.pop("behaviour_logp", None)
    loss, metrics = credit_policy_loss(logp, teacher, behaviour, **arguments, **options)
    loss.backward()
    assert logp.grad is not None and loss.dtype == logp.dtype
    tolerance = 1e-9 if logp.dtype == torch.float64 else FP32_TOLERANCE
    torch.testing.assert_close(loss.detach().double(), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(logp.grad.double(), expected_grad, rtol=tolerance, atol=tolerance)
    for name, value in expected_metrics.items():
        if name in metrics:
            assert float(metrics[name]) == pytest.approx(value, rel=10 * tolerance, abs=10 * tolerance), name
    assert all(value.dim() == 0 and not value.requires_grad for value in metrics.values())


LENGTHS = [3, 1, 0, 7, 2, 5, 0, 4, 6, 1]
VARIANTS: list[tuple[str, dict[str, Any], tuple[str, ...]]] = [
    ("plain", {}, ("old_logp", "reference_logp")),
    ("no credit, default weights", {}, ("old_logp", "reference_logp", "teacher_logp", "turn_weight", "turn_agent")),
    ("old log-probs", {"importance_cap": 1.3}, ("reference_logp",)),
    ("divergence", {"kl_weight": 0.3}, ("old_logp",)),
    ("centred", {"credit_center": True, "credit_weight": 0.7, "credit_clip": 0.5}, ("old_logp",)),
    ("centred over all", {"credit_center": True, "credit_weight": 0.7}, ("old_logp", "turn_agent")),
    ("asymmetric", {"clip_low": 0.1, "clip_high": 0.4, "kl_weight": 0.1, "credit_center": True}, ()),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize(("options", "absent"), [v[1:] for v in VARIANTS], ids=[v[0] for v in VARIANTS])
def test_equals_the_naive_loop(
    objective: str, options: dict[str, Any], absent: tuple[str, ...], dtype: torch.dtype
) -> None:
    case = {name: value for name, value in make_case(LENGTHS, dtype=dtype).items() if name not in absent}
    check_against_naive(case, objective=objective, **options)


@pytest.mark.parametrize("objective", ["clipped", "gspo"])
def test_dual_clip_equals_the_naive_loop(objective: str) -> None:
    case = make_case(LENGTHS, seed=4)
    del case["old_logp"]
    case["behaviour_logp"] = case["behaviour_logp"] - 0.6  # ratios near 1.8, so that the dual clip acts
    check_against_naive(case, objective=objective, dual_clip=1.5)
    losses = [credit_policy_loss(**case, objective=objective, dual_clip=dual)[0] for dual in (None, 1.5)]
    assert losses[1] < losses[0]


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 5), max_size=8),
    objective=st.sampled_from(OBJECTIVES),
    center=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_layout(lengths: list[int], objective: str, center: bool, seed: int) -> None:
    case = make_case(lengths, seed, torch.float64)
    check_against_naive(case, objective=objective, credit_center=center, kl_weight=0.2)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("absent", [(), ("old_logp",), ("turn_weight", "turn_agent")])
@pytest.mark.parametrize("center", [False, True])
def test_gradient_is_that_of_autograd_to_the_last_bit(
    monkeypatch: pytest.MonkeyPatch, objective: str, absent: tuple[str, ...], center: bool
) -> None:
    generator = torch.Generator().manual_seed(5)
    lengths = torch.randint(0, 90, (60,), generator=generator).tolist()
    case = {n: x for n, x in make_case(lengths, seed=2).items() if n not in (*absent, "reference_logp")}
    options: dict[str, Any] = {"objective": objective, "credit_center": center}
    given = case | {"logp": case["logp"].requires_grad_()}
    expected = credit_policy_loss_reference(**given, **options)
    (expected_grad,) = torch.autograd.grad(expected[0], case["logp"])
    for block in (1, 100, 2**16):  # every turn alone, some turns, all
        monkeypatch.setattr(torch_credit, "BLOCK_TOKENS", block)
        loss, metrics = credit_policy_loss(**given, **options)
        assert torch.equal(torch.autograd.grad(loss, case["logp"])[0], expected_grad)
        found = torch.stack([loss.detach(), *metrics.values()])
        wanted = torch.stack([expected[0].detach(), *(value.float() for value in expected[1].values())])
        torch.testing.assert_close(found, wanted, rtol=2e-5, atol=2e-5)


def test_worked_example_of_the_faithful_objective() -> None:
    # Turn 0: reward 1, two tokens. Credits: -0.5 - (-1.0) = 0.5; -4 - (-2) = -2, clipped to -1.
    #   advantages 1.05 and 0.9; sum of advantage * logp = -1.05 - 1.8 = -2.85; / 2 tokens = -1.425
    # Turn 1: reward -0.5, one token. Credit 0, advantage -0.5, logp -3: 1.5
    # Mean over the turns: J = (-1.425 + 1.5) / 2 = 0.0375
    logp = torch.tensor([-1.0, -2.0, -3.0], requires_grad=True)
    teacher, offsets = torch.tensor([-0.5, -4.0, -3.0]), torch.tensor([0, 2, 3])
    loss, metrics = credit_policy_loss(logp, teacher, None, torch.tensor([1.0, -0.5]), offsets, objective="faithful")
    loss.backward()
    assert loss.item() == pytest.approx(-0.0375, abs=1e-7)
    torch.testing.assert_close(logp.grad, torch.tensor([-1.05 / 4, -0.9 / 4, 0.25]))
    assert metrics["credit_mean"].item() == pytest.approx(-1 / 6)
    assert metrics["credit_clip_fraction"].item() == pytest.approx(1 / 3)
    assert metrics["num_tokens"] == 3 and metrics["num_turns"] == 2
    assert metrics["ratio_mean"] == 1 and metrics["approx_kl"] == 0 and metrics["kl"] == 0


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("garbage", [1e30, float("nan"), float("inf")])
def test_turns_of_weight_zero_contribute_nothing(objective: str, garbage: float) -> None:
    case = make_case([3, 4, 2], seed=1)
    case["turn_weight"] = torch.tensor([0.5, 0.0, 0.5])
    options: dict[str, Any] = {"objective": objective, "credit_center": True, "kl_weight": 0.1}
    results = []
    for poison in (False, True):
        values = {name: value.clone() for name, value in case.items()}
        if poison:
            for name in ("logp", "teacher_logp", "behaviour_logp", "old_logp", "reference_logp"):
                values[name][3:7] = garbage
            values["turn_reward"][1] = garbage
        logp = values.pop("logp").requires_grad_()
        loss, metrics = credit_policy_loss(logp, **values, **options)
        loss.backward()
        results.append((loss.detach(), logp.grad, metrics))
    (loss, grad, metrics), (other_loss, other_grad, other_metrics) = results
    assert torch.equal(loss, other_loss) and torch.equal(grad, other_grad) and not grad[3:7].any()
    assert metrics["num_tokens"] == 5 and metrics["num_turns"] == 2
    assert all(torch.equal(metrics[name], other_metrics[name]) for name in metrics)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 0]])
def test_no_tokens(objective: str, lengths: list[int]) -> None:
    case = make_case(lengths)
    logp = case.pop("logp").requires_grad_()
    loss, metrics = credit_policy_loss(logp, **case, objective=objective, credit_center=True, kl_weight=0.1)
    loss.backward()
    assert loss == 0 and logp.grad is not None and logp.grad.shape == (0,)
    assert all(value == 0 for value in metrics.values())


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_micro_batches_add_up_and_agents_too(objective: str) -> None:
    case = make_case([3, 1, 4, 2], seed=2)
    options: dict[str, Any] = {"objective": objective, "kl_weight": 0.1}
    whole, metrics = credit_policy_loss(**case, **options)
    total = torch.zeros(())
    for turns, rows in ((slice(0, 2), slice(0, 4)), (slice(2, 4), slice(4, 10))):
        per_turn = {"turn_reward", "turn_weight", "turn_agent"}
        part = {name: value[turns if name in per_turn else rows] for name, value in case.items()}
        part["turn_offsets"] = case["turn_offsets"][turns.start : turns.stop + 1] - rows.start
        total = total + credit_policy_loss(**part, **options)[0]
    torch.testing.assert_close(total, whole)
    torch.testing.assert_close(metrics["loss_rec"] + metrics["loss_user"], whole)


def test_credit_is_zero_when_teacher_equals_student() -> None:
    case = make_case([3, 2])
    case["teacher_logp"] = case["logp"].clone()
    with_credit, metrics = credit_policy_loss(**case, credit_weight=10.0)
    case["teacher_logp"] = None
    without, _ = credit_policy_loss(**case, credit_weight=10.0)
    assert torch.equal(with_credit, without) and metrics["credit_abs_mean"] == 0


def test_gradient_flows_through_logp_only_and_repeats_are_identical() -> None:
    case = make_case([3, 2, 4])
    names = ("logp", "teacher_logp", "behaviour_logp", "old_logp", "reference_logp", "turn_reward", "turn_weight")
    leaves = {name: case[name].requires_grad_() for name in names}
    loss, _ = credit_policy_loss(**case, kl_weight=0.1)
    loss.backward()
    assert [name for name, leaf in leaves.items() if leaf.grad is not None] == ["logp"]
    assert torch.equal(credit_policy_loss(**case, kl_weight=0.1)[0], loss)


def test_bf16_logp_is_computed_in_fp32() -> None:
    case = make_case([3, 2])
    case["logp"] = case["logp"].bfloat16()
    loss, _ = credit_policy_loss(**case)
    assert loss.dtype == torch.float32


@pytest.mark.parametrize(
    ("argument", "change"),
    [
        ("logp", {"logp": torch.zeros(5, 1)}),
        ("teacher_logp", {"teacher_logp": torch.zeros(4)}),
        ("behaviour_logp", {"behaviour_logp": None}),
        ("behaviour_logp", {"behaviour_logp": torch.zeros(5, dtype=torch.int64)}),
        ("behaviour_logp", {"objective": "faithful", "behaviour_logp": None, "old_logp": torch.zeros(5)}),
        ("old_logp", {"old_logp": torch.zeros(6)}),
        ("turn_reward", {"turn_reward": torch.zeros(2, dtype=torch.int64)}),
        ("turn_offsets", {"turn_offsets": torch.tensor([0, 5])}),
        ("turn_offsets", {"turn_offsets": torch.tensor([0, 3, 4])}),
        ("turn_offsets", {"turn_offsets": torch.tensor([1, 3, 5])}),
        ("turn_offsets", {"turn_offsets": torch.tensor([0, 7, 5])}),
        ("turn_offsets", {"turn_offsets": torch.tensor([0.0, 3.0, 5.0])}),
        ("turn_reward", {"turn_reward": torch.tensor([0.0, math.inf]), "turn_weight": torch.tensor([0.0, 1.0])}),
        ("turn_weight", {"turn_weight": torch.zeros(3)}),
        ("turn_weight", {"turn_weight": torch.tensor([1.0, math.nan])}),
        ("turn_agent", {"turn_agent": torch.zeros(2)}),
        ("turn_agent", {"turn_agent": torch.tensor([0, 2])}),
        ("objective", {"objective": "ppo"}),
        ("credit_clip", {"credit_clip": -1.0}),
        ("clip_low", {"clip_low": 1.5}),
        ("clip_high", {"clip_high": -0.1}),
        ("dual_clip", {"dual_clip": 1.0}),
        ("dual_clip", {"dual_clip": 3.0, "objective": "cispo"}),
        ("importance_cap", {"importance_cap": 0.0}),
        ("reference_logp", {"kl_weight": 0.1}),
        ("kl_weight", {"kl_weight": -0.1, "reference_logp": torch.zeros(5)}),
    ],
)
def test_errors_name_the_argument(argument: str, change: dict[str, Any]) -> None:
    arguments: dict[str, Any] = {
        "logp": torch.zeros(5),
        "teacher_logp": torch.zeros(5),
        "behaviour_logp": torch.zeros(5),
        "turn_reward": torch.zeros(2),
        "turn_offsets": torch.tensor([0, 3, 5]),
    }
    credit_policy_loss(**arguments)
    with pytest.raises(ValueError, match=f"^{argument}: "):
        credit_policy_loss(**(arguments | change))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_reward_that_is_no_number_is_named(value: float) -> None:
    tokens, offsets = torch.zeros(5), torch.tensor([0, 2, 2, 5])
    reward = torch.tensor([math.nan, value, 0.0])
    with pytest.raises(ValueError, match=f"^turn_reward: must be finite, got {value} in turn 1$"):
        credit_policy_loss(tokens, None, tokens, reward, offsets, turn_weight=torch.tensor([0.0, 0.5, 0.5]))
    credit_policy_loss(tokens, None, tokens, reward, offsets, turn_weight=torch.tensor([0.0, 0.0, 0.5]))
