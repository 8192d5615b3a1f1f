"""`jaxspec tune`: what it writes, what takes that, and its mistakes."""

import json

import pytest
from support.checkpoints import write_model

from jaxspec import settings
from jaxspec.cli import main


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Directories of a target and of a draft model."""
    root = tmp_path_factory.mktemp("models")
    return str(write_model(root / "target")), str(write_model(root / "draft", seed=1))


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a goose"}\n{"prompt": "two geese"}\n')
    return str(path)


def said(capsys, *arguments, expected_code=0):
    """What a command printed: (stdout, stderr)."""
    code = main(list(arguments))
    printed = capsys.readouterr()
    assert code == expected_code, printed.err
    return printed


def test_what_is_found_is_written_told_and_taken(models, prompts, tmp_path, capsys):
    target, draft = models
    out = tmp_path / "settings.json"
    own = ["--model", target, "--dtype", "float32", "--draft", draft]
    told = said(
        capsys, "tune", "--tree", *own, "--prompts", prompts, "--max-nodes", "2",
        "--max-new-tokens", "8", "--out", str(out),
    ).out  # fmt: skip
    found = settings.read(out)
    assert f"Written to {out}" in told
    assert ("fastest: plain decoding" in told) == (found.num_draft_tokens == 0)
    assert len(found.measured["seconds_of_a_round_by_nodes"]) <= 3
    assert len(found.measured["seconds_of_a_round_by_length_of_chain"]) == 3
    assert "a round over a chain of n" in told
    assert all(0 <= p <= 1 for shares in found.measured["acceptance_by_depth"] for p in shares)

    ask = ["generate", *own, "--max-new-tokens", "12", "--prompt", "a goose", "--json"]
    plain = json.loads(said(capsys, *ask[:5], *ask[7:]).out)
    # What was found depends on the machine; each of the three kinds is taken.
    tree = settings.from_json('{"format": 1, "num_draft_tokens": 3, "tree": [-1, -1, 0]}')
    for chosen in (found, settings.Settings(0), settings.Settings(3), tree):
        out.write_text(chosen.to_json())
        drafted = json.loads(said(capsys, *ask, "--settings", str(out)).out)
        assert drafted["token_ids"] == plain["token_ids"]
        assert len(drafted["stats"]["acceptance_histogram"]) == chosen.num_draft_tokens + 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--tree": None}, "say what to tune: --tree"),
        ({"--out": "nowhere/settings.json"}, "nowhere is no directory"),
        ({"--prompts": "absent.jsonl"}, "absent.jsonl cannot be read"),
        ({"--drafter": "none"}, "no drafter that could draft a tree"),
    ],
)
def test_mistakes_are_told_in_one_line(models, prompts, tmp_path, capsys, changes, message):
    options = {
        "--tree": "",
        "--model": models[0],
        "--dtype": "float32",
        "--prompts": prompts,
        "--out": str(tmp_path / "settings.json"),
    } | changes
    words = [word for pair in options.items() if pair[1] is not None for word in pair if word]
    printed = said(capsys, "tune", *words, expected_code=2)
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert not (tmp_path / "settings.json").exists()
