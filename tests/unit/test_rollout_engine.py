"""The engine's three calls against the plain decoder, in both memories; what it refuses; what it forgets."""

from __future__ import annotations

import copy

import pytest
import torch

from coars_fast.errors import ConfigError, NonFiniteError, PagesError, StaleCacheError
from coars_fast.model.decoder import Decoder
from coars_fast.model.lora import adapter_parameters, adapter_state, add_adapters, load_adapter_state
from coars_fast.rollout import dense_memory
from coars_fast.rollout.engine import Engine
from coars_fast.rollout.product import PACK_FROM, Product
from coars_fast.rollout.sampling import PartialReply, Sampling
from tests import tiny
from tests.rollout_pieces import (
    MEMORIES,
    begin,
    cached_values,
    finish,
    logp_of,
    make_engine,
    prefill,
    random_tokens,
)

SAMPLING = Sampling(seed=3, control=frozenset(range(60)))
SHAPES = (
    {},
    {"family": "llama", "tie_word_embeddings": False, "num_kv_heads": 4},
    {"family": "qwen2", "attention_bias": True, "num_kv_heads": 1},
    {"family": "llama", "attention_bias": True, "mlp_bias": True},
)


def assert_equal(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)


# ----------------------------------------------------------------------------------------------- extend, decode, score


@pytest.mark.parametrize("attention", MEMORIES)
@pytest.mark.parametrize("shape", SHAPES)
def test_extending_in_pieces_equals_one_forward_pass(attention: str, shape: dict) -> None:
    decoder = tiny.random_decoder(seed=1, **shape)
    engine = make_engine(decoder, attention)
    tokens, agents = random_tokens([70, 3, 41, 24, 9]), [0, 1, 1, 0, -1]
    sequences = [engine.pool.new() for _ in tokens]
    for cuts in ((5, 1, 40, 8, 3), (6, 2, 41, 20, 9), (70, 3, 41, 24, 9)):
        chosen = [i for i in (3, 1, 4, 0, 2) if sequences[i].length < cuts[i]]
        parts = [tokens[i][sequences[i].length : cuts[i]] for i in chosen]
        hidden = engine.extend([sequences[i] for i in chosen], parts, [agents[i] for i in chosen])
        for i, row in zip(chosen, hidden, strict=True):
            assert_equal(row, prefill(decoder, tokens[i][: cuts[i]], agents[i])[-1])
        engine.pool.check()
    assert [sequence.length for sequence in sequences] == [70, 3, 41, 24, 9]


@pytest.mark.parametrize("attention", MEMORIES)
def test_drawn_tokens_have_the_log_probs_of_a_forward_pass(attention: str) -> None:
    decoder = tiny.random_decoder()
    engine = make_engine(decoder, attention)
    prompts, agents = random_tokens([30, 3, 17, 1, 24, 8]), [0, 1, 0, 1, 1, -1]
    replies = begin(engine, prompts, agents)
    finish(engine, replies, SAMPLING)
    for reply, agent in zip(replies, agents, strict=True):
        whole = [*reply.view, *reply.ids]
        assert reply.logp == pytest.approx(logp_of(decoder, whole, agent, len(reply.view)), abs=1e-5)
        assert SAMPLING.control.isdisjoint(reply.ids[:-1])
        assert len(reply.ids) == 12 or reply.ids[-1] in SAMPLING.control
        assert reply.sequence.length == len(whole) - 1, "the last token has no keys and values yet"
        after = engine.extend([reply.sequence], [[reply.ids[-1], 9, 10]], [agent])[0]
        assert_equal(after, prefill(decoder, [*whole, 9, 10], agent)[-1])
    assert len({len(reply.ids) for reply in replies}) > 2


def test_both_memories_draw_the_same() -> None:
    drawn = []
    for attention in MEMORIES:
        engine = make_engine(tiny.taught_decoder(), attention)
        replies = begin(engine, random_tokens([20, 35, 3, 8]), [0, 1, 1, 0])
        finish(engine, replies, SAMPLING)
        drawn.append([reply.ids for reply in replies])
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize("attention", MEMORIES)
def test_a_reply_does_not_depend_on_who_is_drawn_beside_it_nor_on_where_calls_end(attention: str) -> None:
    decoder = tiny.random_decoder()
    prompts, agents = random_tokens([30, 3, 17, 40, 24, 8]), [0, 1, 0, 1, 1, 0]
    engine = make_engine(decoder, attention)
    together = begin(engine, prompts, agents, limit=20)
    finish(engine, together, SAMPLING, until=None)
    for n, reply in enumerate(together):
        alone = PartialReply(engine.pool.new(), prompts[n], agents[n], noise_id=n, limit=20)
        finish(engine, [alone], SAMPLING, steps=2)
        assert alone.ids == reply.ids and alone.logp == pytest.approx(reply.logp, abs=1e-5)


