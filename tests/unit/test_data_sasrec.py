"""SASRec: its loss and gradients, what it learns, determinism, files, metrics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from coars_fast.config import SASRecConfig, WorldConfig
from coars_fast.data.ranking import full_ranking, ranking_metrics, sampled_ranking
from coars_fast.data.sasrec import ItemSpace, SASRec, _batches, _draw_epoch, _FullSoftmaxLoss, _windows, train_sasrec
from coars_fast.data.world import make_world
from coars_fast.errors import DataError

SMALL = SASRecConfig(hidden_size=16, num_epochs=2, max_length=6, batch_size=8)


@pytest.fixture(scope="module")
def cycle() -> tuple[list[list[int]], SASRec]:
    """Users who walk round a circle of 12 items from different starts."""
    sequences = [[(start + t) % 12 for t in range(9)] for start in range(12)] * 6
    config = SASRecConfig(hidden_size=32, num_epochs=40, max_length=8, batch_size=16, dropout=0.1, learning_rate=3e-3)
    return sequences, train_sasrec(sequences, 12, config, seed=0)


def test_softmax_loss_equals_cross_entropy_in_value_and_gradients(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("coars_fast.data.sasrec._SOFTMAX_ROWS", 7)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(23, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    target = torch.randint(11, (23,), generator=generator)
    loss = _FullSoftmaxLoss.apply(hidden, weight, target)
    expected = F.cross_entropy(hidden @ weight.T, target)
    assert torch.allclose(loss, expected, rtol=1e-12)
    for ours, theirs in zip(
        torch.autograd.grad(3 * loss, (hidden, weight)),
        torch.autograd.grad(3 * expected, (hidden, weight)),
        strict=True,
    ):
        assert torch.allclose(ours, theirs, rtol=1e-10, atol=1e-14)


def test_windows_make_every_item_but_the_first_a_target_once():
    (windows,) = _windows([list(range(12))], 12, 5)
    assert sorted(int(item) for window in windows for item in window[1:]) == list(range(1, 12))
    assert windows[0].tolist() == [6, 7, 8, 9, 10, 11]
    assert _windows([[3], [1, 2]], 12, 5)[0] == []


def test_learns_a_cycle(cycle: tuple[list[list[int]], SASRec]):
    sequences, model = cycle
    metrics = ranking_metrics(model.score(sequences), [(s[-1] + 1) % 12 for s in sequences], k=1)
    assert metrics["hr@1"] > 0.95, metrics


def test_a_history_scores_the_same_in_any_company(cycle: tuple[list[list[int]], SASRec]):
    _, model = cycle
    alone = model.score([[3, 4]])
    together = model.score([[3, 4], [1, 2, 3, 4, 5, 6, 7], [9]])
    np.testing.assert_allclose(together[:1], alone, rtol=1e-4, atol=1e-4)
    assert model.score([list(range(12))]).shape == (1, 12)  # longer than max_length: the latest count
    np.testing.assert_allclose(model.score([list(range(12))]), model.score([list(range(4, 12))]), rtol=1e-4, atol=1e-4)


def test_padding_holds_no_secret():
    """What stands after a history's last item never changes its state."""
    model = SASRec(9, SMALL).eval()
    a, b = torch.tensor([[1, 2, 0, 0]]), torch.tensor([[1, 2, 7, 8]])
    with torch.no_grad():
        assert torch.equal(model(a, torch.tensor([2]))[:, :2], model(b, torch.tensor([2]))[:, :2])


def test_same_seed_same_model_and_the_global_random_state_stays():
    sequences = [[(u + t) % 9 for t in range(5)] for u in range(20)]
    torch.manual_seed(123)
    expected = torch.rand(3)
    torch.manual_seed(123)
    calls: list[tuple[int, int, float]] = []
    first = train_sasrec(sequences, 9, SMALL, seed=4, progress=lambda *call: calls.append(call))
    assert torch.equal(torch.rand(3), expected)
    torch.rand(17)
    second = train_sasrec(sequences, 9, SMALL, seed=4)
    other = train_sasrec(sequences, 9, SMALL, seed=5)
    assert all(torch.equal(v, second.state_dict()[k]) for k, v in first.state_dict().items())
    assert not torch.equal(first.item_embedding.weight, other.item_embedding.weight)
    assert [call[:2] for call in calls] == [(1, 2), (2, 2)] and calls[1][2] < calls[0][2] < 4.0


