"""`jaxspec train`: what survives a kill, and how mistakes are told."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from support.checkpoints import write_model

import jaxspec
import jaxspec_models
from jaxspec.cli import main
from jaxspec_models import answers, drafter_training, features

PROMPTS = ["a", "bc", "What?", "d" * 40, "once more", "and again", "why", "so"]
SIZES = ["--dtype", "float32", "--max-new-tokens", "24", "--batch", "2", "--batches-a-shard", "2"]


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return str(write_model(tmp_path_factory.mktemp("models") / "target", eos=256))


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in PROMPTS))
    return str(path)


def command(target, prompts, out, *more):
    return [
        "train", "data", "--target", target, "--prompts", prompts, "--out", str(out),
        *SIZES, *more,
    ]  # fmt: skip


def shards(directory):
    return {path.name: path.read_bytes() for path in sorted(directory.glob("shard-*.safetensors"))}


@pytest.fixture(scope="module")
def whole(target, prompts, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "answers"
    assert main(command(target, prompts, out)) == 0
    return out


def test_answers_of_a_model(whole, target, prompts, capsys):
    found = answers.read_answers(whole)
    assert len(found) == 2 * len(PROMPTS)
    assert answers.read_settings(whole)["target"] == target
    assert main(command(target, prompts, whole)) == 0
    captured = capsys.readouterr()
    num_tokens = sum(len(a.tokens) - a.prompt_length for a in found)
    assert captured.out == f"16 answers, {num_tokens} tokens in {whole}\n"
    assert captured.err == ""  # nothing was left to do, so there is no bar


def test_a_killed_process_goes_on(whole, target, prompts, tmp_path):
    """SIGKILL, as soon as there is a shard: nothing is lost, repeated or changed."""
    arguments = command(target, prompts, tmp_path)
    with subprocess.Popen(
        [sys.executable, "-m", "jaxspec.cli", *arguments], stderr=subprocess.DEVNULL
    ) as process:
        while not shards(tmp_path):
            assert process.poll() is None, "the process ended by itself"
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
    kept = shards(tmp_path)
    assert kept.items() <= shards(whole).items()
    assert main(arguments) == 0
    assert shards(tmp_path) == shards(whole)


def test_a_bar_tells_how_far_it_is(target, prompts, tmp_path, capsys):
    assert main(command(target, prompts, tmp_path, "--tokens", "60", "--temperature", "0")) == 0
    captured = capsys.readouterr()
    assert "60/60" in captured.err
    assert "tokens" in captured.err
    assert sum(len(a.tokens) - a.prompt_length for a in answers.read_answers(tmp_path)) >= 60


@pytest.mark.parametrize(
    ("more", "fragments"),
    [
        (["--batch", "0"], ["--batch", "at least 1"]),
        (["--temperature", "-1"], ["--temperature", "at least 0"]),
        (["--prompts", "nowhere.jsonl"], ["nowhere.jsonl", "cannot be read"]),
        (["--target", "nowhere"], ["nowhere"]),
        (["--max-prompt-tokens", "1"], ["max_prompt_tokens=1"]),
        (["--max-new-tokens", "5000"], ["4096"]),
    ],
)
def test_a_mistake_is_one_line(target, prompts, tmp_path, capsys, more, fragments):
    assert main(command(target, prompts, tmp_path / "out", *more)) == 2
    told = capsys.readouterr().err
    assert told.startswith("jaxspec: ")
    assert told.strip().count("\n") == 0
    assert all(fragment in told for fragment in fragments), told


def test_other_settings_are_refused(whole, target, prompts, capsys):
    before = shards(whole)
    assert main(command(target, prompts, whole, "--seed", "1")) == 2
    assert "seed 0 (now 1)" in capsys.readouterr().err
    assert shards(whole) == before


def test_prompts_of_the_model_s_own(target, tmp_path, capsys):
    path = tmp_path / "prompts.jsonl"
    arguments = ["train", "prompts", "--target", target, "--out", str(path), "--count", "3"]
    arguments += ["--dtype", "float32", "--batch", "8"]
    assert main(arguments) == 0
    captured = capsys.readouterr()
    assert captured.out == f"3 prompts in {path}\n"
    assert "3/3" in captured.err
    assert len(answers.read_prompts(path)) == 3
    kinds = tmp_path / "kinds.jsonl"
    assert main([*arguments[:5], str(kinds), *arguments[6:], "--beginnings", "ab", "c d"]) == 0
    capsys.readouterr()
    assert all(prompt.startswith(("ab", "c d")) for prompt in answers.read_prompts(kinds))
    assert main([*arguments, "--seed", "1"]) == 2
    told = capsys.readouterr().err
    assert "seed 1" in told
    assert told.count("\n") == 1
    assert main([*arguments[:5], str(tmp_path / "nowhere" / "a"), *arguments[6:]]) == 2
    assert "cannot be written" in capsys.readouterr().err


def training(target, data, out, *more):
    return [
        "train", "drafter", "--target", target, "--data", str(data), "--out", str(out),
        "--dtype", "float32", "--steps", "3", "--num-draft-tokens", "2", "--vocabulary", "200",
        "--tokens-a-part", "256", *more,
    ]  # fmt: skip


def test_a_drafter_of_the_answers(whole, target, tmp_path, capsys):
    """Answers, features, steps and a directory that loads; once more, nothing is left to do."""
    out = tmp_path / "drafter"
    arguments = training(
        target, whole, out, "--method", "block", "--mlp", "24", "--markov-rank", "4"
    )
    assert main(arguments) == 0
    captured = capsys.readouterr()
    assert f"a drafter in {out}: step 3, " in captured.out
    assert "features: 100%" in captured.err
    assert "training: 100%" in captured.err
    model = jaxspec_models.load_model(target, dtype="float32")
    for name in ("drafter", "drafter-float32"):
        drafter = jaxspec_models.load_drafter(out / name, model)
        assert (drafter.config.quantization == "int8") == (name == "drafter")
        options = {"sampling": jaxspec.Sampling(temperature=0), "max_new_tokens": 8}
        written = jaxspec.generate(
            model, [[65, 66]], drafter=drafter, num_draft_tokens=2, **options
        )
        plain = jaxspec.generate(model, [[65, 66]], **options)
        np.testing.assert_array_equal(written.tokens, plain.tokens)
        assert int(written.stats.num_draft_tokens[0]) > 0
    card = (out / "drafter" / "README.md").read_text()
    assert f"    jaxspec train drafter --target {target} --data {whole} --out {out} --dtype" in card
    assert "method `block`" in card.lower()
    assert (out / "log.png").read_bytes().startswith(b"\x89PNG")
    before = (out / "log.csv").read_bytes()
    assert main(arguments) == 0
    assert (out / "log.csv").read_bytes() == before
    capsys.readouterr()
    assert main([*arguments, "--learning-rate", "0.5"]) == 2
    assert "was begun with other settings" in capsys.readouterr().err.splitlines()[-1]


def test_a_student_of_recorded_features(whole, target, prompts, tmp_path, capsys):
    """Features kept on the way are used as they are, and the answers are the same."""
    features = tmp_path / "features"
    recorded = command(target, prompts, tmp_path / "answers", "--features", str(features))
    assert main(recorded) == 0
    assert shards(tmp_path / "answers") == shards(whole)
    before = shards(features)
    assert before
    out = tmp_path / "drafter"
    more = ("--method", "student", "--source-layers", "0", "--features", str(features))
    assert main(training(target, tmp_path / "answers", out, *more)) == 0
    assert shards(features) == before
    model = jaxspec_models.load_model(target, dtype="float32")
    drafter = jaxspec_models.load_drafter(out / "drafter", model)
    written = jaxspec.generate(
        model, [[65, 66]], drafter=drafter, sampling=jaxspec.Sampling(temperature=0),
        max_new_tokens=8,
    )  # fmt: skip
    assert int(written.stats.num_draft_tokens[0]) > 0
    capsys.readouterr()
    assert main(training(target, whole, tmp_path / "x", *more, "--markov-rank", "4")) == 2
    assert "method 'student' has no markov_rank" in capsys.readouterr().err.splitlines()[-1]


def test_a_drafter_of_several_directories(whole, target, prompts, tmp_path, capsys, monkeypatch):
    """Each answer is learned with its own features, wherever it is kept."""
    other, out = tmp_path / "other", tmp_path / "drafter"
    assert main(command(target, prompts, other, "--seed", "5", "--temperature", "1")) == 0
    seen = []
    texts = drafter_training.Texts

    def see(found, read, settings):
        seen.append((found, read))
        return texts(found, read, settings)

    monkeypatch.setattr(drafter_training, "Texts", see)
    arguments = training(target, whole, out, "--method", "eagle3", "--mlp", "24")
    at = arguments.index("--data") + 2
    arguments[at:at] = [str(other)]
    assert main(arguments) == 0
    ((found, read),) = seen
    both = answers.read_answers(whole) + answers.read_answers(other)
    assert len(found) == len(both) == 3 * len(PROMPTS)
    for i, (ours, theirs) in enumerate(zip(found, both, strict=True)):
        np.testing.assert_array_equal(ours.tokens, theirs.tokens)
        assert len(read(i).log_normalizers) >= len(ours.tokens) - 1
    alone = [
        features.read_features(directory, out / name, layers=(1, -1))
        for directory, name in ((whole, "features"), (other, "features-2"))
    ]
    for index, (which, place) in {0: (0, 0), 15: (0, 15), 16: (1, 0), 23: (1, 7)}.items():
        wanted = alone[which][1](place)
        np.testing.assert_array_equal(read(index).log_normalizers, wanted.log_normalizers)
    capsys.readouterr()
    assert main([*arguments, "--features", str(tmp_path / "one")]) == 2
    assert "2 directories of data and 1 of features" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["train"], ["train", "--help"], ["train", "data", "--help"]])
def test_help(arguments, capsys):
    assert main(arguments) == 0
    assert "jaxspec train data" in capsys.readouterr().out