@pytest.mark.parametrize("attention", MEMORIES)
def test_replies_may_join_and_leave_while_others_go_on(attention: str) -> None:
    decoder = tiny.random_decoder()
    prompts, agents = random_tokens([30, 3, 17, 40, 24, 8]), [0, 1, 0, 1, 1, 0]
    engine = make_engine(decoder, attention, num_pages=60)
    apart = make_engine(decoder, attention)
    expected = begin(apart, prompts, agents, limit=9)
    finish(apart, expected, SAMPLING)
    replies = begin(engine, prompts, agents, limit=9)
    waiting, alive = list(replies), []
    while waiting or alive:
        alive += [waiting.pop(0)] if waiting else []
        engine.decode(alive, SAMPLING, until=1, steps=2)
        for reply in alive:
            if reply.over:
                engine.pool.release(reply.sequence)
        alive = [reply for reply in alive if not reply.over]
        engine.pool.check([reply.sequence for reply in alive])
    assert [reply.ids for reply in replies] == [reply.ids for reply in expected]
    assert engine.pool.num_used == sum(len(reply.sequence.pages) for reply in replies) == 0


def test_temperatures_may_be_mixed() -> None:
    decoder = tiny.taught_decoder()
    for attention in MEMORIES:
        engine = make_engine(decoder, attention)
        prompts = random_tokens([12, 12, 9])
        replies = begin(engine, prompts, [0, 0, 1])
        for reply, temperature in zip(replies, (0.0, 1.0, 0.0), strict=True):
            reply.temperature = temperature
        finish(engine, replies, SAMPLING)
        for reply in replies:
            alone = PartialReply(
                engine.pool.new(), reply.view, reply.agent, reply.noise_id, limit=12, temperature=reply.temperature
            )
            finish(engine, [alone], SAMPLING)
            assert alone.ids == reply.ids
        greedy = prefill(decoder, [*replies[0].view, *replies[0].ids], 0) @ decoder.head_weight.T
        assert greedy.argmax(-1).tolist()[11:-1] == replies[0].ids


def test_guesses_change_nothing_but_the_number_of_passes() -> None:
    decoder = tiny.random_decoder()
    prompts, agents = random_tokens([20, 9, 14, 30]), [0, 1, 1, 0]
    passes, expected = [], []
    for guess in (False, True):
        engine = make_engine(decoder, guess=guess)
        for _ in range(4):  # the same replies again: from the third time on all guesses are right
            replies = begin(engine, prompts, agents)
            steps = 0
            while alive := [reply for reply in replies if not reply.over]:
                steps += engine.decode(alive, SAMPLING)[0]
            expected = expected or [reply.ids for reply in replies]
            assert [reply.ids for reply in replies] == expected
            for reply in replies:
                assert reply.logp == pytest.approx(
                    logp_of(decoder, [*reply.view, *reply.ids], reply.agent, len(reply.view)), abs=1e-5
                )
                assert reply.sequence.length == len(reply.view) + len(reply.ids) - 1
                after = engine.extend([reply.sequence], [[reply.ids[-1], 5]], [reply.agent])[0]
                assert_equal(after, prefill(decoder, [*reply.view, *reply.ids, 5], reply.agent)[-1])
        passes.append(steps)
    assert passes[1] < passes[0] / 2


def test_wrong_guesses_leave_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = tiny.random_decoder()
    prompts, agents = random_tokens([20, 9, 14, 30]), [0, 1, 1, 0]
    plain = begin(engine := make_engine(decoder, guess=False), prompts, agents)
    finish(engine, plain, SAMPLING)
    engine = make_engine(decoder)
    monkeypatch.setattr(
        type(engine.drafter), "guess", lambda self, agent, context, view, most: [7, 8, 9, 300, 301][:most]
    )
    replies = begin(engine, prompts, agents)
    finish(engine, replies, SAMPLING)
    assert [reply.ids for reply in replies] == [reply.ids for reply in plain]
    for reply in replies:
        after = engine.extend([reply.sequence], [[reply.ids[-1], 5]], [reply.agent])[0]
        assert_equal(after, prefill(decoder, [*reply.view, *reply.ids, 5], reply.agent)[-1])