def test_save_and_load_give_the_same_scores(tmp_path: Path, cycle: tuple[list[list[int]], SASRec]):
    sequences, model = cycle
    path = tmp_path / "sasrec.safetensors"
    model.save(path)
    loaded = SASRec.load(str(path))
    assert loaded.config == model.config and not loaded.training
    assert np.array_equal(loaded.score(sequences[:5]), model.score(sequences[:5]))
    model.save(path)  # replaces
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_no_epochs_is_an_untrained_model():
    assert train_sasrec([[0, 1]], 3, replace(SMALL, num_epochs=0), seed=0).score([[0]]).shape == (1, 3)


def test_ranking_metrics_by_hand():
    scores = np.array([[0.1, 0.9, 0.5], [0.3, 0.3, 0.3], [-np.inf, 1.0, 2.0]])
    metrics = ranking_metrics(scores, [2, 0, 2], k=2)  # ranks 2, 3 (ties count against it), 1
    assert metrics["hr@2"] == pytest.approx(2 / 3)
    assert metrics["ndcg@2"] == pytest.approx((1 / np.log2(3) + 1) / 3)
    for bad_scores, bad_targets in (
        (scores, [0, 1]),
        (scores, [0, 1, 3]),
        (scores * np.nan, [0, 1, 2]),
        (scores[0], [0]),
    ):
        with pytest.raises(ValueError, match="scores|targets"):
            ranking_metrics(bad_scores, bad_targets)


class Fixed:
    """Scores item i of any history by its number, so that the highest item is the best."""

    def score(self, histories: Sequence[Sequence[int]]) -> np.ndarray:
        return np.tile(np.arange(200, dtype=np.float32), (len(histories), 1))


def test_rankings_of_one_model_by_hand():
    """Items 199, 198, ... are best; user 1 took the best two, so that 190 is eighth for them and tenth for user 0."""
    histories, targets = [[0], [198, 199], [5]], [190, 190, 3]
    full = full_ranking(Fixed(), histories, targets)
    assert full["hr@10"] == pytest.approx(2 / 3)
    assert full["ndcg@10"] == pytest.approx((1 / np.log2(11) + 1 / np.log2(9)) / 3)
    # All that a user did not take as negatives: the same rank as among all items.
    everything = sampled_ranking(Fixed(), histories[1:2], [190], num_negatives=197)
    assert everything["ndcg@10"] == pytest.approx(1 / np.log2(9))
    # About half of the 9 better items are among 100 of the 198 others, so 190 ranks higher, and 3 still last.
    sampled = sampled_ranking(Fixed(), histories * 200, targets * 200, num_negatives=100)
    assert sampled["hr@10"] == pytest.approx(2 / 3) and full["ndcg@10"] < sampled["ndcg@10"] < 2 / 3
    ranks = [1 + (np.random.default_rng([0, u]).choice(np.delete(np.arange(200), [0, 190]), 100, False) > 190).sum()
             for u in range(0, 600, 3)]  # fmt: skip
    own = sampled_ranking(Fixed(), [[0]], [190], num_negatives=100)
    assert own["ndcg@10"] == pytest.approx(1 / np.log2(1 + ranks[0]))
    assert sampled == sampled_ranking(Fixed(), histories * 200, targets * 200, num_negatives=100)
    with pytest.raises(ValueError, match="user 0 left only 198 items, not 199"):
        sampled_ranking(Fixed(), [[0]], [190], num_negatives=199)


def test_stops_early_and_keeps_the_best_weights():
    """Users in random order teach nothing, so that validation gets worse from some epoch on."""
    rng = np.random.default_rng(0)
    sequences = [rng.permutation(40)[:12].tolist() for _ in range(60)]
    config = SASRecConfig(hidden_size=32, num_epochs=40, max_length=8, batch_size=16, dropout=0.0, patience=3)
    epochs: list[int] = []
    model = train_sasrec(sequences, 40, config, seed=0, progress=lambda epoch, of, loss: epochs.append(epoch))
    assert 3 < len(epochs) < 40
    given = [sequence[:-1] for sequence in sequences]
    again = train_sasrec(given, 40, config, seed=0, validation=[sequence[-1] for sequence in sequences])
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())
    best = full_ranking(model, given, [sequence[-1] for sequence in sequences])["ndcg@10"]
    # Whatever it kept is at least as good as each epoch that it saw, the last one included.
    last = train_sasrec(given, 40, replace(config, patience=0, num_epochs=40), seed=0)
    assert best >= full_ranking(last, given, [sequence[-1] for sequence in sequences])["ndcg@10"] - 0.02
    with pytest.raises(DataError, match="no user has 3 items"):
        train_sasrec([[1, 2]], 40, config, seed=0)


