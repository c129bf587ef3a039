import dataclasses
import re

import pytest
import yaml

from evit_training.arguments import PARTS, RECIPES, SETTINGS, parse_train_arguments, recipe_path


RECIPE_FILES = sorted(RECIPES.glob("*.yaml"))


def refusal(argv, capsys):
    """What `evit train` says when it refuses to start."""
    with pytest.raises(SystemExit) as exit_:
        parse_train_arguments(argv)
    assert exit_.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("path", RECIPE_FILES, ids=lambda path: path.stem)
def test_every_recipe_parses_and_names_its_command(path):
    arguments = parse_train_arguments([path.stem])
    for name, value in yaml.safe_load(path.read_text()).items():
        parsed = arguments.as_dict()[name]
        expected = value if isinstance(parsed, list) == isinstance(value, list) else [value]
        assert parsed == pytest.approx(expected) if isinstance(parsed, float) else parsed == expected
    header = path.read_text().split("\n\n")[0]
    for line in ("# Command:", "# Hardware:", "# Expected:", "# Run here:"):
        assert line in header


def test_there_are_recipes():
    paper = {f"paper_{name}" for name in ("scratch", "finetune", "oracle", "high_resolution", "lvvit")}
    assert {path.stem for path in RECIPE_FILES} == {"digits", "cifar10", *paper}


def test_flags_win_over_the_recipe():
    arguments = parse_train_arguments(
        ["digits", "--epochs", "3", "--keep-rate", "0.9", "0.8", "0.7", "--keep_rate", "0.5"]
    )
    assert arguments.optimization.epochs == 3
    assert arguments.keep_rate == 0.5
    assert arguments.model.hidden_size == 64  # the recipe's


def test_one_keep_rate_is_a_number_and_several_a_list():
    assert parse_train_arguments([]).keep_rate == 0.7
    assert parse_train_arguments(["--keep_rate", "0.9", "0.8", "0.7"]).keep_rate == [0.9, 0.8, 0.7]


def test_a_recipe_can_be_any_file(tmp_path, capsys):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        "epochs: 2\nlearning_rate: 1e-3\nfuse_inattentive_tokens: no\nkeep_rate: [0.9, 0.8, 0.7]\nmodel:\n"
    )
    arguments = parse_train_arguments([str(recipe)])
    assert arguments.optimization.learning_rate == 0.001  # YAML itself reads 1e-3 as a string
    assert arguments.model.inattentive_tokens == "dropped"
    assert arguments.keep_rate == [0.9, 0.8, 0.7]
    assert arguments.model.model is None
    assert "mine.yaml:3`: `fuse_inattentive_tokens` is `inattentive_tokens: dropped` now" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["mixed_precision: no", "mixed_precision: 'no'"])
def test_words_of_a_recipe_are_read_as_the_file_spells_them(text, tmp_path):
    """YAML takes `no` for False and 007 for 7."""
    (tmp_path / "mine.yaml").write_text(f"{text}\neval_split: 007\ndrop_last: no\n")
    arguments = parse_train_arguments([str(tmp_path / "mine.yaml")])
    assert arguments.run.mixed_precision == "no"
    assert arguments.data.eval_split == "007"
    assert arguments.optimization.drop_last is False


