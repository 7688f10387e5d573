import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonargparse import ArgumentParser

from pipeline.config import Config, OptimizerConfig, add_settings, bundled_configs, find_config, parse_config, settings_of
from pipeline.errors import ConfigError

Parse = Callable[..., Config]


def parser_of_a_verb() -> ArgumentParser:
    parser = ArgumentParser(prog="shardline verb", exit_on_error=False)
    add_settings(parser)
    return parser


def parse(*argv: str) -> Config:
    return parse_config(parser_of_a_verb(), list(argv))[0]


@pytest.fixture
def parse_file(tmp_path: Path) -> Parse:
    """A function that parses the text of a configuration file, and options over it."""

    def parse_text(text: str | bytes, *argv: str) -> Config:
        path = tmp_path / "run.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return parse("--config", str(path), *argv)

    return parse_text


# ---- what is refused ----


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("modl: {dropout: 0.3}", r"run\.yaml: unknown key `modl`\. Did you mean `model`\?"),
        ("model: {dropuot: 0.3}", r"unknown key `model\.dropuot`\. Did you mean `model\.dropout`\?"),
        ("data: {augment: {rotate: 3}}", r"`data\.augment\.rotate`\. Did you mean `data\.augment\.rotate_degrees`\?"),
        ("dropout: 0.3", r"unknown key `dropout`\. Did you mean `model\.dropout`\?"),
        ("check: {quilt: 1}", r"unknown key `check\.quilt`\. Known keys here: skip\."),
        ("7: x", r"unknown key `7`"),
    ],
)
def test_an_unknown_key_in_a_file_is_refused_with_the_nearest_known_one(text: str, message: str, parse_file: Parse) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_file(text)


def test_a_dotted_key_in_a_file_is_refused_without_suggesting_itself(parse_file: Parse) -> None:
    with pytest.raises(ConfigError, match=r"unknown key `model\.dropout`") as refusal:
        parse_file("model.dropout: 0.3")
    assert "Did you mean `model.dropout`" not in str(refusal.value)


