"""Peers: the users most similar to a user, and how many of them took an item.

Similarity is the cosine of SASRec's user embeddings of training parts; peers are drawn from the training users, and
only their training parts are counted, so that no opinion tells what is held out. How CoARS measures q of its Eq. 8 is
not public: this definition is ours.

Shapes: U users asked for, P peers, C items, G training users, H embedding size.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_BLOCK = 256


class Peers:
    """Nearest training users. Found in fixed blocks of users, so that a user's peers do not depend on who else is asked
    about (matrix products of other shapes may round differently)."""

    def __init__(
        self,
        embeddings: np.ndarray,
        train_sequences: Sequence[Sequence[int]],
        train_users: Sequence[int],
        *,
        num_items: int,
        num_peers: int,
    ):
        """
        Args:
            embeddings: [all users, H] float32, of each user's training part.
            train_sequences: training parts of all users.
            train_users: who may be a peer.
            num_items: size of the catalogue.
            num_peers: P; fewer where there are not that many other training users.
        """
        norms = np.linalg.norm(embeddings, axis=1, keepdims=True)
        self._embeddings = embeddings / np.maximum(norms, 1e-12)
        self._pool = np.asarray(train_users, dtype=np.int64)
        self._num_items = num_items
        self.num_peers = max(0, min(num_peers, len(self._pool) - 1))
        lengths = np.array([len(sequence) for sequence in train_sequences])
        users = np.repeat(np.arange(len(train_sequences)), lengths)
        items = np.fromiter((item for sequence in train_sequences for item in sequence), np.int64, int(lengths.sum()))
        self._taken = np.sort(users * num_items + items)  # (user, item) pairs as numbers, to be searched
        self._blocks: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def nearest(self, user: int) -> tuple[np.ndarray, float]:
        """The user's peers [P], nearest first (ties: the lower index), without the user, and q in [-1, 1], their mean
        cosine similarity (0 without peers)."""
        number, row = divmod(user, _BLOCK)
        if number not in self._blocks:
            self._blocks[number] = self._find(np.arange(number * _BLOCK, (number + 1) * _BLOCK))
        peers, similarity = self._blocks[number]
        return peers[row], float(similarity[row])

    def counts(self, peers: np.ndarray, items: Sequence[int]) -> tuple[int, ...]:
        """For each of C items, how many of these peers took it in the training part."""
        if not len(peers):
            return (0,) * len(items)
        wanted = peers[:, None] * self._num_items + np.asarray(items, dtype=np.int64)  # [P, C]
        at = np.minimum(np.searchsorted(self._taken, wanted), len(self._taken) - 1)
        return tuple((self._taken[at] == wanted).sum(axis=0).tolist())

    def _find(self, users: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        users = users[users < len(self._embeddings)]
        if not self.num_peers:
            return np.empty((len(users), 0), dtype=np.int64), np.zeros(len(users))
        similarity = self._embeddings[users] @ self._embeddings[self._pool].T  # [U, G]
        similarity[users[:, None] == self._pool] = -np.inf
        order = np.argsort(-similarity, axis=1, kind="stable")[:, : self.num_peers]
        mean = np.take_along_axis(similarity, order, axis=1).mean(axis=1, dtype=np.float64)
        return self._pool[order], np.clip(mean, -1.0, 1.0)
