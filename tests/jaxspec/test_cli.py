"""The `jaxspec` command: what it prints, where, and how it ends."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support.checkpoints import byte_tokenizer, write_model

import jaxspec
import jaxspec_models
from jaxspec import drafters
from jaxspec.cli import generate as generate_command
from jaxspec.cli import main, running
from jaxspec.cli.errors import UserError, told_to_the_user
from jaxspec.cli.options import parse
from jaxspec.policies.fixed import Fixed
from jaxspec.policies.goodput import Goodput
from jaxspec.policies.guarded import Guarded
from jaxspec_models import drafter_making
from jaxspec_models.drafters import block
from jaxspec_models.drafters.directory import save_drafter
from jaxspec_models.tokenizer import TextTokenizer

SMALL = ["--dtype", "float32", "--max-new-tokens", "12"]


def read_table(params, tokens, cache, *, start):
    del start
    return jaxspec.ModelOutput(params[tokens]), cache


def no_cache(batch, capacity, max_step):
    del batch, capacity, max_step
    return ()


def table_model(table):
    """A bigram model: it compiles fast."""
    return jaxspec.LanguageModel(table, read_table, no_cache, vocab_size=table.shape[0])


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Directories of models by name."""
    root = tmp_path_factory.mktemp("models")
    made = {
        "target": write_model(root / "target"),
        "ends": write_model(root / "ends", eos=256),
        "draft": write_model(root / "draft", seed=1),
        "larger-vocabulary": write_model(root / "larger-vocabulary", num_extra=2),
        "short": write_model(root / "short", context=32, chat=False),
        "broken": write_model(root / "broken"),
        "no-tokenizer": write_model(root / "no-tokenizer"),
        "nan": write_model(root / "nan", scale=np.nan),
    }
    (made["broken"] / "model.safetensors").write_bytes(b"no tensors")
    (made["no-tokenizer"] / "tokenizer.json").unlink()
    return {name: str(path) for name, path in made.items()}


@pytest.fixture
def ask(models, capsys):
    """Runs `jaxspec generate`, on the target by default; returns what it printed to stdout."""

    def run(*arguments, model="target", expected_code=0):
        model = models.get(model, model)
        code = main(["generate", "--model", model, *SMALL, *arguments])
        printed = capsys.readouterr()
        assert code == expected_code, printed.err
        run.stderr = printed.err
        return printed.out

    return run


def pipe_in(monkeypatch, content):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))


def assert_mistake(capsys, arguments, *fragments):
    """Exit code 2, nothing on stdout, one line on stderr that says what is wrong."""
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("jaxspec: ")
    assert printed.err.endswith("\n")
    assert printed.err.count("\n") == 1, printed.err
    for fragment in fragments:
        assert fragment in printed.err


# ---------------------------------------------------------------------------------------------
# Help, and mistakes.


def test_help_and_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"jaxspec {jaxspec.__version__}\n"
    assert main([]) == 0
    without_arguments = capsys.readouterr().out
    assert main(["--help"]) == 0
    assert capsys.readouterr().out == without_arguments
    assert "jaxspec demo" in without_arguments
    assert main(["generate", "--help"]) == 0
    text = capsys.readouterr().out
    for option in (
        "--model", "--draft ", "--drafter", "--prompt ", "--prompt-file", "--chat", "--temperature",
        "--top-k", "--top-p", "--min-p", "--typical-p", "--repetition-penalty",
        "--presence-penalty", "--frequency-penalty", "--no-repeat-ngram-size", "--min-new-tokens",
        "--max-new-tokens",
        "--num-draft-tokens", "--seed", "--dtype", "--json", "examples:",
    ):  # fmt: skip
        assert option in text