@pytest.mark.parametrize("attention", MEMORIES)
def test_scores_are_those_of_a_forward_pass_and_leave_the_sequences_alone(attention: str) -> None:
    decoder = tiny.random_decoder()
    engine = make_engine(decoder, attention)
    tokens, agents = random_tokens([30, 3, 16]), [0, 1, 1]
    sequences = [engine.pool.new() for _ in tokens]
    engine.extend(sequences, tokens, agents)
    before, used = [cached_values(engine, s) for s in sequences], engine.pool.num_used
    contexts, scored = random_tokens([4, 1, 9, 2], seed=1), random_tokens([1, 7, 3, 5], seed=2)
    order = [1, 0, 2, 0]
    for _ in range(3):
        found = engine.score([sequences[i] for i in order], contexts, scored, [agents[i] for i in order])
        for i, context, part, logp in zip(order, contexts, scored, found, strict=True):
            whole = [*tokens[i], *context, *part]
            assert logp.tolist() == pytest.approx(logp_of(decoder, whole, agents[i], len(whole) - len(part)), abs=1e-5)
    assert engine.pool.num_used == used
    for sequence, old in zip(sequences, before, strict=True):
        assert torch.equal(cached_values(engine, sequence), old)
    engine.pool.check()


@pytest.mark.parametrize("attention", MEMORIES)
def test_forks_go_on_apart(attention: str) -> None:
    decoder = tiny.random_decoder()
    engine = make_engine(decoder, attention)
    tokens, rest = random_tokens([21])[0], random_tokens([6, 9, 1], seed=4)
    trunk = engine.pool.new()
    engine.extend([trunk], [tokens], [1])
    forks = [engine.pool.fork(trunk), engine.pool.fork(trunk, 16), engine.pool.fork(trunk, 5)]
    hidden = engine.extend(forks, rest, [1, 1, 1])
    for row, length, part in zip(hidden, (21, 16, 5), rest, strict=True):
        assert_equal(row, prefill(decoder, [*tokens[:length], *part], 1)[-1])
    assert_equal(engine.extend([trunk], [[3]], [1])[0], prefill(decoder, [*tokens, 3], 1)[-1])
    engine.pool.check()


@pytest.mark.parametrize("attention", MEMORIES)
def test_a_truncated_sequence_forgets_what_came_after(attention: str) -> None:
    decoder = tiny.random_decoder()
    engine = make_engine(decoder, attention)
    first, second = random_tokens([40, 12])
    sequence, other = engine.pool.new(), engine.pool.new()
    engine.extend([sequence, other], [first, second], [0, 1])
    engine.pool.truncate(sequence, 19)
    found = engine.extend([sequence, other], [second, [4]], [0, 1])
    assert_equal(found[0], prefill(decoder, [*first[:19], *second], 0)[-1])
    assert_equal(found[1], prefill(decoder, [*second, 4], 1)[-1])


@pytest.mark.parametrize("attention", MEMORIES)
def test_what_lies_behind_a_sequence_in_memory_is_never_used(attention: str) -> None:
    decoder = tiny.random_decoder()
    engine = make_engine(decoder, attention)
    engine.pool.kv.fill_(1e4)
    prompts, agents = random_tokens([13, 30]), [0, 1]
    replies = begin(engine, prompts, agents)
    finish(engine, replies, SAMPLING)
    for reply in replies:
        whole = [*reply.view, *reply.ids]
        assert reply.logp == pytest.approx(logp_of(decoder, whole, reply.agent, len(reply.view)), abs=1e-5)


def test_long_contexts_are_extended_in_several_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coars_fast.rollout.engine.EXTEND_TOKENS", 32)
    decoder = tiny.random_decoder()
    for attention in MEMORIES:
        engine = make_engine(decoder, attention)
        replies = begin(engine, random_tokens([40, 1, 33, 20]), [0, 1, 1, 0])
        finish(engine, replies, SAMPLING)
        for reply in replies:
            whole = [*reply.view, *reply.ids]
            assert reply.logp == pytest.approx(logp_of(decoder, whole, reply.agent, len(reply.view)), abs=1e-5)


