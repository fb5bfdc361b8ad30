"""What a data set looks like: how popular its items are, and how much its users took. No torch, no window system."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.backends.backend_agg import FigureCanvasAgg

from coars_fast.data.records import Dataset
from coars_fast.errors import ConfigError
from coars_fast.plots import BLUE, ORANGE, STYLE


def draw(before: Dataset, after: Dataset, path: Path) -> Path:
    """Draw both: the whole data set, and what is left of it to play with. Returns where; see :func:`picture_path`.

    Raises:
        ConfigError: nothing can be written there.
    """
    path = picture_path(path)
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(9.6, 3.6), layout="constrained")
        for dataset, color, name in ((before, ORANGE, "in the files"), (after, BLUE, "played with")):
            taken = np.bincount(np.concatenate([np.array(s) for s in dataset.sequences]), minlength=dataset.num_items)
            ranked = np.sort(taken[taken > 0])[::-1]
            left.plot(np.arange(1, len(ranked) + 1), ranked, color=color, label=f"{name}: {len(ranked):,} items")
            lengths = np.array([len(s) for s in dataset.sequences])
            bins = np.geomspace(1, max(2, lengths.max()) + 1, 40)
            right.hist(
                lengths, bins=bins, color=color, histtype="step", linewidth=1.8, label=f"{name}: {len(lengths):,} users"
            )
        left.set(xscale="log", yscale="log", xlabel="Items, most popular first", ylabel="Interactions")
        left.set_title("Popularity")
        right.set(xscale="log", xlabel="Interactions of a user", ylabel="Users")
        right.set_title("History lengths")
        for axes in (left, right):
            axes.legend()
        figure.suptitle(after.name)
        try:
            figure.savefig(path)
        except OSError as error:
            raise ConfigError(f"--plot: {path} cannot be written ({error.strerror}); give another file") from error
        finally:
            plt.close(figure)
    return path


def picture_path(path: Path) -> Path:
    """Where a picture named so is written: a PNG file, unless its name ends in another format that matplotlib writes.

    Raises:
        ConfigError: a folder, in a folder that is not there, or of an unknown format.
    """
    if path.is_dir():
        raise ConfigError(f"--plot: {path} is a folder; give the name of a file")
    if not path.parent.is_dir():
        raise ConfigError(f"--plot: {path}: no folder {path.parent}; make it, or give another file")
    known = FigureCanvasAgg.get_supported_filetypes()
    if path.suffix and path.suffix[1:].lower() not in known:
        raise ConfigError(f"--plot: {path}: no such format; known are {', '.join(sorted(known))}")
    return path if path.suffix else path.with_name(f"{path.name}.png")