def test_help_and_mistakes_load_no_model_code_and_start_no_device():
    code = """
    import sys
    from jaxspec.cli import main
    assert main(["--help"]) == 0
    assert main(["generate", "--help"]) == 0
    assert main(["generate", "--top-p", "7"]) == 2
    assert not {"jaxspec_models", "flax", "tokenizers", "transformers"} & sys.modules.keys()
    from jax._src import xla_bridge
    assert not xla_bridge.backends_are_initialized()
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        (["--temperature", "-1"], ("--temperature", "at least 0", "-1")),
        (["--temperature", "nan"], ("--temperature", "a number")),
        (["--temperature", "hot"], ("--temperature", "'hot'")),
        (["--top-k", "-3"], ("--top-k", "at least 0")),
        (["--top-k", "1.5"], ("--top-k", "an integer")),
        (["--top-p", "0"], ("--top-p", "above 0")),
        (["--min-p", "1.1"], ("--min-p", "between 0 and 1")),
        (["--repetition-penalty", "0"], ("--repetition-penalty", "above 0")),
        (["--max-new-tokens", "0"], ("--max-new-tokens", "at least 1")),
        (["--num-draft-tokens", "0"], ("--num-draft-tokens", "at least 1")),
        (["--seed", "-1"], ("--seed", "between 0")),
        (["--dtype", "int3"], ("--dtype", "bfloat16")),
        (["--draft", "x", "--drafter", "none"], ("--drafter", "--draft", "not allowed")),
        (["--drafter", "nothing"], ("--drafter", "auto, prompt-lookup, none", "nothing")),
        (["--prompt-file", "x"], ("--prompt-file", "--prompt", "not allowed")),
        (["--temprature", "1"], ("--temprature", "--help")),
        (["--model", "no-such-model"], ("no-such-model", "smollm2-135m")),
        (["--draft", "no-such-model"], ("no-such-model",)),
        (["--model", "MODEL:broken"], ("model.safetensors",)),
        (["--model", "MODEL:no-tokenizer"], ("no tokenizer.json",)),
        (["--draft", "MODEL:larger-vocabulary"], ("257", "258", "vocabulary")),
        (["--draft", "MODEL:short", "--max-new-tokens", "40"], ("drafter", "32 tokens")),
        (["--model", "MODEL:short", "--max-new-tokens", "40"], ("42", "32 tokens", "shorten")),
        (["--model", "MODEL:short", "--chat"], ("no chat template",)),
        (["--prompt", ""], ("empty", "--prompt")),
        (["--stop", ""], ("--stop", "must not be empty")),
        (["--regex", "a", "--json-schema", "x"], ("--json-schema", "--regex", "not allowed")),
        (["--json-schema", "no-such-file"], ("the schema file no-such-file cannot be read",)),
        (["--regex", "(a", "--model", "MODEL:ends"], ("no grammar can be made", "(a")),
        (["--regex", "a"], ("eos_ids",)),
    ],
)
def test_a_mistake_is_one_line(models, capsys, arguments, fragments):
    arguments = [models.get(a.removeprefix("MODEL:"), a) for a in arguments]
    prompt = [] if arguments[:2] == ["--prompt", ""] else ["--prompt", "hi"]
    assert_mistake(
        capsys, ["generate", "--model", models["target"], *prompt, *arguments], *fragments
    )


def test_an_unknown_command_is_one_line(capsys):
    assert_mistake(capsys, ["genrate"], "genrate", "generate")


@pytest.mark.parametrize(
    ("content", "fragments"),
    [
        (None, ("cannot be read", "No such file")),
        ("directory", ("cannot be read", "directory")),
        (b"", ("empty",)),
        (b"\n", ("empty",)),
        (b"caf\xe9 au lait", ("not UTF-8", "byte 3")),
    ],
)
def test_a_wrong_prompt_file_is_one_line(models, capsys, tmp_path, content, fragments):
    path = tmp_path / "prompt.txt"
    if content == "directory":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    arguments = ["generate", "--model", models["target"], "--prompt-file", str(path)]
    assert_mistake(capsys, arguments, str(path), *fragments)


@pytest.mark.parametrize(
    ("content", "fragment"), [(b"", "empty"), (b"\xff\xfe", "not UTF-8"), (None, "no prompt")]
)
def test_a_wrong_standard_input_is_one_line(models, capsys, monkeypatch, content, fragment):
    if content is None:
        monkeypatch.setattr(sys, "stdin", io.StringIO("not read: this is a terminal"))
        monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    else:
        pipe_in(monkeypatch, content)
    assert_mistake(capsys, ["generate", "--model", models["target"]], fragment)


def test_a_prompt_argument_that_is_no_utf8_is_one_line(capsys):
    argument = os.fsdecode(b"caf\xe9") if sys.getfilesystemencoding() == "utf-8" else "\udce9"
    assert_mistake(capsys, ["generate", "--prompt", argument], "not UTF-8")


def test_only_packages_that_are_missing_are_blamed_on_the_installation():
    with (
        pytest.raises(UserError, match=r"flax.*pip install 'jaxspec\[models\]'"),
        told_to_the_user(),
    ):
        raise ModuleNotFoundError("No module named 'flax.nnx'", name="flax.nnx")
    with pytest.raises(ModuleNotFoundError), told_to_the_user():  # a bug of this project
        raise ModuleNotFoundError(name="jaxspec.no_such_module")
    with pytest.raises(TypeError), told_to_the_user():
        raise TypeError("a bug")


# ---------------------------------------------------------------------------------------------
# Text.


def report_of(ask, *arguments, **kwargs):
    return json.loads(ask("--json", *arguments, **kwargs))


def test_a_stop_text_ends_the_output(ask):
    whole = ask("--prompt", "hello hello", "--max-new-tokens", "40")
    middle = whole[5:8]
    cut = ask("--prompt", "hello hello", "--max-new-tokens", "40", "--stop", middle, "--stop", "ÿÿ")
    assert cut == whole[: whole.index(middle) + len(middle)] + "\n"
    report = report_of(ask, "--prompt", "hello hello", "--max-new-tokens", "40", "--stop", middle)
    assert report["text"] + "\n" == cut
    assert "stop" in report["status"]
    assert len(report["token_ids"]) <= len(cut.encode())


def test_expressions_and_schemas_are_followed(ask, tmp_path):
    arguments = ("--prompt", "hello", "--temperature", "1", "--max-new-tokens", "40")
    text = ask(*arguments, "--regex", "(ab|c){3}", model="ends")
    assert re.fullmatch("(ab|c){3}", text.removesuffix("\n"))
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "object", "properties": {"é": {"enum": [7, true]}}, '
                      '"required": ["é"]}')  # fmt: skip
    text = ask(*arguments, "--json-schema", str(schema), model="ends")
    assert json.loads(text)["é"] in (7, True)


def test_json_is_what_generate_returns(models, ask):
    out = ask("--json", "--prompt", "hello hello")
    assert out.count("\n") == 1
    assert ask.stderr == ""
    report = json.loads(out)
    assert report["model"] == models["target"]
    assert report["prompt"] == "hello hello"
    tokenizer = jaxspec_models.load_tokenizer(models["target"])
    assert report["prompt_token_ids"] == tokenizer.encode("hello hello")
    model = jaxspec_models.load_model(models["target"], dtype="float32")
    expected = (
        jaxspec.generate(
            model,
            [report["prompt_token_ids"]],
            sampling=jaxspec.Sampling(temperature=0),
            max_new_tokens=12,
        )
        .tokens[0]
        .tolist()
    )
    assert report["token_ids"] == expected
    assert report["text"] == tokenizer.decode(expected, skip_special_tokens=True)
    assert report["status"] == "stopped at max_new_tokens"
    assert report["guarantee"] == "distribution"

    stats = report["stats"]
    assert set(stats) == {
        "num_spec_steps", "num_draft_tokens", "num_accepted_draft_tokens", "draft_acceptance_rate",
        "mean_acceptance_length", "tokens_per_step", "acceptance_histogram",
    }  # fmt: skip
    histogram = stats["acceptance_histogram"]
    assert len(histogram) == 5  # four drafts at most
    assert sum(histogram) == stats["num_spec_steps"]
    assert sum(i * n for i, n in enumerate(histogram)) == stats["num_accepted_draft_tokens"]
    assert stats["tokens_per_step"] == pytest.approx(12 / stats["num_spec_steps"])

    seconds = report["seconds"]
    assert set(seconds) == {"load", "compile", "prefill_and_decode"}
    assert all(value > 0 for value in seconds.values())


def test_text_goes_to_stdout_and_a_summary_to_stderr(ask):
    report = report_of(ask, "--prompt", "hello hello")
    out = ask("--prompt", "hello hello")
    assert out == report["text"] + ("" if report["text"].endswith("\n") else "\n")
    steps = report["stats"]["num_spec_steps"]
    assert ask.stderr.count("\n") == 1
    assert "[12 tokens in " in ask.stderr
    assert f"{steps} forwards, {12 / steps:.2f} tokens a forward; stopped at" in ask.stderr


def test_no_drafter_changes_greedy_text(models, ask):
    plain = report_of(ask, "--prompt", "a goose", "--drafter", "none")
    assert plain["stats"]["num_draft_tokens"] == 0
    assert plain["stats"]["num_spec_steps"] == 12
    itself = report_of(ask, "--prompt", "a goose", "--draft", models["target"])
    assert itself["token_ids"] == plain["token_ids"]
    assert itself["stats"]["draft_acceptance_rate"] == 1.0
    assert itself["stats"]["num_spec_steps"] == 3  # 5 + 5 + 2
    other = report_of(
        ask, "--prompt", "a goose", "--draft", models["draft"], "--num-draft-tokens", "2"
    )
    assert other["token_ids"] == plain["token_ids"]
    assert other["stats"]["draft_acceptance_rate"] < 1.0
    assert len(other["stats"]["acceptance_histogram"]) == 3


def test_a_model_s_own_drafter_is_used(models, ask, monkeypatch):
    """What comes with the model drafts, unless something else is asked for."""
    load = jaxspec_models.load_model

    def with_drafter(name, dtype, quantization):
        model = load(name, dtype=dtype, quantization=quantization)
        return model.replace(default_drafter=jaxspec.drafters.model(model))

    monkeypatch.setattr(jaxspec_models, "load_model", with_drafter)
    own = report_of(ask, "--prompt", "a goose")
    assert own["stats"]["num_spec_steps"] == 3  # 5 + 5 + 2: it drafts for itself
    looked_up = report_of(ask, "--prompt", "a goose", "--drafter", "prompt-lookup")
    assert looked_up["stats"]["num_spec_steps"] > 3
    assert looked_up["token_ids"] == own["token_ids"]


def test_a_trained_drafter_is_used(models, ask, tmp_path):
    """One that was never trained drafts badly, and the text stays what it was."""
    model = jaxspec_models.load_model(models["target"], dtype="float32")
    shape = drafter_making.shape(model, "block", num_draft_tokens=1, draft_vocab_size=64)
    params = block.BlockModel(shape, rngs=nnx.Rngs(0))
    save_drafter(
        tmp_path / "own", model, shape, nnx.to_pure_dict(nnx.state(params)), np.arange(64),
        target_name="target",
    )  # fmt: skip
    plain = report_of(ask, "--prompt", "a goose", "--drafter", "none")
    own = report_of(ask, "--prompt", "a goose", "--drafter", str(tmp_path / "own"))
    assert own["token_ids"] == plain["token_ids"]
    assert own["stats"]["num_draft_tokens"] > 0
    assert len(own["stats"]["acceptance_histogram"]) == 2  # no more drafts than it was made for
    error = ask("--prompt", "a goose", "--drafter", str(tmp_path), expected_code=2)
    assert error == ""
    assert "holds no drafter" in ask.stderr


@pytest.mark.parametrize(
    ("drafter", "quantization", "counts", "policy"),  # by XLA, with a matrix unit, by our kernel
    [
        (drafters.prompt_lookup(), None, (4, 4, 4), Goodput),
        (drafters.prompt_lookup(), "int8", (2, 4, 2), Goodput),
        (drafters.model(table_model(np.zeros((4, 4), np.float32))), "int8", (4, 4, 4), Fixed),
        (types.SimpleNamespace(max_draft_tokens=8), None, (2, 2, 2), Goodput),
        (types.SimpleNamespace(max_draft_tokens=1), None, (1, 1, 1), Goodput),
        (types.SimpleNamespace(max_draft_tokens=8), "int8", (1, 2, 2), Goodput),
    ],
    ids=["lookup", "lookup, int8", "model", "trained", "trained for less", "trained, int8"],
)
@pytest.mark.parametrize("machine", range(3), ids=["XLA", "matrix unit", "kernel"])
def test_how_much_is_drafted(drafter, quantization, counts, policy, machine, monkeypatch):
    """As much as pays where costs are known; what was trained costs more than a lookup."""
    most = 8 if machine == 2 else 0
    monkeypatch.setattr("jaxspec_models.quantization.has_matrix_unit", lambda: machine == 1)
    monkeypatch.setattr("jaxspec_models.quantization.max_native_rows", lambda: most)
    count = counts[machine]
    found = running.drafting(drafter, None, quantization)
    assert found["num_draft_tokens"] == count
    assert isinstance(found["policy"], Guarded)
    assert isinstance(found["policy"].policy, policy)
    if policy is Goodput:
        costs = found["policy"].profile
        assert costs.verify.shape == (count + 1,)
        is_trained = hasattr(drafter, "max_draft_tokens")
        assert float(costs.draft) == pytest.approx(0.06 if is_trained else 0.005)
    assert running.drafting(drafter, 3, quantization)["num_draft_tokens"] == 3


def test_sampling_options_reach_generate(ask, monkeypatch):
    model = table_model(2.0 * jax.random.normal(jax.random.key(0), (257, 257)))
    tokenizer = TextTokenizer(byte_tokenizer())
    monkeypatch.setattr(jaxspec_models, "load_model", lambda name, dtype, quantization: model)
    monkeypatch.setattr(jaxspec_models, "load_tokenizer", lambda name: tokenizer)
    options = {
        "temperature": 0.7, "top_k": 40, "top_p": 0.95, "min_p": 0.01, "repetition_penalty": 1.3,
        "typical_p": 0.97, "presence_penalty": 0.4, "frequency_penalty": -0.2,
        "no_repeat_ngram_size": 2, "min_new_tokens": 3,
    }  # fmt: skip
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    report = report_of(ask, "--prompt", "a goose", "--seed", "5", *flags)
    expected = jaxspec.generate(
        model,
        [tokenizer.encode("a goose")],
        sampling=jaxspec.Sampling(**options),
        drafter=jaxspec.drafters.prompt_lookup(),
        max_new_tokens=12,
        num_draft_tokens=4,
        key=jax.random.key(5),
    )
    assert report["token_ids"] == expected.tokens[0].tolist()
    other = report_of(ask, "--prompt", "a goose", "--seed", "6", *flags)
    assert other["token_ids"] != report["token_ids"]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], jaxspec.Sampling(temperature=0)),
        (["--repetition-penalty", "1.2"], jaxspec.Sampling(temperature=0, repetition_penalty=1.2)),
        (["--top-k", "5"], jaxspec.Sampling(top_k=5)),
        (["--top-p", "0.9"], jaxspec.Sampling(top_p=0.9)),
        (["--min-p", "0.1"], jaxspec.Sampling(min_p=0.1)),
        (["--typical-p", "0.9"], jaxspec.Sampling(typical_p=0.9)),
        (["--min-p", "0.1", "--temperature", "2"], jaxspec.Sampling(temperature=2.0, min_p=0.1)),
        (["--top-k", "5", "--temperature", "0"], jaxspec.Sampling(temperature=0.0, top_k=5)),
    ],
)
def test_the_temperature_follows_the_other_options(flags, expected):
    assert generate_command.sampling_options(parse(["generate", *flags])) == expected


def test_a_prompt_may_come_from_anywhere(ask, monkeypatch, tmp_path):
    given = report_of(ask, "--prompt", "zwölf Gänse")
    assert given["prompt"] == "zwölf Gänse"
    for content in ("zwölf Gänse", "zwölf Gänse\n", "zwölf Gänse\r\n", "\ufeffzwölf Gänse"):
        path = tmp_path / "prompt.txt"
        path.write_bytes(content.encode())
        from_file = report_of(ask, "--prompt-file", str(path))
        assert from_file["prompt"] == given["prompt"]
        assert from_file["token_ids"] == given["token_ids"]
    pipe_in(monkeypatch, "zwölf Gänse\n\n".encode())
    assert report_of(ask)["prompt"] == "zwölf Gänse\n"  # one newline is dropped, not two


def test_chat_goes_through_the_template(models, ask):
    report = report_of(ask, "--chat", "--prompt", "hi")
    tokenizer = jaxspec_models.load_tokenizer(models["target"])
    assert report["prompt_token_ids"] == tokenizer.encode("<user>hi<assistant>")
    assert report["prompt"] == "hi"


def test_a_model_that_computes_nan_is_reported(ask):
    assert ask("--prompt", "hi", model="nan", expected_code=1) == "\n"
    assert "[0 tokens" in ask.stderr
    assert "NaN" in ask.stderr


# ---------------------------------------------------------------------------------------------
# Characters.

TEXT = "é🌸Ж!"  # of 2, 4, 2 and 1 bytes, all different, a token each


def spelling_model():
    """Writes the bytes of TEXT one after the other, round and round."""
    ids = byte_tokenizer().encode(TEXT).ids
    assert len(set(ids)) == len(ids) == 9
    following = np.zeros(257, int)
    following[ids] = np.roll(ids, -1)
    table = 20.0 * jax.nn.one_hot(jnp.array(following), 257)
    return table_model(table)


def spell(num_draft_tokens, max_new_tokens):
    """The pieces of text as they come, and what was written."""
    model, tokenizer = spelling_model(), TextTokenizer(byte_tokenizer())
    pieces = []
    written = running.write(
        model,
        tokenizer,
        tokenizer.encode("!"),
        on_text=pieces.append,
        drafter=jaxspec.drafters.model(model) if num_draft_tokens else None,
        num_draft_tokens=num_draft_tokens or 1,
        sampling=jaxspec.Sampling(temperature=0),
        max_new_tokens=max_new_tokens,
    )
    return pieces, written


@pytest.mark.parametrize("num_draft_tokens", [0, 1, 2, 4])
def test_no_piece_of_text_holds_half_a_character(num_draft_tokens):
    pieces, written = spell(num_draft_tokens, max_new_tokens=3 * 9 + 4)  # ends inside the flower
    assert written.text == "".join(pieces) == 3 * TEXT + "é\ufffd"
    assert written.text == TextTokenizer(byte_tokenizer()).decode(written.token_ids)
    # What there is of the last character comes at the end, once nothing more can come.
    assert not any("\ufffd" in piece for piece in pieces[:-1])
    assert len(pieces) >= 3  # the text comes as it is written, not at the end


def test_a_planted_half_character_is_seen(monkeypatch):
    """The check above fails for a detokeniser that decodes each round by itself."""
    from jaxspec_models import tokenizer as tokenizer_module

    class Naive(tokenizer_module.Detokenizer):
        def push(self, ids):
            return self._decode(list(ids))

    monkeypatch.setattr(tokenizer_module, "Detokenizer", Naive)
    pieces, written = spell(2, max_new_tokens=3 * 9)
    assert len(written.token_ids) == 3 * 9
    assert "".join(pieces) != 3 * TEXT
    assert "\ufffd" in "".join(pieces)


def test_a_terminal_without_the_character_gets_a_question_mark(monkeypatch):
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stdout)
    monkeypatch.setattr(
        jaxspec_models, "load_model", lambda name, dtype, quantization: spelling_model()
    )
    tokenizer = TextTokenizer(byte_tokenizer())
    monkeypatch.setattr(jaxspec_models, "load_tokenizer", lambda name: tokenizer)
    assert main(["generate", "--prompt", "!", "--max-new-tokens", "9"]) == 0
    assert stdout.buffer.getvalue() == b"???!\n"


# ---------------------------------------------------------------------------------------------
# The demo.


def check_demo(out):
    """The two columns of the demo's table, by row."""
    rows = dict(re.findall(r"^(\w[\w ,/]*?)  +([\d.]+ +[\d.]+)$", out, re.MULTILINE))
    table = {name: [float(x) for x in values.split()] for name, values in rows.items()}
    assert list(table) == [
        "tokens", "seconds, prefill included", "tokens/s", "target forwards",
        "mean acceptance length", "compiling apart, seconds",
    ]  # fmt: skip
    assert "same text: yes\n" in out
    plain_tokens, tokens = table["tokens"]
    assert plain_tokens == tokens == table["target forwards"][0]
    assert table["mean acceptance length"][0] == 1.0
    return table


