"""What a person types, and what they get back."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdsr.cli import parse
from kdsr.config import DistillConfig, EvaluateConfig, ShardConfig, UpscaleConfig
from kdsr.errors import RequestError
from kdsr.spec import TrainableSpec

FOLDERS = ("--input", "photos", "--output", "shards")
KINDS = [spec.model_fields["kind"].default for spec in get_args(get_args(TrainableSpec)[0])]
UPSCALE = ("--input", "photos", "--output", "large", "--model", "photo-x4")

DISTILL = """
name: first
output: runs
data: {shards: shards}
student: {kind: rep_chain, scale: 4, num_features: 32, num_layers: 6}
teacher: {uri: edsr-x4}
optimizer: {learning_rate: 5e-4}
terms:
  - {kind: pixel, loss: mse}
  - {kind: output, weight: 0.5, final_weight: 0.1}
"""


@pytest.fixture
def distill(tmp_path):
    """Path of a YAML file that DistillConfig accepts."""
    return write(tmp_path, DISTILL)


def write(folder: Path, text: str) -> str:
    path = folder / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def refusal(config_class, *argv) -> str:
    with pytest.raises(RequestError) as caught:
        parse(config_class, argv)
    return str(caught.value)


# ---------------------------------------------------------------- files and flags


def test_flags_win_over_the_file_wherever_they_stand(distill):
    before = parse(DistillConfig, ["--name", "second", "--config", distill])
    after = parse(DistillConfig, ["--config", distill, "--name=second"])
    assert before == after
    assert after.name == "second"


def test_a_flag_leaves_the_other_fields_of_its_section_as_the_file_has_them(distill):
    config = parse(DistillConfig, ["--config", distill, "--student.num_features", "16"])
    assert (config.student.num_features, config.student.num_layers) == (16, 6)


def test_a_list_of_terms_in_the_file_keeps_its_order_and_kinds(distill):
    terms = parse(DistillConfig, ["--config", distill]).terms
    assert [(term.kind, term.weight, term.loss) for term in terms] == [
        ("pixel", 1.0, "mse"),
        ("output", 0.5, "l1"),
    ]


def test_a_list_of_terms_by_flag_replaces_that_of_the_file(distill):
    config = parse(
        DistillConfig, ["--config", distill, "--terms", "{kind: pixel}", "--terms", "[{kind: output}]"]
    )
    assert [term.kind for term in config.terms] == ["pixel", "output"]
    assert config.terms[0].loss == "l1"


def test_a_number_with_an_exponent_is_a_number_in_the_file_and_as_a_flag(distill):
    assert parse(DistillConfig, ["--config", distill]).optimizer.learning_rate == 5e-4
    config = parse(DistillConfig, ["--config", distill, "--optimizer.learning_rate", "1e-5"])
    assert config.optimizer.learning_rate == 1e-5


def test_a_pair_of_numbers_by_flag(distill):
    config = parse(DistillConfig, ["--config", distill, "--optimizer.betas", "0.8,0.95"])
    assert config.optimizer.betas == (0.8, 0.95)


def test_a_choice_of_integers_by_flag():
    assert parse(UpscaleConfig, [*UPSCALE, "--scale", "4"]).scale == 4


@pytest.mark.parametrize("text", ["none", "None", "null"])
def test_an_optional_field_can_be_unset_by_flag(distill, text):
    argv = ["--config", distill, "--optimizer.clip_norm", "1.5", "--optimizer.clip_norm", text]
    assert parse(DistillConfig, argv).optimizer.clip_norm is None


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], False),
        (["--cluster.use_gpu"], True),
        (["--cluster.use_gpu", "true"], True),
        (["--cluster.use_gpu=false"], False),
        (["--no-cluster.use_gpu"], False),
        (["--cluster.use_gpu", "--no-cluster.use_gpu"], False),
        (["--no-cluster.use_gpu", "--cluster.use_gpu"], True),
    ],
)
def test_booleans_mean_what_they_say_and_the_last_one_wins(argv, expected):
    assert parse(ShardConfig, [*argv, *FOLDERS]).cluster.use_gpu is expected


def test_repeated_flags_add_up_and_commas_belong_to_the_path():
    argv = ["--model", "photo-x4", "--model=edsr-x4", "--benchmark", "Set5, small", "--output", "out"]
    config = parse(EvaluateConfig, argv)
    assert config.model == ("photo-x4", "edsr-x4")
    assert [Path(uri).name for uri in config.benchmark] == ["Set5, small"]


def test_every_flag_may_be_spelt_with_hyphens():
    argv = ["--dry-run", "--max-bytes", "9", "--encode.png-level=3", "--no-retry-failed", "--no_verify"]
    config = parse(UpscaleConfig, [*UPSCALE, *argv])
    assert (config.dry_run, config.max_bytes, config.encode.png_level) == (True, 9, 3)
    assert (config.retry_failed, config.verify) == (False, False)


def test_hyphens_of_a_value_stay():
    assert parse(UpscaleConfig, [*UPSCALE, "--suffix=-x-4"]).suffix == "-x-4"
    assert parse(UpscaleConfig, [*UPSCALE, "--include", "a-b"]).include == ("a-b",)


def test_familiar_flags_of_another_program_are_understood():
    typed = shlex.split("-i photos -o large -n photo-x4 -s 2 -t 128 --suffix _x2 --ext jpg")
    flags = ["--scale", "2", "--tile_size", "128", "--suffix", "_x2", "--format", "jpeg"]
    assert parse(UpscaleConfig, typed) == parse(UpscaleConfig, [*UPSCALE, *flags])


@pytest.mark.parametrize("argv", [["-s2"], ["-s=2"], ["--outscale", "2"], ["-s", "3", "--scale", "2"]])
def test_a_short_flag_takes_its_value_in_every_usual_way(argv):
    assert parse(UpscaleConfig, [*UPSCALE, *argv]).scale == 2


@pytest.mark.parametrize(("text", "expected"), [("auto", None), ("TIF", "tiff"), (".png", "png")])
def test_an_extension_names_a_format(text, expected):
    assert parse(UpscaleConfig, [*UPSCALE, "--ext", text]).format == expected


@pytest.mark.parametrize("text", ["a/b", "/", "line\nbreak"])
def test_a_suffix_stays_within_a_name(text):
    assert "suffix: expected a part of a name" in refusal(UpscaleConfig, *UPSCALE, f"--suffix={text}")


def test_a_tile_of_0_is_chosen_by_the_network_and_a_tiny_one_is_refused():
    assert parse(UpscaleConfig, [*UPSCALE, "-t", "0"]).tile_size is None
    assert "tile_size: " in refusal(UpscaleConfig, *UPSCALE, "-t", "8")


@given(st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1))
def test_any_text_reaches_a_text_field_unchanged(text):
    assert parse(ShardConfig, [*FOLDERS, f"--domain={text}"]).domain == text


def test_environment_variables_fill_no_field(monkeypatch):
    for name in ("DOMAIN", "domain", "NAME", "STORE__REGION", "store.region", "INPUT"):
        monkeypatch.setenv(name, "from-the-environment")
    config = parse(ShardConfig, FOLDERS)
    assert (config.domain, config.store.region) == ("photo", None)
    assert "input: required" in refusal(ShardConfig, "--output", "shards")


# ---------------------------------------------------------------- unions


def test_a_flag_switches_the_kind_and_drops_what_only_the_old_kind_has(distill):
    argv = ["--config", distill, "--student.kind", "edsr", "--student.num_blocks", "3"]
    student = parse(DistillConfig, argv).student
    assert (student.kind, student.num_blocks, student.num_features, student.scale) == ("edsr", 3, 32, 4)


def test_switching_the_kind_does_not_hide_a_misspelt_field(tmp_path):
    path = write(tmp_path, DISTILL.replace("num_layers", "num_layerz"))
    assert "student.num_layerz: no such field" in refusal(
        DistillConfig, "--config", path, "--student.kind", "edsr"
    )


def test_a_kind_by_flag_takes_the_defaults_of_that_kind(distill):
    config = parse(DistillConfig, ["--config", distill, "--data.degradation.kind", "real_world"])
    assert [step.kind for step in config.data.degradation.steps] == ["blur", "resize", "noise", "jpeg"]


def test_an_unknown_kind_is_answered_with_the_known_ones(distill):
    text = refusal(DistillConfig, "--config", distill, "--student.kind", "edsr2")
    assert text == f"student.kind: 'edsr2' is not one of {', '.join(KINDS)}"


def test_a_missing_kind_is_answered_with_the_known_ones(tmp_path):
    path = write(tmp_path, DISTILL.replace("kind: rep_chain, ", ""))
    assert "student.kind: required; one of edsr, rep_chain" in refusal(DistillConfig, "--config", path)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("--domian", "--domain"),
        ("--store.endpoint-urls", "--store.endpoint_url"),
        ("-domain", "--domain"),
        ("--workers=2", "--cluster.num_workers"),
        ("--no-use_gpus", "--no-cluster.use_gpu"),
        ("--cluster.num_worker=2", "--cluster.num_workers"),
        ("--endpoint_url", "--store.endpoint_url"),
    ],
)
def test_a_misspelt_flag_is_answered_with_the_nearest(wrong, right):
    assert refusal(ShardConfig, *FOLDERS, wrong).endswith(f"did you mean {right}?")


@pytest.mark.parametrize(
    ("wrong", "right", "sentence"),
    [
        ("num_layers:", "num_layer:", "student.num_layer: no such field; did you mean num_layers?"),
        ("final_weight:", "finalweight:", "terms.1.finalweight: no such field; did you mean final_weight?"),
        ("optimizer:", "optimiser:", "optimiser: no such field; did you mean optimizer?"),
        ("shards:", "shard:", "data.shard: no such field; did you mean shards?"),
    ],
)
def test_a_misspelt_field_in_the_file_is_answered_with_the_nearest_of_its_section(
    tmp_path, wrong, right, sentence
):
    assert sentence in refusal(DistillConfig, "--config", write(tmp_path, DISTILL.replace(wrong, right)))


def test_every_wrong_field_is_named_at_once():
    text = refusal(ShardConfig, "--output", "ftp://host/x", "--sub_image_size", "8", "--min_size", "large")
    assert text.startswith("input: required")
    for path in (
        "output: unknown scheme ftp://",
        "sub_image_size: ",
        "(found 8)",
        "min_size: ",
        "(found 'large')",
    ):
        assert path in text


def test_a_missing_section_names_its_flags():
    assert "data: required; give it in the YAML file or as --data.*" in refusal(DistillConfig, "--name", "a")


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--min_size"], "argument --min_size: expected one argument"),
        (["photos"], "unrecognized arguments: photos"),
        (["-i", "photos"], "unknown flag -i; a value that begins with a hyphen is given as --FLAG=-i"),
        (["--config"], "argument --config: expected one argument"),
        (["--config", "no/such.yaml"], "config no/such.yaml: No such file or directory"),
        (["--config", "."], "config .: Is a directory"),
        (["--config", "a.yaml", "--config", "b.yaml"], "--config may be given once, found a.yaml and b.yaml"),
    ],
)
def test_a_wrong_command_line_is_one_sentence(argv, sentence):
    text = refusal(ShardConfig, *FOLDERS, *argv)
    assert text.startswith(sentence)
    assert "\n" not in text


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("- a\n- b\n", "expected fields with names at the top"),
        ("just text", "expected fields with names at the top"),
        ("input: [unclosed", "is not valid YAML"),
        ("input: !!python/object/apply:os.getcwd []", "is not valid YAML"),
        ("cluster: 3", "cluster: "),
    ],
)
def test_a_wrong_file_is_one_sentence(tmp_path, content, sentence):
    text = refusal(ShardConfig, "--config", write(tmp_path, content))
    assert sentence in text
    assert "\n" not in text


def test_a_flag_into_a_section_that_the_file_has_as_a_value_is_refused(tmp_path):
    path = write(tmp_path, "cluster: 3")
    assert "cluster in the YAML file is 3, not a section" in refusal(
        ShardConfig, "--config", path, "--cluster.num_workers", "2"
    )


def test_an_empty_section_in_the_file_takes_flags(tmp_path):
    path = write(tmp_path, "store:\n")
    assert (
        parse(ShardConfig, ["--config", path, *FOLDERS, "--store.region", "eu-west-1"]).store.region
        == "eu-west-1"
    )


@pytest.mark.parametrize(
    "argv",
    [
        ["--store.endpoint_url", "http://key:geheim@host:8333"],
        ["--store.endpoint_url", "key:geheim@host"],
        ["--input", "s3://key:geheim@bucket/x"],
        ["--input", "https://key:geheim@host/x"],
    ],
)
def test_a_refusal_does_not_repeat_a_secret(argv):
    assert "geheim" not in refusal(ShardConfig, *FOLDERS, *argv)


# ---------------------------------------------------------------- help and exit codes


def run_program(code: str, *argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True, check=False)


def test_help_names_every_section_and_the_schema_is_json(capsys):
    for flag in ("--help", "--schema"):
        with pytest.raises(SystemExit) as stop:
            parse(DistillConfig, [flag])
        assert stop.value.code == 0
    text = capsys.readouterr().out
    for name in (
        "--config",
        "--student.num_features",
        "--data.degradation.kind",
        "--terms",
        "Patches in one step",
    ):
        assert name in text
    schema = json.loads(text[text.index("{\n") :])
    assert schema["properties"]["student"]["discriminator"]["propertyName"] == "kind"


def test_help_names_the_other_names_of_a_flag_and_once_what_it_takes(capsys):
    with pytest.raises(SystemExit):
        parse(UpscaleConfig, ["--help"])
    words = " ".join(capsys.readouterr().out.split())
    assert "-i, --input TEXT" in words
    assert "-f, --ext, --format jpeg|png|" in words


def test_help_says_which_fields_are_required_and_which_defaults_depend(capsys):
    with pytest.raises(SystemExit):
        parse(DistillConfig, ["--help"])
    words = " ".join(capsys.readouterr().out.split())
    assert f"--student.kind {'|'.join(KINDS)} (required)" in words
    assert "--student.num_features INT (default depends on kind)" in words
    assert "--data.degradation.kind bicubic|real_world (default bicubic)" in words


PROGRAM = """
import sys
from kdsr import errors
from kdsr.cli import main
from kdsr.config import ShardConfig