def test_batches_of_similar_lengths_hold_every_window_once():
    sequences = [list(range(2 + u % 9)) for u in range(50)]
    config = replace(SMALL, batch_size=7, similar_lengths=True)
    drawn = _draw_epoch(_windows(sequences, 12, 20), np.random.default_rng(0))
    batches = list(_batches(drawn, config, np.random.default_rng(1)))
    assert sorted(map(len, (w for batch in batches for w in batch))) == sorted(map(len, drawn))
    assert max(max(map(len, batch)) - min(map(len, batch)) for batch in batches) <= 2
    means = [float(np.mean([len(w) for w in batch])) for batch in batches]
    assert means != sorted(means), "in random order"


def test_full_ranking_leaves_the_history_out(cycle: tuple[list[list[int]], SASRec]):
    _, model = cycle
    histories = [[0, 1, 2]] * 300 + [[4, 5, 6, 7]]
    assert full_ranking(model, histories, [3] * 300 + [8], k=1)["hr@1"] == pytest.approx(1.0)
    assert full_ranking(model, [[0, 1, 2]], [2], k=8)["hr@8"] == 0.0  # seen, so ranked last


def test_beats_popularity_in_the_synthetic_world():
    world = make_world(WorldConfig(num_users=300))
    train = [s[:-1] for s in world.sequences]
    targets = [s[-1] for s in world.sequences]
    model = train_sasrec(train, world.num_items, SASRecConfig(num_epochs=12, batch_size=32), seed=0)
    popularity = np.bincount(np.concatenate([np.array(s) for s in train]), minlength=world.num_items).astype(float)
    popular = np.tile(popularity, (world.num_users, 1))
    for row, history in zip(popular, train, strict=True):
        row[list(history)] = -np.inf
    assert full_ranking(model, train, targets)["hr@10"] > 1.5 * ranking_metrics(popular, targets)["hr@10"]


def item_space(vectors: np.ndarray) -> ItemSpace:
    model = SASRec(len(vectors), replace(SMALL, hidden_size=vectors.shape[1], num_heads=1))
    with torch.no_grad():
        model.item_embedding.weight.copy_(torch.tensor(vectors))
    return ItemSpace(model)


def test_item_space_by_hand():
    """Directions around a mean far from the origin, in opposite pairs of any length."""
    angles = np.deg2rad([0, 45, 90])
    arms = np.stack([np.cos(angles), np.sin(angles)], axis=1) * np.array([[1.0], [5.0], [2.0]])
    space = item_space(np.concatenate([arms, -arms]) + 10.0)  # 0, 45, 90, 180, 225 and 270 degrees
    assert space.num_items == 6
    assert [space.neighbours(item, 1) for item in (0, 2, 3, 5)] == [[1], [1], [4], [4]]
    assert sorted(space.neighbours(1, 2)) == [0, 2] and sorted(space.neighbours(0, 3)) == [1, 2, 5]
    assert space.most_alike(0, [3, 4, 2]) == 2 and space.most_alike(4, (1, 2, 3)) == 2
    assert space.most_alike(1, [5]) == 0


def test_item_space_equals_a_plain_computation():
    rng = np.random.default_rng(0)
    vectors = (rng.normal(size=(30, 7)) * rng.uniform(0.1, 9, size=(30, 1)) + rng.normal(size=7) * 3).astype(np.float32)
    space, centred = item_space(vectors), [vector - vectors.mean(0) for vector in vectors.astype(np.float64)]

    def cosine(a: int, b: int) -> float:
        return float(centred[a] @ centred[b] / np.sqrt((centred[a] @ centred[a]) * (centred[b] @ centred[b])))

    for item in range(30):
        others = sorted((i for i in range(30) if i != item), key=lambda i: -cosine(item, i))  # noqa: B023
        for count in (1, 4, 20, 28):
            found = space.neighbours(item, count)
            assert len(found) == count and set(found) == set(others[:count])
        among = rng.choice(others, 9, replace=False).tolist()
        assert space.most_alike(item, among) == among.index(min(among, key=others.index))
        assert space.most_alike(item, [*among, item]) == 9, "itself, where it is among them"


def test_an_item_is_no_neighbour_of_its_own():
    vectors = np.random.default_rng(1).normal(size=(9, 4))
    vectors[3] = vectors[5]  # as like item 3 as itself
    vectors[8] = vectors[:8].mean(0)  # at the mean: like nothing
    space = item_space(vectors)
    for item in range(9):
        everyone = sorted(set(range(9)) - {item})
        for count in (8, 9, 100):
            assert sorted(space.neighbours(item, count)) == everyone
        assert all(item not in space.neighbours(item, count) for count in range(1, 8))
    assert space.neighbours(3, 1) == [5] and space.neighbours(5, 1) == [3]
    assert item_space(vectors[:2]).neighbours(0, 20) == [1]
    alike = item_space(np.ones((4, 3)))
    assert len(alike.neighbours(2, 2)) == 2 and 2 not in alike.neighbours(2, 3)
