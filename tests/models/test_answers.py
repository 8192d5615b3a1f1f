"""A target's answers: whole after any interruption, the same in any batch, what generate writes."""

import json

import jax
import numpy as np
import pytest
import tokenizers

import jaxspec
from jaxspec.testing import random_logits, table_model
from jaxspec_models import answers
from jaxspec_models.tokenizer import TextTokenizer

LETTERS = "abcdefgh"
MODEL = table_model(random_logits(0, vocab_size=len(LETTERS), order=2), order=2).replace(
    eos_ids=(7,)
)
PROMPTS = ["a", "bcd", "gh", "abcabcabcabc", "efe", "cab", "ddd"]


def tokenizer():
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE({letter: i for i, letter in enumerate(LETTERS)}, [])
    )
    return TextTokenizer(backend, chat_template="f{{ messages[0]['content'] }}g")


def write(directory, **options):
    options = {
        "target": "table",
        "max_new_tokens": 5,
        "max_prompt_tokens": 8,
        "batch": 2,
        "batches_a_shard": 2,
        **options,
    }
    model = options.pop("model", MODEL)
    return answers.write_answers(
        model, tokenizer(), options.pop("prompts", PROMPTS), directory, **options
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    directory = tmp_path_factory.mktemp("whole")
    return directory, write(directory)


def files(directory):
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def test_every_prompt_is_answered_once_at_each_temperature(whole):
    directory, done = whole
    found = answers.read_answers(directory)
    short = [i for i, prompt in enumerate(PROMPTS) if len(prompt) + 2 <= 8]
    assert len(short) == len(PROMPTS) - 1
    assert sorted((a.prompt, a.temperature) for a in found) == [
        (i, t) for i in short for t in (0.0, 1.0)
    ]
    assert done.num_answers == done.num_tasks == len(found)
    assert done.num_tokens == sum(len(a.tokens) - a.prompt_length for a in found)
    assert done.is_done
    for answer in found:
        prompt = "".join(LETTERS[i] for i in answer.tokens[: answer.prompt_length])
        assert prompt == f"f{PROMPTS[answer.prompt]}g"
        new = answer.tokens[answer.prompt_length :].tolist()
        assert len(new) == 5 or new[-1] == 7
        assert 7 not in new[:-1]
        assert answer.tokens.dtype == np.int32


def test_answers_are_the_model_s(whole):
    """Greedy ones are generate's; sampled ones are drawn, and not all alike."""
    directory, _ = whole
    greedy = 0
    for answer in answers.read_answers(directory):
        prompt = answer.tokens[: answer.prompt_length].tolist()
        new = answer.tokens[answer.prompt_length :].tolist()
        out = jaxspec.generate(
            MODEL, [prompt], sampling=jaxspec.Sampling(temperature=0), max_new_tokens=5
        )
        expected = np.asarray(out.tokens)[0, : int(out.lengths[0])].tolist()
        if answer.temperature == 0:
            assert new == expected
        else:
            greedy += new == expected
    assert greedy < len(PROMPTS) - 1


def test_the_batch_changes_nothing(whole, tmp_path):
    write(tmp_path, batch=4, batches_a_shard=1)
    assert files(tmp_path) == files(whole[0])


class Killed(BaseException):
    pass


@pytest.mark.parametrize("after", [0, 1, 2])
def test_an_interrupted_run_goes_on(whole, tmp_path, after):
    told = []

    def kill(progress):
        told.append(progress.num_answers)
        if len(told) == after + 1:
            raise Killed

    with pytest.raises(Killed):
        write(tmp_path, on_progress=kill)
    assert told == [0, 4, 8][: after + 1]
    kept = files(tmp_path)
    assert len(kept) == after + 1  # and the settings

    told.clear()
    done = write(tmp_path, on_progress=lambda progress: told.append(progress.num_answers))
    assert told == [4 * after, *range(4 * after + 4, 13, 4)]
    assert done == whole[1]
    assert files(tmp_path) == files(whole[0])
    assert kept.items() <= files(tmp_path).items()


def test_a_shard_that_cannot_be_written_leaves_nothing(whole, tmp_path, monkeypatch):
    def refuse(*unused):
        raise OSError("the disk is full")

    write(tmp_path, tokens_wanted=1)
    before = files(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("os.replace", refuse)
        with pytest.raises(OSError, match="full"):
            write(tmp_path)
    assert files(tmp_path) == before
    write(tmp_path)
    assert files(tmp_path) == files(whole[0])


def test_what_is_done_is_not_done_again(whole, monkeypatch):
    monkeypatch.setattr(jaxspec, "generate", None)
    told = []
    assert write(whole[0], on_progress=told.append) == whole[1]
    assert told == []


def test_so_many_tokens_and_then_more(whole, tmp_path):
    some = write(tmp_path, tokens_wanted=1)
    assert some.num_answers == 4
    assert some.is_done
    more = write(tmp_path, tokens_wanted=some.num_tokens + 1)
    assert more.num_answers == 8
    write(tmp_path)
    assert files(tmp_path) == files(whole[0])


def test_another_seed_is_another_order_and_other_draws(whole, tmp_path):
    write(tmp_path, seed=1)
    ours, others = answers.read_answers(whole[0]), answers.read_answers(tmp_path)
    assert [a.prompt for a in ours] != [a.prompt for a in others]

    def sampled(found):
        return {a.prompt: a.tokens.tolist() for a in found if a.temperature == 1}

    assert sampled(ours).keys() == sampled(others).keys()
    assert sampled(ours) != sampled(others)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"seed": 1}, r"seed 0 \(now 1\)"),
        ({"target": "other"}, "target 'table'"),
        ({"prompts": PROMPTS[:3]}, "prompts"),
        ({"temperatures": [0.0]}, "temperatures"),
        ({"max_new_tokens": 6}, r"max_new_tokens 5 \(now 6\)"),
        ({"batch": 3}, r"answers_a_shard 4 \(now 6\)"),
    ],
)
def test_other_settings_do_not_mix(whole, change, told):
    before = files(whole[0])
    with pytest.raises(ValueError, match=told):
        write(whole[0], **change)
    assert files(whole[0]) == before