def test_demo_compares_plain_with_speculative(models, capsys, monkeypatch):
    from jaxspec.cli import demo

    monkeypatch.setattr(demo, "DEFAULT_MODEL", models["target"])
    assert main(["demo", "--max-new-tokens", "20", "--dtype", "float32"]) == 0
    out = capsys.readouterr().out
    assert check_demo(out)["tokens"] == [20, 20]
    assert "collect the goose" in out
    model = jaxspec_models.load_model(models["target"], dtype="float32")
    tokenizer = jaxspec_models.load_tokenizer(models["target"])
    ids = running.encode(tokenizer, demo.PROMPT, is_chat=True)
    result = jaxspec.generate(
        model, [ids], max_new_tokens=20, sampling=jaxspec.Sampling(temperature=0)
    )
    expected = tokenizer.decode(result.tokens[0].tolist())
    squeezed = "".join(out.split())  # the demo indents
    assert "".join(expected.split()) in squeezed


def test_demo_shows_the_model_s_own_drafter(models, capsys, monkeypatch):
    from jaxspec.cli import demo

    load = jaxspec_models.load_model

    def with_drafter(name, dtype, quantization):
        model = load(name, dtype=dtype, quantization=quantization)
        return model.replace(default_drafter=jaxspec.drafters.model(model))

    monkeypatch.setattr(demo, "DEFAULT_MODEL", models["target"])
    monkeypatch.setattr(jaxspec_models, "load_model", with_drafter)
    assert main(["demo", "--max-new-tokens", "20", "--dtype", "float32"]) == 0
    out = capsys.readouterr().out
    assert "the drafter that comes with the model" in out
    assert "prompt lookup" not in out
    assert check_demo(out)["target forwards"] == [20, 4]  # 5 tokens each: it drafts for itself


