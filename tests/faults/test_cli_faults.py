"""Wrong settings: the answer names the file, the key and what would have been right."""

import math
from dataclasses import is_dataclass, replace
from typing import get_args, get_type_hints

import pytest

from coars_fast import cli
from coars_fast.config import Config, SFTConfig
from coars_fast.config_checks import check
from coars_fast.errors import CoarsError, ConfigError


def preset_error(tmp_path, text: str) -> str:
    path = tmp_path / "wrong.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        cli.parse_config(["--preset", str(path)])
    assert str(path) in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[train]\nnum_stepz = 1\n", ["train.num_stepz", "no such setting", "nearest: train.num_steps"]),
        ("[train]\nnum-steps = 1\n", ["train.num-steps", "nearest: train.num_steps"]),
        ("num_steps = 1\n", ["num_steps", "train.num_steps", "sft.num_steps"]),
        ("[trian]\nseed = 1\n", ["trian", "no such setting"]),
        ("qqqq = 1\n", ["--help"]),
        ('[train]\nnum_steps = "3"\n', ["train.num_steps", "expected int", "'3'"]),
        ("[train]\nnum_steps = 3.5\n", ["train.num_steps", "expected int", "3.5"]),
        ("[train]\nnum_steps = true\n", ["train.num_steps", "expected int", "True"]),
        ("[train]\nlearning_rate = true\n", ["train.learning_rate", "expected float"]),
        ("warm_start = 1\n", ["warm_start", "expected bool"]),
        ("[data]\npath = 3\n", ["data.path", "expected str or nothing"]),
        ('objective = "ppo"\n', ["objective", "expected one of 'faithful', 'clipped'", "'ppo'"]),
        ("train = 3\n", ["train", "expected a table [train]"]),
        ("[seed]\nx = 1\n", ["seed", "expected int"]),
        ('preset = "cpu_tiny"\n', ["preset", "cannot name another"]),
        ("a = = 1\n", ["not a TOML file", "line 1"]),
    ],
)
def test_a_wrong_preset_file(tmp_path, text, expected):
    message = preset_error(tmp_path, text)
    for part in expected:
        assert part in message


def test_a_preset_that_is_not_text(tmp_path):
    path = tmp_path / "wrong.toml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not a TOML file"):
        cli.load_preset(str(path))


def test_an_unknown_preset_lists_the_known_ones(tmp_path):
    for name in ("nope", str(tmp_path), "../presets/cpu_tiny"):
        with pytest.raises(ConfigError, match="cpu_tiny, movielens_cpu, qwen3_0p6b, qwen3_8b"):
            cli.parse_config(["--preset", name])


@pytest.mark.parametrize(
    "argv", [["--train.num-stepz", "1"], ["--train.num-steps", "x"], ["--objective", "ppo"], ["--preset"], ["word"]]
)
def test_a_wrong_flag_exits_with_2(argv, capsys):
    with pytest.raises(SystemExit) as exit_info:
        cli.parse_config(argv)
    assert exit_info.value.code == 2
    captured = capsys.readouterr()
    assert captured.err and not captured.out


def test_a_setting_out_of_range_is_refused_before_any_work():
    with pytest.raises(CoarsError, match="train.learning_rate: -1.0 must be above 0"):
        cli.parse_config(["--train.learning-rate", "-1"])


def with_setting(name: str, value: float) -> Config:
    section, _, last = name.rpartition(".")
    if not section:
        return replace(Config(), **{last: value})
    return replace(Config(), **{section: replace(getattr(Config(), section), **{last: value})})


def numbers(kind: type) -> list[str]:
    """Names of the settings of this type, `float | None` included."""
    sections = {"": Config(), **{name: value for name, value in vars(Config()).items() if is_dataclass(value)}}
    return [
        f"{section}.{name}".lstrip(".")
        for section, settings in sections.items()
        for name, hint in get_type_hints(type(settings)).items()
        if kind in (hint, *get_args(hint))
    ]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_every_setting_refuses_numbers_that_are_not_finite(value):
    assert {"loss.dual_clip", "loss.credit_weight", "train.learning_rate"} <= set(numbers(float))
    for name in numbers(float):
        with pytest.raises(ConfigError, match=f"^{name}: {value} is not a finite number"):
            check(with_setting(name, value))


def test_no_number_may_be_negative():
    assert {"seed", "sft.batch_size", "eval.num_samples"} <= set(numbers(int))
    for name in numbers(int) + numbers(float):
        with pytest.raises(ConfigError, match=f"^{name}: "):
            check(with_setting(name, -1))


@pytest.mark.parametrize(
    "name",
    [
        "sft.num_steps",
        "sft.finding_steps",
        "train.warmup_steps",
        "game.memory",
        "eval.num_samples",
        "eval.num_disc_users",
        "data.min_item_interactions",
    ],  # fmt: skip
)
def test_what_can_be_left_out_may_be_zero(name):
    check(with_setting(name, 0))


def test_finding_takes_at_most_all_steps_of_the_warm_start_and_trains_the_base():
    def config(finding_steps, num_steps, trainable="all"):
        sft = SFTConfig(finding_steps=finding_steps, num_steps=num_steps, trainable=trainable)
        return replace(Config(), sft=sft)

    for fits in ((0, 0), (0, 5), (4, 5), (5, 5), (0, 5, "adapters")):
        check(config(*fits))
    with pytest.raises(ConfigError, match=r"^sft.finding_steps: 6 .*sft.num_steps \(5\)"):
        check(config(6, 5))
    with pytest.raises(ConfigError, match="^sft.finding_steps: -1 must not be negative"):
        check(config(-1, 5))
    with pytest.raises(ConfigError, match="^sft.finding_steps: .*--sft.trainable all, or 0 steps"):
        check(config(1, 5, "adapters"))


def test_a_config_file_of_another_version():
    with pytest.raises(ConfigError, match="run/config.json: train.gone: no such setting"):
        cli.config_from_dict({"train": {"gone": 1}}, "run/config.json")
