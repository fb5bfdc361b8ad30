"""A teacher of other weights than the student's: the adapters as they were at first, or their moving average.

The default teacher is the student itself given the reference, and shares its keys and values. These cannot: their
contexts are computed again for every turn, which the log says once. Their adapters are kept beside the model (a few
megabytes) and take the place of the student's for as long as the teacher computes, which must be before the student
does: a graph that waits for its backward pass needs the weights that it was made with.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from coars_fast.config import LossConfig
from coars_fast.errors import RunFolderError
from coars_fast.model.decoder import Decoder
from coars_fast.model.lora import adapter_parameters

log = logging.getLogger(__name__)


class OtherTeacher:
    """Adapters of a teacher.

    Args:
        decoder: whose adapters are taken as they are now.
        kind: `initial` or `ema`.
        decay: share of the average that is left after an update; for `ema`.
    """

    def __init__(self, decoder: Decoder, kind: str, decay: float) -> None:
        self.student = {n: p for agent in range(2) for n, p in adapter_parameters(decoder, agent).items()}
        self.adapters = {name: p.detach().clone() for name, p in self.student.items()}
        self.decay = decay if kind == "ema" else 1.0
        log.info(
            "teacher weights %r share no keys and values with the student: every turn's context is computed again, "
            "about 4 to 7 times the teacher's tokens at usual lengths",
            kind,
        )

    @torch.no_grad()
    def follow(self) -> None:
        """After an update of the student."""
        if self.decay < 1.0:
            for name, adapter in self.adapters.items():
                adapter.lerp_(self.student[name], 1.0 - self.decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The decoder computes with the teacher's adapters."""
        own = {name: p.detach().clone() for name, p in self.student.items()}
        self._put(self.adapters)
        try:
            yield
        finally:
            self._put(own)

    @torch.no_grad()
    def _put(self, values: Mapping[str, Tensor]) -> None:
        for name, parameter in self.student.items():
            parameter.copy_(values[name])

    def load(self, adapters: Mapping[str, Tensor] | None, source: str) -> None:
        """Put back what a checkpoint holds.

        Raises:
            RunFolderError: it holds no teacher, or one of another model.
        """
        if adapters is None or {n: t.shape for n, t in adapters.items()} != {
            n: t.shape for n, t in self.adapters.items()
        }:
            raise RunFolderError(f"{source}: no teacher of this model; was the run begun with another loss.teacher?")
        for name, adapter in self.adapters.items():
            adapter.copy_(adapters[name])


def make_teacher(decoder: Decoder, loss: LossConfig) -> OtherTeacher | None:
    """The teacher that the settings ask for; None: the student itself, or nobody."""
    if loss.teacher == "current" or not loss.credit_weight:
        return None
    return OtherTeacher(decoder, loss.teacher, loss.teacher_decay)