@pytest.mark.real_model
def test_demo_of_the_real_model(capsys):
    assert main(["demo"]) == 0
    table = check_demo(capsys.readouterr().out)
    assert table["tokens"][1] / table["target forwards"][1] >= 1.5
    assert table["mean acceptance length"][1] >= 1.5


# ---------------------------------------------------------------------------------------------
# How it ends.


def test_an_interruption_is_no_traceback(models, capsys, monkeypatch):
    def interrupt(*unused):
        raise KeyboardInterrupt

    monkeypatch.setattr(running, "load_model", interrupt)
    assert main(["generate", "--model", models["target"], "--prompt", "hi"]) == 130
    assert capsys.readouterr().err == "\nInterrupted.\n"


@pytest.mark.parametrize("error", [BrokenPipeError(), OSError(28, "No space left on device")])
def test_a_stdout_that_fails_is_no_traceback(models, capsys, monkeypatch, error):
    class Failing(io.StringIO):
        def write(self, text):
            raise error

    monkeypatch.setattr(sys, "stdout", Failing())
    code = main(["generate", "--model", models["target"], "--prompt", "hi", *SMALL])
    err = capsys.readouterr().err
    if isinstance(error, BrokenPipeError):
        assert (code, err) == (141, "")
    else:
        assert (code, err.count("\n")) == (1, 1)
        assert "No space left on device" in err