def test_prompts_that_are_all_too_long(tmp_path):
    with pytest.raises(ValueError, match="no prompt has at most max_prompt_tokens=2"):
        write(tmp_path / "new", max_prompt_tokens=2)
    assert not (tmp_path / "new").exists()


def test_a_broken_model_is_not_learned_from(tmp_path):
    broken = MODEL.replace(params=jax.tree.map(lambda x: x * np.nan, MODEL.params))
    with pytest.raises(ValueError, match="not finite"):
        write(tmp_path, model=broken)
    assert list(files(tmp_path)) == ["answers.json"]


def test_directories_without_answers(tmp_path):
    with pytest.raises(ValueError, match=r"no readable answers\.json"):
        answers.read_answers(tmp_path)
    (tmp_path / "answers.json").write_text(json.dumps({"version": 99}))
    with pytest.raises(ValueError, match="version 99"):
        answers.read_answers(tmp_path)
    with pytest.raises(ValueError, match="version 99"):
        write(tmp_path)
    (tmp_path / "answers.json").write_text(json.dumps({"version": 1}))
    with pytest.raises(ValueError, match="no answers yet"):
        answers.read_answers(tmp_path)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "no prompts"),
        ('{"prompt": "a"}\n\n[1]\n', "line 3"),
        ('{"text": "a"}', "line 1"),
        ("{", "line 1"),
        ('{"prompt": 3}', "no text, or empty"),
        ('{"prompt": " "}', "no text, or empty"),
    ],
)
def test_prompt_files_that_are_wrong(tmp_path, text, told):
    path = tmp_path / "prompts.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=told):
        answers.read_prompts(path)