def test_a_key_given_twice_is_refused_because_one_value_would_be_lost(parse_file: Parse) -> None:
    with pytest.raises(ConfigError, match=r"model"):
        parse_file("model: {dropout: 0.3}\nseed: 1\nmodel: {norm: group}\n")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--modle.dropout", r"unknown option `--modle\.dropout`\. Did you mean `--model\.dropout`\?"),
        ("--model.dropuot=0.3", r"unknown option `--model\.dropuot`\. Did you mean `--model\.dropout`\?"),
        ("--sed", r"unknown option `--sed`\. Did you mean `--seed`\?"),
        ("--model", r"unknown option `--model`"),
    ],
)
def test_an_unknown_option_is_refused_with_the_nearest_known_one(option: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(option, "0.3")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: {dropout: high}", r"run\.yaml: `model\.dropout`: Expected float or null\. Got value: high"),
        ("seed: true", r"`seed`: Expected a int\. Got value: True"),
        ("seed: 1.5", r"`seed`: Expected a int\. Got value: 1\.5"),
        ("data: {drop_last: 3}", r"`data\.drop_last`: Expected a bool"),
        ("model: {channels: [8, wide]}", r"`model\.channels`: Expected a int\. Got value: wide"),
        ("preprocess: {resize: 1.5}", r"`preprocess\.resize`: Expected int, list\[int\] or null\. Got value: 1\.5"),
        (
            "preprocess: {interpolation: cubic}",
            r"`preprocess\.interpolation`: Expected one of .*'bicubic'.* or null\. Got value: cubic",
        ),
        ("model: 3", r"expected `key: value` lines below `model`"),
        ("- seed", r"expected `key: value` lines"),
        ("seed: 1\nmodel: [", r"not valid YAML: .*line 2"),
        (b"name: caf\xe9", r"not valid YAML: .*utf-8"),
    ],
)
def test_a_value_of_the_wrong_type_in_a_file_is_one_line_that_names_it(
    text: str | bytes, message: str, parse_file: Parse
) -> None:
    with pytest.raises(ConfigError, match=message) as refusal:
        parse_file(text)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--model.dropout", "high"], r"`model\.dropout`: Expected float or null\. Got value: high"),
        (["--seed", "1.5"], r"`seed`: Expected a int"),
        (["--seed.x", "1"], r"`seed`: Expected a int"),
        (["--model.dropout"], r"--model\.dropout: expected one argument"),
        (["--data.start_method", "thread"], r"`data\.start_method`: .*'forkserver'.*Got value: thread"),
        (["--optimizer.lr", "nan"], r"`optimizer\.lr`: Expected a float"),
        (["stray"], r"unrecognized arguments: stray"),
    ],
)
def test_a_value_of_the_wrong_type_on_the_command_line_is_one_line_that_names_it(argv: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as refusal:
        parse(*argv)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("data.global_batch_size", "0"),
        ("data.shuffle_shards", "0"),
        ("data.num_workers", "-1"),
        ("data.timeout_seconds", "-1"),
        ("data.augment.horizontal_flip", "1.5"),
        ("data.augment.crop_scale", "0"),
        ("data.augment.translate", "2"),
        ("data.augment.scale", "1"),
        ("data.augment.rotate_degrees", "-10"),
        ("dataset.samples_per_shard", "0"),
        ("dataset.val_fraction", "-0.1"),
        ("dataset.jpeg_quality", "101"),
        ("model.dropout", "1"),
        ("optimizer.lr", "0"),
        ("trainer.max_epochs", "0"),
        ("trainer.gradient_clip_norm", "-1"),
        ("export.opset", "17"),
        ("export.opset", "99"),
        ("export.tolerance", "0"),
        ("export.max_drop", "1"),
        ("export.calibration_images", "0"),
        # Lightning seeds numpy, which takes 32 bits.
        ("seed", "-1"),
        ("seed", "4294967296"),
    ],
)
def test_a_value_that_cannot_work_is_refused_before_anything_starts(key: str, value: str) -> None:
    with pytest.raises(ConfigError, match=rf"`{key}` is {value}"):
        parse(f"--{key}", value)


@pytest.mark.parametrize("license", ["Apache 2.0", "see LICENSE", "-", "https://example.org/licence"])
def test_a_licence_that_is_no_spdx_identifier_is_refused_with_an_example(license: str) -> None:
    with pytest.raises(ConfigError, match=r"`export\.license` is .*; it must be an SPDX identifier .* Apache-2\.0"):
        parse("--export.license", license)


@pytest.mark.parametrize("license", ["", "Apache-2.0", "CC-BY-4.0", "0BSD", "GPL-2.0+", "LicenseRef-Acme"])
def test_a_licence_is_an_spdx_identifier_or_not_stated(license: str) -> None:
    assert parse("--export.license", license).export.license == license


def test_fractions_that_leave_nothing_to_train_on_are_refused() -> None:
    with pytest.raises(ConfigError, match="leave nothing to train on"):
        parse("--dataset.val_fraction", "0.5", "--dataset.test_fraction", "0.5")


@pytest.mark.parametrize("background", ["[0, 0]", "[0, 0, 256]", "[-1, 0, 0]", "[1, 2, 3, 4]"])
def test_a_background_that_is_no_colour_is_refused(background: str) -> None:
    with pytest.raises(ConfigError, match=r"`dataset\.background` is .*; it must be three numbers from 0 to 255"):
        parse("--dataset.background", background)


@pytest.mark.parametrize("name", ["", "..", ".hidden", "a/b", "/tmp/x"])
def test_a_name_that_is_no_plain_folder_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"`name` is '{name}'; it must be a plain folder name"):
        parse("--name", name)


# ---- what is read ----