def test_written_settings_are_a_recipe_again(tmp_path):
    arguments = parse_train_arguments(["digits", "--max_steps", "7"])
    path = tmp_path / "arguments.yaml"
    path.write_text(yaml.safe_dump(arguments.as_dict()))
    assert parse_train_arguments([str(path)]) == arguments


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("epochs: 1\nkeep_rat: 0.5", "bad.yaml:2` has an unknown setting `keep_rat`: did you mean `keep_rate`?"),
        ("- 1\n- 2", "must hold `name: value` lines, got a list"),
        ("a: [", "is not YAML"),
        ("epochs: many", "invalid int value: 'many'"),
        ("crop: square", "invalid choice: 'square'"),
        ("epochs: 3\nlearning_rate: 1e-", "invalid float value: '1e-'"),  # half of a file
        ("label_smoothing: 7", "`--label-smoothing` must be"),
    ],
)
def test_bad_recipes_are_refused(text, sentence, tmp_path, capsys):
    recipe = tmp_path / "bad.yaml"
    recipe.write_text(text)
    said = refusal([str(recipe)], capsys)
    assert sentence in said
    assert "bad.yaml" in said


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--keep_rat", "0.5"], "unknown flag `--keep-rat`: did you mean `--keep-rate`?"),
        (["--learning-rat", "0.5"], "unknown flag `--learning-rat`: did you mean `--learning-rate`?"),
        (["--epochs", "0"], "`--epochs` must be at least 1, got 0"),
        (["--max_steps", "0"], "`--max-steps` must be at least 1, got 0. Leave it out for no limit."),
        (["--horizontal_flip", "2"], "`--horizontal-flip` must be in [0, 1], got 2.0"),
        (["--weight_decay", "-1"], "`--weight-decay` must be 0 or more, got -1.0"),
        (["--keep_checkpoints", "1"], "`--keep-checkpoints` must be at least 2"),
        (["--match_macs_of", "224", "--keep_rate", "0.5"], "`--match-macs-of` chooses the keep rate"),
        (["--keep_rate_range", "0.9", "0.5"], "must be two rates in (0, 1], the lower one first"),
        (["--mix_token", "1", "--mixup", "0.8"], "`--mix-token` mixes images already"),
        (["--oracle", "initial"], "`--oracle initial` takes the weights of `--model`, which is missing"),
        (["--teacher", "initial"], "`--teacher initial` takes the weights of `--model`, which is missing"),
        (["--no_fuse_inattentive_tokens"], "is `--inattentive-tokens fused|dropped` now"),
        (["--keep-rate", "1.5"], "`--keep-rate` must be in (0, 1], got 1.5"),
        (["--compare-keep-rates", "0.5", "0"], "`--compare-keep-rates` must be in (0, 1], got 0.0"),
        (["--learning-rate", "nan"], "`--learning-rate` must be 0 or more, got nan"),
        (["--learning-rate", "-1e-3"], "`--learning-rate` must be 0 or more, got -0.001"),
        (["--learning-rate", "-.5"], "`--learning-rate` must be 0 or more, got -0.5"),
        (["--learning-rate", "-inf"], "`--learning-rate` must be 0 or more, got -inf"),
        (["digits", "cifar10"], "`cifar10` is one word too many"),
        (["--streaming"], "say with `--max-steps` how long to train"),
        (["--model", "a", "--preset", "b"], "`--model` and `--preset` both name the model"),
        (
            ["no_such_recipe"],
            "There is no recipe `no_such_recipe`: give the path of a YAML file, or one of cifar10, d",
        ),
    ],
)
def test_bad_flags_are_refused(flags, sentence, capsys):
    assert sentence in refusal(flags, capsys)


def test_every_setting_has_a_help_text_and_one_name():
    fields = [field for part in PARTS for field in dataclasses.fields(part)]
    assert all(field.metadata["help"].endswith(".") for field in fields)
    assert len({field.name for field in fields}) == len(fields)


def test_packaged_recipes_are_found_by_name():
    assert recipe_path("digits") == RECIPES / "digits.yaml"


def test_help_is_grouped_names_each_flag_once_and_lists_the_recipes(capsys):
    with pytest.raises(SystemExit, match="0"):
        parse_train_arguments(["--help"])
    text = capsys.readouterr().out
    flags = re.findall(r"^  (--[\w-]+)", text, re.MULTILINE)
    assert flags == [f"--{name.replace('_', '-')}" for name in SETTINGS]
    assert "--no-" not in text
    assert text.count("evit train") == 1
    assert "paper_lvvit" in text
    for title in ("Which images to train and to evaluate on:", "How long and how fast to train:"):
        assert title in text