def start(models):
    """A process that writes for long enough to be stopped."""
    arguments = [sys.executable, "-m", "jaxspec.cli", "generate", "--model", models["target"]]
    return subprocess.Popen(
        [*arguments, "--prompt", "hi", "--drafter", "none", "--max-new-tokens", "4000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


@pytest.mark.parametrize("end", ["interrupted", "closed pipe"])
def test_a_process_stops_cleanly(models, end):
    with start(models) as process:
        assert process.stdout.read(1)  # streamed: there is text long before the end
        assert process.poll() is None
        if end == "interrupted":
            process.send_signal(signal.SIGINT)
        process.stdout.close()
        err = process.stderr.read().decode()
        code = process.wait(timeout=60)
    if end == "interrupted":
        assert (code, err) == (130, "\nInterrupted.\n")
    else:
        assert (code, err) == (141, "")


def test_a_fresh_process(models):
    """Without the extra it says what to install; with it, transformers is not imported."""
    code = f"""
    import sys
    from jaxspec.cli import main
    arguments = ["generate", "--model", {models["target"]!r}, "--prompt", "hi", *{SMALL!r}]
    sys.modules["tokenizers"] = None  # what Python then says is that it is not there
    assert main(arguments) == 2
    del sys.modules["tokenizers"]
    assert main(arguments) == 0
    assert "transformers" not in sys.modules
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    missing, summary = done.stderr.splitlines()
    assert missing == (
        "jaxspec: tokenizers is not installed; language models need: pip install 'jaxspec[models]'"
    )
    assert summary.startswith("[12 tokens in ")


def test_read_prompt_prefers_what_is_given(monkeypatch):
    """Standard input is left alone where there is a prompt: `while read` loops depend on it."""
    pipe_in(monkeypatch, b"left alone")
    arguments = generate_command.argparse.Namespace(prompt="given", prompt_file=None)
    assert generate_command.read_prompt(arguments) == "given"
    assert sys.stdin.read() == "left alone"
