"""SASRec (Kang & McAuley, arXiv 1808.09781): proposes candidates and places users in an embedding space.

A causal self-attention model of item sequences, trained with cross-entropy over the whole catalogue instead of the
paper's one sampled negative (its known weakness). Sequences are cut into windows of `max_length`, of which each epoch
draws a few per user: all of a long history is learned from in time, yet heavy users do not outweigh the others. Blocks
are pre-norm, item embeddings are shared between input and output. With `sasrec.patience` it stops early, by the last
item of each training part. It leaves out GPUs: it is a helper of the conversations, kept small enough for CPU cores.

Shapes: B sequences, L positions, H hidden size, V items, R predicted positions, U users.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as encode_safetensors
from torch import Tensor, nn

from coars_fast.config import SASRecConfig
from coars_fast.data.ranking import full_ranking
from coars_fast.errors import ConfigError, DataError, MissingModelError, ModelError, NonFiniteError
from coars_fast.state.files import atomic_write_bytes

Progress = Callable[[int, int, float], None]
"""Called after every epoch with (epochs done, epochs in all, mean loss in nats)."""

_SOFTMAX_ROWS = 512  # logits of so many rows (20 MB at 10,000 items) stay in the cache of a core
_SOFTMAX_LOGITS = 512 * 60_000  # 123 MB: a larger catalogue gets fewer rows, no slower
_VALIDATION_USERS = 3000
_WINDOWS_PER_USER = 2  # drawn in each epoch from a sequence that has more
_SCORE_ROWS = 256  # histories encoded at a time
_FORMAT = "coars_fast.sasrec.1"


class _FullSoftmaxLoss(torch.autograd.Function):
    """Mean cross-entropy over all items, by row chunks; its gradients are made in the forward pass.

    Six times faster on a CPU than `cross_entropy(hidden @ weight.T)` at 6,400 rows and 9,724 items, because the logits
    never leave the cache.
    """

    @staticmethod
    def forward(ctx, hidden_RH: Tensor, weight_VH: Tensor, target_R: Tensor) -> Tensor:
        num_rows = len(hidden_RH)
        grad_hidden, grad_weight = torch.empty_like(hidden_RH), torch.zeros_like(weight_VH)
        loss = hidden_RH.new_zeros((), dtype=torch.float64)
        chunk = max(1, min(_SOFTMAX_ROWS, _SOFTMAX_LOGITS // len(weight_VH)))
        for start in range(0, num_rows, chunk):
            rows = slice(start, start + chunk)
            hidden, target = hidden_RH[rows], target_R[rows, None]
            logits = hidden @ weight_VH.T
            logits -= logits.amax(1, keepdim=True)
            target_logit = logits.gather(1, target)
            total = logits.exp_().sum(1, keepdim=True)
            loss += (total.log() - target_logit).sum()
            logits /= total * num_rows  # now the probabilities / R
            logits.scatter_add_(1, target, torch.full_like(target_logit, -1.0 / num_rows))
            torch.mm(logits, weight_VH, out=grad_hidden[rows])
            grad_weight.addmm_(logits.T, hidden)
        ctx.save_for_backward(grad_hidden, grad_weight)
        return (loss / num_rows).to(hidden_RH.dtype)

    @staticmethod
    def backward(ctx, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * grad_outputs[0], grad_weight * grad_outputs[0], None


class _Block(nn.Module):
    def __init__(self, config: SASRecConfig):
        super().__init__()
        size = config.hidden_size
        self.num_heads, self.dropout = config.num_heads, config.dropout
        self.attention_norm, self.forward_norm = nn.LayerNorm(size), nn.LayerNorm(size)
        self.qkv, self.out = nn.Linear(size, 3 * size), nn.Linear(size, size)
        self.up, self.down = nn.Linear(size, size), nn.Linear(size, size)

    def forward(self, x_BLH: Tensor) -> Tensor:
        num_sequences, length, size = x_BLH.shape
        qkv = self.qkv(self.attention_norm(x_BLH)).view(num_sequences, length, 3, self.num_heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        attended = self.out(attended.transpose(1, 2).reshape(num_sequences, length, size))
        x_BLH = x_BLH + F.dropout(attended, self.dropout, self.training)
        hidden = F.dropout(F.relu(self.up(self.forward_norm(x_BLH))), self.dropout, self.training)
        return x_BLH + F.dropout(self.down(hidden), self.dropout, self.training)


class SASRec(nn.Module):
    """Scores all items as the next one of a history; made by :func:`train_sasrec` or :meth:`load`."""

    def __init__(self, num_items: int, config: SASRecConfig):
        super().__init__()
        _check_config(config)
        if num_items < 2:
            raise DataError(f"SASRec needs a catalogue of at least 2 items, found {num_items}")
        self.num_items, self.config = num_items, config
        self.item_embedding = nn.Embedding(num_items, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_length, config.hidden_size)
        self.blocks = nn.ModuleList(_Block(config) for _ in range(config.num_layers))
        self.final_norm = nn.LayerNorm(config.hidden_size)
        for parameter in (self.item_embedding.weight, self.position_embedding.weight):
            nn.init.normal_(parameter, std=0.02)

    def forward(self, items_BL: Tensor, lengths_B: Tensor) -> Tensor:
        """Hidden state [B, L, H] that predicts what follows each position.

        `items_BL` is padded on the right (with any item: causal attention never looks there). Positions are counted
        from the end, so that the latest item of a history of any length stands at the same one.
        """
        length = items_BL.shape[1]
        positions = self.config.max_length - lengths_B[:, None] + torch.arange(length)
        x = self.item_embedding(items_BL) * self.config.hidden_size**0.5
        x = x + self.position_embedding(positions.clamp(max=self.config.max_length - 1))
        x = F.dropout(x, self.config.dropout, self.training)
        for block in self.blocks:
            x = block(x)
        return self.final_norm(x)

    @torch.no_grad()
    def user_embeddings(self, histories: Sequence[Sequence[int]]) -> np.ndarray:
        """[U, H] float32: the state after each history's latest item (of the latest `max_length`).

        Raises:
            ValueError: a history is empty or holds an item outside the catalogue.
        """
        rows = [np.asarray(history[-self.config.max_length :], dtype=np.int64) for history in histories]
        for i, row in enumerate(rows):
            if not len(row):
                raise ValueError(f"histories: number {i} is empty")
            if row.min() < 0 or row.max() >= self.num_items:
                raise ValueError(f"histories: number {i} holds an item outside 0..{self.num_items - 1}")
        embeddings = np.empty((len(rows), self.config.hidden_size), dtype=np.float32)
        was_training = self.training
        self.eval()
        for start in range(0, len(rows), _SCORE_ROWS):
            items, lengths = _pad(rows[start : start + _SCORE_ROWS])
            hidden = self(items, lengths)
            embeddings[start : start + len(items)] = hidden[torch.arange(len(items)), lengths - 1].numpy()
        self.train(was_training)
        return embeddings

    @torch.no_grad()
    def score(self, histories: Sequence[Sequence[int]]) -> np.ndarray:
        """[U, V] float32 logits of every item as the next one, items of the history included.

        Raises:
            ValueError: a history is empty or holds an item outside the catalogue.
        """
        embeddings = torch.from_numpy(self.user_embeddings(histories))
        return (embeddings @ self.item_embedding.weight.T).numpy()

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, whole or not at all: a crash leaves the old file or none."""
        metadata = {"format": _FORMAT, "num_items": str(self.num_items), "config": json.dumps(asdict(self.config))}
        data = encode_safetensors({k: v.contiguous() for k, v in self.state_dict().items()}, metadata=metadata)
        atomic_write_bytes(Path(path), data)

    @classmethod
    def load(cls, path: str | Path) -> SASRec:
        """Read what :meth:`save` wrote.

        Raises:
            MissingModelError: no such file.
            ModelError: not a SASRec file of this project, cut short, or with other tensors than its configuration has.
        """
        path = Path(path)
        if not path.is_file():
            raise MissingModelError(f"{path}: no such file; train SASRec again to make it")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                weights = {name: file.get_tensor(name) for name in file.keys()}
            if metadata.get("format") != _FORMAT:
                raise ModelError(f"{path}: not a SASRec file (format {metadata.get('format')!r}, expected {_FORMAT!r})")
            model = cls(int(metadata["num_items"]), SASRecConfig(**json.loads(metadata["config"])))
            model.load_state_dict(weights)
        except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
            if isinstance(error, ModelError):
                raise
            raise ModelError(f"{path}: broken SASRec file ({error}); delete it to have it trained again") from error
        return model.eval()