def test_a_number_in_scientific_notation_without_a_point_is_a_number(parse_file: Parse) -> None:
    # YAML 1.1 reads 1e-3 as text; a text as weight decay would fail hours later, in the optimizer.
    read = parse_file("optimizer: {lr: 1e-3, args: {weight_decay: 5e-4}}").optimizer
    assert read == OptimizerConfig(lr=0.001, args={"weight_decay": 0.0005})
    assert isinstance(read.lr, float)
    assert isinstance(read.args["weight_decay"], float)


def test_an_option_beats_the_file_and_the_file_beats_the_default(parse_file: Parse) -> None:
    text = "model: {dropout: 0.4, norm: group}\npreprocess: {resize: [8, 8], crop: [4, 4]}"
    config = parse_file(text, "--model.dropout", "0.3", "--preprocess.resize", "[6, 7]", "--preprocess.crop=null")
    assert (config.model.dropout, config.preprocess.resize, config.preprocess.crop) == (0.3, [6, 7], None)
    assert config.model.norm == "group"
    assert config.model.convs_per_stage == Config().model.convs_per_stage


def test_one_argument_of_the_optimizer_can_be_changed_without_losing_the_others(parse_file: Parse) -> None:
    text = "optimizer: {args: {momentum: 0.5, nesterov: true}}"
    assert parse_file(text, "--optimizer.args.momentum", "0.8").optimizer.args == {"momentum": 0.8, "nesterov": True}


@pytest.mark.parametrize(("text", "weights"), [("balanced", "balanced"), ("[1, 2.5]", [1.0, 2.5]), ("null", None)])
def test_the_weights_of_a_loss_are_a_word_or_numbers(parse_file: Parse, text: str, weights: object) -> None:
    assert parse_file(f"loss: {{class_weights: {text}}}").loss.class_weights == weights
    assert parse_file("", f"--loss.pos_weight={text}").loss.pos_weight == weights
    with pytest.raises(ConfigError, match=r"loss\.class_weights"):
        parse_file("loss: {class_weights: equal}")


def test_an_empty_file_is_all_defaults(parse_file: Parse) -> None:
    assert parse_file("") == Config()


def test_the_saved_form_of_a_configuration_reads_back_as_the_same_one(parse_file: Parse) -> None:
    config = parse_file(
        "name: café\npreprocess: {resize: 12, crop: [8, 9]}\noptimizer: {lr: 1e-5, args: {betas: [0.9, 0.99]}}\n"
        "trainer: {gradient_clip_norm: 1}\ncheck: {skip: [overfit]}"
    )
    assert parse_file(yaml.safe_dump(config.as_dict())) == config


def test_a_verb_gets_its_own_options_beside_the_configuration() -> None:
    parser = parser_of_a_verb()
    parser.add_argument("--fresh", action="store_true")
    config, rest = parse_config(parser, ["--fresh", "--seed", "7"])
    assert config.seed == 7
    assert dict(rest.items()) == {"fresh": True, "config": "configs/digits.yaml"}


def test_two_configurations_share_no_list() -> None:
    assert Config().model.channels is not Config().model.channels


# ---- where files are found ----


def test_a_bundled_configuration_is_found_by_its_name_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert {"digits", "folder"} <= bundled_configs().keys()
    assert find_config("digits") == find_config("configs/digits.yaml") == bundled_configs()["digits"]


def test_a_file_of_ones_own_comes_before_a_bundled_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits").write_text("seed: 3")
    assert parse("--config", "digits").seed == 3


@pytest.mark.parametrize("path", ["digts", "elsewhere/digits.yaml"])
def test_a_configuration_that_does_not_exist_is_refused_with_the_bundled_ones(path: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"{path}: no such configuration file\..* Bundled ones: .*digits, finetune-alexnet, folder"
    ):
        parse("--config", path)


@pytest.mark.parametrize("name", sorted(bundled_configs()))
def test_every_bundled_configuration_can_be_read(name: str) -> None:
    assert parse("--config", name).name == name