def test_other_dtypes_run_over_pages() -> None:
    decoder = tiny.random_decoder().to(torch.bfloat16)
    engine = Engine(decoder, num_pages=50)
    replies = begin(engine, random_tokens([13, 30]), [0, 1])
    finish(engine, replies, SAMPLING)
    for reply in replies:
        whole = [*reply.view, *reply.ids]
        assert reply.logp == pytest.approx(logp_of(decoder, whole, reply.agent, len(reply.view)), abs=0.3)


# ------------------------------------------------------------------------------------------------------------ refusals


def test_what_cannot_be_computed_is_refused_before_any_work() -> None:
    decoder = tiny.random_decoder(max_position_embeddings=32)
    engine = make_engine(decoder)
    sequence, vocab_size = engine.pool.new(), decoder.config.vocab_size
    for tokens, agent, message in (
        ([], 0, "extended by nothing"),
        ([1] * 33, 0, "sequence of 33 does not fit the model's 32 positions"),
        ([1, -1], 0, "-1 is none of the decoder's tokens"),
        ([vocab_size], 0, rf"{vocab_size} is none of the decoder's tokens, 0 to {vocab_size - 1}"),
        ([1], 2, "2 has no adapter, the decoder has 2"),
        ([1], -2, "-2 has no adapter"),
    ):
        with pytest.raises(ConfigError, match=message):
            engine.extend([sequence], [tokens], [agent])
        if tokens[1:] != [1] * 32:
            with pytest.raises(ConfigError, match=message):
                engine.decode([PartialReply(sequence, tokens, agent, 0, limit=4)], SAMPLING)
    with pytest.raises(ConfigError, match="sequence of 34 does not fit"):
        engine.decode([PartialReply(sequence, [1] * 30, 0, 0, limit=4)], SAMPLING)
    with pytest.raises(ConfigError, match="one is given twice"):
        engine.extend([sequence, sequence], [[1], [2]], [0, 0])
    with pytest.raises(ConfigError, match="give one of each"):
        engine.extend([sequence], [[1], [2]], [0])
    with pytest.raises(ConfigError, match="a token before it and one of its own"):
        engine.score([sequence], [[]], [[1]], [0])
    assert sequence.length == 0 and engine.pool.num_used == 0


def test_an_adapter_that_is_not_loaded_is_refused() -> None:
    decoder = tiny.random_decoder(adapters=False)
    engine = make_engine(decoder)
    with pytest.raises(ConfigError, match="0 has no adapter, the decoder has 0; add_adapters makes them"):
        engine.extend([engine.pool.new()], [[1]], [0])
    assert_equal(engine.extend([engine.pool.new()], [[1, 2]], [-1])[0], prefill(decoder, [1, 2], -1)[-1])


def test_too_few_pages_are_an_error_before_any_work() -> None:
    engine = make_engine(tiny.random_decoder(), num_pages=3)
    first, second = engine.pool.new(), engine.pool.new()
    with pytest.raises(PagesError, match="4 more pages of 8 tokens are needed, but 3 of 3 are free.*rollout.kv_gib"):
        engine.extend([first, second], [[1] * 16, [1] * 9], [0, 0])
    assert engine.pool.num_used == first.length == 0
    engine.extend([first], [[1] * 16], [0])
    with pytest.raises(PagesError):
        engine.decode([PartialReply(second, [1, 2], 0, 0, limit=8)], SAMPLING)
    engine.pool.check()


def test_a_memory_or_an_attention_that_cannot_be_had_is_an_error() -> None:
    decoder = tiny.random_decoder()
    with pytest.raises(ConfigError, match="0 pages of 8 tokens"):
        make_engine(decoder, num_pages=0)
    with pytest.raises(ConfigError, match="'flash_attn' was asked for, but it needs a CUDA device"):
        make_engine(decoder, "flash_attn")
    with pytest.raises(ConfigError, match="'sdpa' is unknown"):
        make_engine(decoder, "sdpa")
    with pytest.raises(ConfigError, match="'dense' is for float32 on a CPU"):
        make_engine(copy.deepcopy(decoder).to(torch.bfloat16), "dense")


# --------------------------------------------------------------------------------------------------- change of weights


def step_of_an_optimizer(decoder: Decoder) -> None:
    parameters = list(adapter_parameters(decoder, 1).values())
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    torch.optim.AdamW(parameters, lr=1e-3).step()