class ItemSpace:
    """Which items are alike: cosine similarity of SASRec's item embeddings around their mean."""

    def __init__(self, sasrec: SASRec):
        vectors = sasrec.item_embedding.weight.detach().numpy()
        vectors = vectors - vectors.mean(0)
        self._unit_IH = vectors / np.linalg.norm(vectors, axis=1, keepdims=True).clip(1e-12)

    @property
    def num_items(self) -> int:
        return len(self._unit_IH)

    def most_alike(self, item: int, among: Sequence[int]) -> int:
        """Index in `among` of the item most like this one."""
        return int((self._unit_IH[list(among)] @ self._unit_IH[item]).argmax())

    def neighbours(self, item: int, count: int) -> list[int]:
        """The `count` items most like this one, in no order; all others where there are fewer."""
        similarity = self._unit_IH @ self._unit_IH[item]
        similarity[item] = -np.inf
        count = min(count, len(similarity) - 1)
        return np.argpartition(-similarity, count - 1)[:count].tolist()


def train_sasrec(
    sequences: Sequence[Sequence[int]],
    num_items: int,
    config: SASRecConfig,
    *,
    seed: int,
    progress: Progress | None = None,
    validation: Sequence[int] | None = None,
) -> SASRec:
    """Train on the training parts of all users; the same arguments give the same model.

    Args:
        sequences: training parts, oldest item first; those with fewer than 2 items teach nothing and are passed over.
        num_items: size of the catalogue; items are 0..num_items-1.
        seed: draws weights, order and dropout. Torch's global random state is left as it was.
        progress: called after every epoch.
        validation: with `config.patience`, the item that follows each sequence; by default the last one of each is
            taken away for it.

    Raises:
        DataError: no sequence has 2 items (3 with `config.patience`), or an item is outside the catalogue.
        ConfigError: a size that is not positive, or heads that do not divide the hidden size.
        NonFiniteError: the loss is not finite; raised before the weights change.
    """
    best = None
    if config.patience:
        if validation is None:
            sequences, validation = _take_last(sequences)
        best = _Best(sequences, validation, seed)
    windows = _windows(sequences, num_items, config.max_length)
    rng = np.random.default_rng(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = SASRec(num_items, config).train()
        optimizer = torch.optim.Adam(model.parameters(), lr=config.learning_rate, betas=(0.9, 0.98))
        num_steps = config.num_epochs * -(-len(_draw_epoch(windows, rng)) // config.batch_size)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, total_iters=max(1, num_steps))
        for epoch in range(1, config.num_epochs + 1):
            loss_sum, num_targets = 0.0, 0
            for batch in _batches(_draw_epoch(windows, rng), config, rng):
                loss, size = _train_batch(model, optimizer, batch)
                schedule.step()
                loss_sum, num_targets = loss_sum + loss * size, num_targets + size
            if progress is not None:
                progress(epoch, config.num_epochs, loss_sum / num_targets)
            if best is not None and best.is_over(model, epoch, config.patience):
                break
    if best is not None:
        best.restore(model)
    return model.eval()


class _Best:
    """The weights with the highest NDCG@10 on the validation items of up to 3,000 users."""

    def __init__(self, sequences: Sequence[Sequence[int]], validation: Sequence[int], seed: int):
        users = [user for user, sequence in enumerate(sequences) if len(sequence)]
        chosen = np.random.default_rng([seed, 1]).permutation(users)[:_VALIDATION_USERS].tolist()
        self.histories = [sequences[user] for user in chosen]
        self.targets = [validation[user] for user in chosen]
        self.value, self.epoch, self.weights = -1.0, 0, {}

    def is_over(self, model: SASRec, epoch: int, patience: int) -> bool:
        """Keep the model's weights if they are the best so far; True after `patience` epochs without better ones."""
        value = full_ranking(model, self.histories, self.targets)["ndcg@10"]
        if value > self.value:
            self.value, self.epoch = value, epoch
            self.weights = {name: weight.clone() for name, weight in model.state_dict().items()}
        return epoch - self.epoch >= patience

    def restore(self, model: SASRec) -> None:
        if self.weights:
            model.load_state_dict(self.weights)


def _train_batch(model: SASRec, optimizer: torch.optim.Optimizer, batch: list[np.ndarray]) -> tuple[float, int]:
    """One Adam step on these windows; returns the mean loss and the number of predicted positions."""
    items, lengths = _pad(batch)
    inputs, targets, lengths = items[:, :-1], items[:, 1:], lengths - 1
    predicted = torch.arange(inputs.shape[1]) < lengths[:, None]
    hidden_RH = model(inputs, lengths)[predicted]
    loss: Tensor = _FullSoftmaxLoss.apply(hidden_RH, model.item_embedding.weight, targets[predicted])  # type: ignore
    value = loss.item()
    if not np.isfinite(value):
        raise NonFiniteError(f"SASRec's loss is {value}; lower sasrec.learning_rate ({model.config.learning_rate})")
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    return value, len(hidden_RH)


def _windows(sequences: Sequence[Sequence[int]], num_items: int, max_length: int) -> list[list[np.ndarray]]:
    """Cut each sequence into windows of at most max_length + 1 items, counted from the end, so that every item but the
    first is a target exactly once; sequences of fewer than 2 items have none."""
    windows = []
    for number, sequence in enumerate(sequences):
        items = np.asarray(sequence, dtype=np.int64)
        if len(items) and (items.min() < 0 or items.max() >= num_items):
            raise DataError(f"sequences: number {number} holds an item outside the catalogue (0..{num_items - 1})")
        windows.append([items[max(0, end - max_length - 1) : end] for end in range(len(items), 1, -max_length)])
    if not any(windows):
        raise DataError("SASRec has nothing to learn from: no user has 2 items in the training part")
    return windows


def _draw_epoch(windows: list[list[np.ndarray]], rng: np.random.Generator) -> list[np.ndarray]:
    """The windows of an epoch in random order."""
    drawn = []
    for own in windows:
        chosen = rng.permutation(len(own))[:_WINDOWS_PER_USER] if len(own) > _WINDOWS_PER_USER else range(len(own))
        drawn.extend(own[i] for i in chosen)
    return [drawn[i] for i in rng.permutation(len(drawn))]


def _batches(drawn: list[np.ndarray], config: SASRecConfig, rng: np.random.Generator) -> Iterator[list[np.ndarray]]:
    """The windows of an epoch, `batch_size` at a time; of like lengths if `similar_lengths`, in random order."""
    starts = list(range(0, len(drawn), config.batch_size))
    if config.similar_lengths:
        drawn = sorted(drawn, key=len)  # stable: equal lengths stay in the random order of the epoch
        starts = [starts[i] for i in rng.permutation(len(starts))]
    for start in starts:
        yield drawn[start : start + config.batch_size]


def _take_last(sequences: Sequence[Sequence[int]]) -> tuple[list[Sequence[int]], list[int]]:
    """Sequences of 3 items or more without their last one, the others empty; and these last items (0 for none)."""
    shorter = [sequence[:-1] if len(sequence) > 2 else sequence[:0] for sequence in sequences]
    if not any(map(len, shorter)):
        raise DataError("sasrec.patience: no user has 3 items in the training part, one of them to validate with")
    return shorter, [sequence[-1] if len(sequence) > 2 else 0 for sequence in sequences]


def _pad(rows: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
    """Rows of items -> [B, L] padded on the right with item 0, and their lengths [B]."""
    lengths = np.array([len(row) for row in rows])
    items = np.zeros((len(rows), lengths.max()), dtype=np.int64)
    items[np.arange(items.shape[1]) < lengths[:, None]] = np.concatenate(rows)
    return torch.from_numpy(items), torch.from_numpy(lengths)


def _check_config(config: SASRecConfig) -> None:
    for name in ("hidden_size", "num_layers", "num_heads", "max_length", "batch_size", "learning_rate"):
        if not getattr(config, name) > 0:
            raise ConfigError(f"sasrec.{name}: {getattr(config, name)} must be above 0")
    for name in ("num_epochs", "patience"):
        if getattr(config, name) < 0:
            raise ConfigError(f"sasrec.{name}: {getattr(config, name)} must not be negative")
    if config.hidden_size % config.num_heads:
        raise ConfigError(f"sasrec.num_heads: {config.num_heads} does not divide hidden_size ({config.hidden_size})")
    if not 0 <= config.dropout < 1:
        raise ConfigError(f"sasrec.dropout: {config.dropout} must be in [0, 1)")