def run(config):
    if hasattr(errors, config.domain):
        raise getattr(errors, config.domain)("this and that")
    if config.domain == "interrupt":
        raise KeyboardInterrupt
    print(f"cut {config.domain}")
    return 1 if config.domain == "rejected" else 0

main(ShardConfig, run)
"""


@pytest.mark.parametrize(
    ("domain", "code", "stdout", "stderr"),
    [
        ("photo", 0, "cut photo\n", ""),
        ("rejected", 1, "cut rejected\n", ""),
        ("ShardCorrupt", 1, "", "error: this and that\n"),
        ("StoreUnreachable", 1, "", "error: this and that\n"),
        ("UnknownModel", 2, "", "error: this and that\n"),
        ("interrupt", 130, "", "stopped by the user; the same command goes on from here\n"),
    ],
)
def test_the_exit_code_tells_the_truth(domain, code, stdout, stderr):
    done = run_program(PROGRAM, *FOLDERS, "--domain", domain)
    assert (done.returncode, done.stdout, done.stderr) == (code, stdout, stderr)


def test_a_bad_request_is_one_line_on_stderr_and_exit_code_2():
    done = run_program(PROGRAM, *FOLDERS, "--domian", "photo")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: unknown flag --domian; did you mean --domain?\n"


def test_an_error_that_nobody_foresaw_keeps_its_traceback():
    done = run_program(
        PROGRAM.replace("KeyboardInterrupt", "ZeroDivisionError"), *FOLDERS, "--domain", "interrupt"
    )
    assert done.returncode == 1
    assert "Traceback" in done.stderr


def test_relative_paths_are_made_absolute_where_the_command_was_typed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert parse(ShardConfig, FOLDERS).input == f"file://{os.path.realpath(tmp_path)}/photos"