def step_of_a_fused_optimizer(decoder: Decoder) -> None:
    parameters = list(adapter_parameters(decoder, 0).values())
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    torch.optim.AdamW(parameters, lr=1e-3, fused=True).step()


def load_an_adapter(decoder: Decoder) -> None:
    state = {name: tensor + 0.01 for name, tensor in adapter_state(decoder, 0).items()}
    load_adapter_state(decoder, 0, state)


def load_all(decoder: Decoder) -> None:
    decoder.load_state_dict({name: tensor * 1.01 for name, tensor in decoder.state_dict().items()})


def write_in_place(decoder: Decoder) -> None:
    with torch.no_grad():
        decoder.layers[0].mlp.up_proj.weight[0, 0] += 0.5


def write_the_stacked_adapters(decoder: Decoder) -> None:
    layer = decoder.layers[1].self_attn.q_proj
    layer.stacked_b.add_(0.01)  # type: ignore[operator]


def write_past_the_counters(decoder: Decoder) -> None:
    next(iter(adapter_parameters(decoder, 0).values())).data.mul_(1.5)


def replace_a_parameter(decoder: Decoder) -> None:
    decoder.layers[0].input_layernorm.weight = torch.nn.Parameter(torch.full((32,), 1.1))


def replace_the_adapters(decoder: Decoder) -> None:
    add_adapters(decoder, rank=3, alpha=6.0, seed=8)
    tiny.randomise_adapters(decoder, seed=8)


CHANGES = (
    step_of_an_optimizer,
    step_of_a_fused_optimizer,
    load_an_adapter,
    load_all,
    write_in_place,
    write_the_stacked_adapters,
    write_past_the_counters,
    replace_a_parameter,
)


@pytest.mark.parametrize("attention", MEMORIES)
@pytest.mark.parametrize("change", CHANGES)
def test_keys_and_values_of_other_weights_cannot_be_used(change, attention: str) -> None:
    decoder = tiny.random_decoder()
    engine = make_engine(decoder, attention)
    tokens = random_tokens([20])[0]

    def cached():
        sequence = engine.pool.new()
        engine.extend([sequence], [tokens], [1])
        return sequence

    for use in (
        lambda s: engine.extend([s], [[3]], [1]),
        lambda s: engine.score([s], [[3]], [[4]], [1]),
        lambda s: engine.pool.fork(s),
        lambda s: engine.decode([PartialReply(s, [*tokens, 3], 1, 0, limit=4)], SAMPLING),
    ):
        sequence = cached()
        change(decoder)
        engine.refresh()
        with pytest.raises(StaleCacheError, match="weights have changed"):
            use(sequence)
        assert engine.pool.num_used == 0
        engine.pool.release(sequence)  # nothing, and no harm
        engine.pool.check()
    sequence = cached()
    change(decoder)
    with pytest.raises(StaleCacheError):  # without being asked to look
        engine.extend([sequence], [[3]], [1])
    for agent in (0, 1):  # and what is computed from now on is the new weights'
        hidden = engine.extend([engine.pool.new()], [tokens], [agent])[0]
        assert_equal(hidden, prefill(decoder, tokens, agent)[-1])


@pytest.mark.parametrize("attention", MEMORIES)
def test_new_adapters_on_the_decoder_are_seen(attention: str) -> None:
    decoder = tiny.random_decoder(adapters=False)
    engine = make_engine(decoder, attention)
    sequence = engine.pool.new()
    engine.extend([sequence], [[1, 2, 3]], [-1])
    replace_the_adapters(decoder)
    with pytest.raises(StaleCacheError):
        engine.extend([sequence], [[4]], [-1])
    for agent in (0, 1, -1):
        hidden = engine.extend([engine.pool.new()], [[1, 2, 3]], [agent])[0]
        assert_equal(hidden, prefill(decoder, [1, 2, 3], agent)[-1])


def test_weights_that_stay_keep_their_pages() -> None:
    engine = make_engine(tiny.random_decoder())
    sequence = engine.pool.new()
    engine.extend([sequence], [[1, 2, 3]], [0])
    version = engine.pool.version
    for _ in range(3):
        engine.extend([sequence], [[1, 2, 3]], [0])
    assert engine.pool.version == version and sequence.length == 12


