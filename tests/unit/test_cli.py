"""The command line: what wins over what, what `--help` says, and how a wrong setting is answered."""

import dataclasses
import json
import os
import re
import subprocess
import sys
import typing

import pytest

from coars_fast import cli
from coars_fast.config import Config, TrainConfig
from coars_fast.config_checks import check
from coars_fast.errors import ConfigError, RunFolderError


def help_text(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """What `--help` prints, without boxes and line breaks."""
    with pytest.raises(SystemExit) as exit_info:
        cli.parse_config([*argv, "--help"])
    assert exit_info.value.code == 0
    return " ".join(re.sub(r"[│╭╮╰╯─]", " ", capsys.readouterr().out).split())


def all_docs(cls: type) -> dict[str, str]:
    docs = {}
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[field.name]):
            docs.update(all_docs(hints[field.name]))  # type: ignore[arg-type]
        else:
            docs[f"{cls.__name__}.{field.name}"] = cli.field_docs(cls).get(field.name, "")
    return docs


def test_no_arguments_are_the_defaults():
    assert cli.parse_config([]) == Config()


def test_flags_win_over_the_preset_and_the_preset_over_the_defaults():
    flags = ["--data.path", "ml", "--data.history-length", "3", "--train.num-steps", "7"]
    config = cli.parse_config(["--preset=movielens_cpu", *flags])
    assert config.preset == "movielens_cpu"
    assert (config.data.candidates, config.model.tokenizer, config.warm_start) == ("random19+gt", "catalogue", True)
    assert (config.data.history_length, config.train.num_steps) == (3, 7)
    assert config.data.min_item_interactions > 0 and 0 < config.sft.finding_steps < config.sft.num_steps
    assert config.sasrec == Config().sasrec


def test_public_flags():
    config = cli.parse_config(
        "--preset cpu_tiny --out o --data.path d --model.path m --train.num-steps 2 --checkpoint.every 3 --resume auto "
        "--seed 4 --objective faithful --no-warm-start --loss.credit-center True --eval.every 0".split()
    )
    assert (config.out, config.data.path, config.model.path, config.train.num_steps) == ("o", "d", "m", 2)
    assert (config.checkpoint.every, config.resume, config.seed, config.objective) == (3, "auto", 4, "faithful")
    assert (config.warm_start, config.loss.credit_center, config.eval.every) == (False, True, 0)


def test_the_last_preset_flag_counts_and_may_be_a_path(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text("seed = 3\n[train]\nlearning_rate = 1\nnum_steps = 5\n[loss]\ndual_clip = 3.0\n")
    config = cli.parse_config(["--preset", "movielens_cpu", "--preset", str(path)])
    assert (config.seed, config.train.num_steps, config.loss.dual_clip) == (3, 5, 3.0)
    assert config.train.learning_rate == 1.0 and type(config.train.learning_rate) is float
    assert not config.warm_start


@pytest.mark.parametrize("name", cli.presets())
def test_every_preset_loads_and_passes_the_check(name):
    config = cli.load_preset(name)
    path = "ml-latest-small" if config.data.format == "movielens" else None
    check(dataclasses.replace(config, data=dataclasses.replace(config.data, path=path)))
    assert len(cli.presets()[name]) > 20, "a preset's first line says what it is"


def test_help_explains_every_field_and_lists_the_presets(capsys):
    text = help_text(capsys)
    for field, doc in all_docs(Config).items():
        assert doc, f"{field} has no docstring"
        # A hyphen at the end of a printed line is a line break that we cannot see; compare without white space.
        assert doc.replace(" ", "") in text.replace(" ", ""), field
    for name in cli.presets():
        assert f"- {name}:" in text
    for setting in cli.setting_names(Config):
        assert "--" + setting.replace("_", "-") in text


def test_help_shows_the_values_of_the_preset(capsys):
    assert "(default: random19+gt)" in help_text(capsys, "--preset", "movielens_cpu")


def test_dictionary_roundtrip_through_json():
    config = cli.parse_config(["--preset", "qwen3_8b", "--loss.dual-clip", "2", "--data.path", "x"])
    table = json.loads(json.dumps(cli.config_to_dict(config)))
    assert cli.config_from_dict(table) == config
    del table["train"]["learning_rate"]
    assert cli.config_from_dict(table).train.learning_rate == TrainConfig().learning_rate


def test_a_dataclass_of_another_program():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Options:
        """Evaluate a run."""

        run: str
        """Its folder."""
        num_users: int = 5
        """How many."""

    options = cli.parse(Options, ["--run", "r", "--num-users", "6"], "python -m coars_fast.evaluate")
    assert options == Options(run="r", num_users=6)
    with pytest.raises(SystemExit) as exit_info:
        cli.parse(Options, [], "python -m coars_fast.evaluate")
    assert exit_info.value.code == 2


def test_main_guard(capsys):
    @cli.main_guard
    def main(error: BaseException | None) -> int:
        if error:
            raise error
        return 3

    assert main(None) == 3
    for error, code, line in [
        (ConfigError("seed: bad"), 2, "error: seed: bad\n"),
        (RunFolderError("runs/x: in\nuse"), 2, "error: runs/x: in use\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ]:
        with pytest.raises(SystemExit) as exit_info:
            main(error)
        assert exit_info.value.code == code
        assert capsys.readouterr().err == line
    with pytest.raises(ZeroDivisionError):
        main(ZeroDivisionError())


def test_help_in_a_process_of_its_own():
    program = "from coars_fast import cli; cli.main_guard(cli.parse_config)(['--help'])"
    environment = {**os.environ, "COLUMNS": "80"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True)
    assert "--train.num-steps INT" in done.stdout and not done.stderr


def test_an_error_cannot_steer_a_terminal(capsys):
    @cli.main_guard
    def fails():
        raise ConfigError("item \x1b[31mred\x07 \u202eleft\n is no item of Amélie’s")

    with pytest.raises(SystemExit) as exit_status:
        fails()
    said = capsys.readouterr().err
    assert exit_status.value.code == 2 and said == "error: item \\x1b[31mred\\x07 \\u202eleft is no item of Amélie’s\n"
