"""Imports run one way (the contracts in pyproject.toml), and what should answer at once does not wait for torch."""

import subprocess
import sys
from pathlib import Path

import pytest
from importlinter.cli import lint_imports

ROOT = Path(__file__).parents[2]


def test_import_contracts(capsys, monkeypatch):
    # It would set up logging for the whole process and switch off the loggers that other tests listen to.
    monkeypatch.setattr("importlinter.cli._configure_logging", lambda verbose: None)
    code = lint_imports(config_filename=str(ROOT / "pyproject.toml"), no_cache=True)
    assert code == 0, capsys.readouterr().out


@pytest.mark.parametrize(
    "modules", ["coars_fast.config, coars_fast.cli, coars_fast.train", "coars_fast.plots, coars_fast.report"]
)
def test_light_modules_import_no_torch(modules):
    program = f"import sys, {modules}; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 0


def test_kernels_is_no_package():
    assert not (ROOT / "kernels" / "__init__.py").exists(), "it would shadow the Hub's `kernels` package"