# ---- help and identity ----


def test_every_setting_has_a_help_text_and_an_option() -> None:
    shown = " ".join(parser_of_a_verb().format_help().split())
    for key, _, item in settings_of(Config):
        assert f"--{key} " in shown
        assert item.metadata["help"]
        assert " ".join(item.metadata["help"].split()) in shown


# Where the images lie is not part of it: what they are comes in with the data set's own digest.
CANNOT_CHANGE_THE_WEIGHTS = {
    "name",
    "runs_dir",
    *(key for key, _, _ in settings_of(Config) if key.startswith("dataset.")),
    *(
        f"data.{name}"
        for name in ("decoder", "num_workers", "start_method", "pin_memory", "persistent_workers", "prefetch_factor")
    ),
    *(f"data.{name}" for name in ("timeout_seconds", "max_bad_share", "max_bad_in_row", "cache_dir", "cache_gigabytes")),
    "trainer.checkpoint_every_minutes",
    "trainer.checkpoint_every_steps",
    "trainer.keep_best",
    "trainer.keep_last",
    "trainer.timeout_seconds",
    "trainer.log_every_steps",
    "check.skip",
    "export.license",
    "export.opset",
    "export.tolerance",
    "export.max_batch_size",
    "export.targets",
    *(f"export.{name}" for name in ("precisions", "max_drop", "calibration", "calibration_images")),
    "tracking.max_drop",
    "tracking.model",
    "tracking.uri",
    "tracking.experiment",
}


def changed(section: Any, key: str) -> Any:
    """The same configuration with another value of one setting."""
    first, _, rest = key.partition(".")
    value = getattr(section, first)
    if rest:
        return dataclasses.replace(section, **{first: changed(value, rest)})
    others: dict[type, Any] = {bool: value is not True, int: 77, float: 0.77, str: "other", list: [77], dict: {"other": 77}}
    return dataclasses.replace(section, **{first: others.get(type(value), 77)})


def test_the_identity_of_a_run_changes_with_every_setting_that_can_change_the_weights_and_no_other() -> None:
    keys = {key for key, _, _ in settings_of(Config)}
    same = {key for key in keys if changed(Config(), key).identity() == Config().identity()}
    assert same == CANNOT_CHANGE_THE_WEIGHTS


BAD_ADDRESSES = (
    "garbage",
    "http://",
    "http:/host",
    "ftp://host",
    "file:///mlruns",
    "sqlite:runs.db",
    "sqlite:///",
    "databricks",
)


@pytest.mark.parametrize("uri", BAD_ADDRESSES)
def test_what_is_no_address_of_a_tracking_server_is_refused(uri: str) -> None:
    with pytest.raises(ConfigError, match=rf"`tracking\.uri` is '{uri}'; it must be the address of a tracking server"):
        parse("--tracking.uri", uri)


@pytest.mark.parametrize(
    "uri", ["", "http://host:5000", "https://host/mlflow/", "sqlite:///a b.db", "postgresql://host/mlflow"]
)
def test_addresses_of_servers_and_databases_are_taken(uri: str) -> None:
    assert parse("--tracking.uri", uri).tracking.uri == uri


@pytest.mark.parametrize(
    "uri", ["https://ann:secret@host", "https://ann:secr@et@host", "postgresql+psycopg2://ann:secret@host/db"]
)
def test_a_password_in_the_tracking_address_is_refused_before_a_file_holds_it(uri: str) -> None:
    with pytest.raises(ConfigError, match="MLFLOW_TRACKING_USERNAME") as refusal:
        parse("--tracking.uri", uri)
    assert "secr" not in str(refusal.value)


@pytest.mark.parametrize("name", ["", "  ", "x" * 501])
def test_an_experiment_that_mlflow_would_not_make_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"`tracking\.experiment` is '.*at most 500 letters"):
        parse("--tracking.experiment", name)