def test_a_released_sequence_cannot_be_used() -> None:
    engine = make_engine(tiny.random_decoder())
    sequence = engine.pool.new()
    engine.extend([sequence], [[1, 2, 3]], [0])
    engine.pool.release(sequence)
    with pytest.raises(StaleCacheError, match="released"):
        engine.extend([sequence], [[4]], [0])


def test_an_adapter_that_is_not_finite_is_refused() -> None:
    decoder = tiny.random_decoder()
    engine = make_engine(decoder)
    with torch.no_grad():
        next(iter(adapter_parameters(decoder, 1).values()))[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="adapter holds values that are not finite"):
        engine.extend([engine.pool.new()], [[1]], [0])


# ------------------------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("attention", MEMORIES)
def test_the_decoder_is_as_it_was_and_can_be_copied_and_saved(attention: str, tmp_path) -> None:
    decoder = tiny.random_decoder()
    before = {name: tensor.clone() for name, tensor in decoder.state_dict().items()}
    engine = make_engine(decoder, attention)
    engine.extend([engine.pool.new()], [[1, 2]], [0])
    assert all(torch.equal(tensor, before[name]) for name, tensor in decoder.state_dict().items())
    assert all(parameter.is_contiguous() for parameter in decoder.parameters())
    twin = copy.deepcopy(decoder)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in decoder.state_dict().items())
    base = tiny.random_decoder(adapters=False)
    make_engine(base, attention)
    tiny.write_model(tmp_path / "model", base)
    from coars_fast.model.load import load_decoder

    read = load_decoder(str(tmp_path / "model"), dtype=torch.float32, device=torch.device("cpu"))
    assert all(torch.equal(tensor, base.state_dict()[name]) for name, tensor in read.state_dict().items())


def test_pages_on_a_gpu_share_one_copy_of_the_base() -> None:
    decoder = tiny.random_decoder()
    numbers = sum(p.numel() for p in decoder.parameters())
    engine = make_engine(decoder, "kernels")
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in decoder.parameters()}
    assert sum(storages.values()) <= numbers * 4 * 1.01
    bases = [part.base for layer in engine.weights.layers for part in layer.projections]  # type: ignore[attr-defined]
    assert all(base.untyped_storage().data_ptr() in storages for base in bases)
    second = make_engine(decoder, "kernels")  # finds them side by side, and leaves them there
    assert {p.untyped_storage().data_ptr() for p in decoder.parameters()} == set(storages)
    assert second.weights.layers[0].qkv.base.data_ptr() == bases[0].data_ptr()  # type: ignore[attr-defined]


def test_nothing_needs_gradients() -> None:
    engine = make_engine(tiny.taught_decoder())
    hidden = engine.extend([engine.pool.new()], [[5, 6]], [0])
    assert not hidden.requires_grad and not engine.pool.kv.requires_grad and torch.is_grad_enabled()


def test_rows_are_copies_that_may_be_lost_at_any_time(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = tiny.random_decoder()
    engine = make_engine(decoder)
    memory = engine.memory
    assert isinstance(memory, dense_memory.DenseMemory)
    replies = begin(engine, random_tokens([30, 3, 17]), [0, 1, 0])
    while alive := [reply for reply in replies if not reply.over]:
        engine.decode(alive, SAMPLING, steps=1)
        memory.clear()
        for rows in memory.rows.values():
            rows.kv.fill_(1e4)
    for reply in replies:
        whole = [*reply.view, *reply.ids]
        assert reply.logp == pytest.approx(logp_of(decoder, whole, reply.agent, len(reply.view)), abs=1e-5)


def test_a_large_matrix_stays_laid_out_and_gives_the_same_products() -> None:
    generator = torch.Generator().manual_seed(0)
    for shape in ((8, 16), (600, 500)):
        weight, x = torch.randn(shape, generator=generator), torch.randn(70, shape[1], generator=generator)
        product, exact = Product(weight), x.double() @ weight.T.double()
        bound = 1e-6 * exact.norm(dim=-1).max()
        assert (product._packed is None) == (weight.numel() < PACK_FROM)
        out = torch.empty(70, shape[0])
        product.into(out, x)
        for found in (out, product(x)):
            assert (found - exact).abs().max() < bound
        product.add_to(out, x)
        assert (out - 2 * exact).abs().max() < 2 * bound
        rows = torch.empty(5, shape[0])
        product.into(rows, x[10:15])
        assert (rows - exact[10:15]).abs().max() < bound
