"""One random state for every test, so that a test fails alone exactly as it fails among others."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
