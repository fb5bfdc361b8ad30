"""Processes that begin with their imports done.

`python -m coars_fast.train` takes seconds to import what it needs, which is most of a short cell. Here a server process
imports it once and is forked for every cell (multiprocessing's forkserver). The server computes nothing and never asks
for a GPU, so there is no thread and no CUDA context that a fork would break.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing import forkserver
from multiprocessing.context import ForkServerProcess
from pathlib import Path

IMPORTS = (
    "torch._dynamo",  # what AdamW imports when it is made
    "transformers.models.auto.configuration_auto",
    "transformers.models.auto.tokenization_auto",
    "matplotlib.backends.backend_svg",
    "coars_fast.build",
    "coars_fast.cache",
    "coars_fast.evaluate",
    "coars_fast.learn.step",
    "coars_fast.report",
    "coars_fast.resume",
    "coars_fast.summary",
    "coars_fast.train",
    "coars_fast.warm_start",
)
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
"""What cells compute does not depend on how many of them run."""


def start_training(flags: Sequence[str], log: Path) -> ForkServerProcess:
    """`python -m coars_fast.train` with these flags, in one thread and this process's environment and folder.

    What it says is appended to `log`. Ctrl-C does not reach it.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(IMPORTS))
    with _environment(ONE_THREAD):  # read when torch is imported, which is in the server
        forkserver.ensure_running()
        process = context.Process(target=_train, args=(list(flags), log, os.getcwd(), dict(os.environ)))
        process.start()
    return process


def _train(flags: list[str], log: Path, folder: str, environment: dict[str, str]) -> None:
    """In the new process: what `start_training` says."""
    os.setsid()
    with open(os.devnull, "rb") as nothing, open(log, "ab") as output:
        os.dup2(nothing.fileno(), 0)
        for stream in (1, 2):
            os.dup2(output.fileno(), stream)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True, encoding="utf-8")  # type: ignore[union-attr]
    # The server has those of the moment when it began.
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)

    from coars_fast.train import main

    main(flags)


@contextmanager
def _environment(changes: Mapping[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(changes)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
