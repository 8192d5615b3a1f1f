"""What is shipped with the package: it is there, small, described, and drafts for its model."""

import json

import jax
import numpy as np
import pytest
from support.real import load

import jaxspec
import jaxspec_models
from jaxspec import trees
from jaxspec_models import download, loading
from jaxspec_models.text import encode_prompt

DIRECTORIES = sorted(path for path in loading._SHIPPED.iterdir() if path.is_dir())
QUESTIONS = [
    "Give me three tips for a good night's sleep.",
    "What is the difference between a lake and a sea?",
    "Anna has 12 apples. She eats 2 and gives half of the rest to Ben. How many has Ben?",
    "Write a short letter that thanks a neighbour for a cake.",
]


@pytest.mark.parametrize("directory", DIRECTORIES, ids=lambda path: path.name)
def test_it_is_whole(directory):
    assert directory.name in download.MODELS  # else nobody would ever load it
    config = json.loads((directory / "config.json").read_text())
    assert config["target"]["name"] == directory.name
    assert sum(file.stat().st_size for file in directory.iterdir()) <= 12e6
    card = (directory / "README.md").read_text()
    for part in ("Licence: ", f"jaxspec train drafter --method {config['method']} ", "## Data"):
        assert part in card
    # The card's figures are those of the weights beside it.
    for name in ("acceptance_1", "acceptance_6", "agreement_1", "agreement_6"):
        assert f"{config['metrics'][name]:.3f}" in card


def test_there_is_one_for_the_default_model():
    assert [directory.name for directory in DIRECTORIES] == ["smollm2-135m"]


@pytest.fixture(scope="module")
def prompts():
    tokenizer = jaxspec_models.load_tokenizer("smollm2-135m")
    return [encode_prompt(tokenizer, [{"role": "user", "content": text}]) for text in QUESTIONS]


@pytest.mark.real_model
@pytest.mark.parametrize("temperature", [0, 1.0])
def test_it_drafts_for_its_model(prompts, temperature):
    """Without drafts a step brings one token."""
    out = jaxspec.generate(
        load("int8"), prompts, drafter="auto", num_draft_tokens=6, max_new_tokens=64,
        sampling=jaxspec.Sampling(temperature=temperature), key=jax.random.key(0),
    )  # fmt: skip
    per_step = np.sum(out.lengths) / np.sum(out.stats.num_spec_steps)
    assert per_step > 1.7, per_step  # 2.1 at temperature 1


@pytest.mark.real_model
def test_its_trees_write_the_text_of_plain_decoding(prompts):
    """Float32, four prompts of different lengths at once."""
    prompts = [prompts[0], prompts[1][1:], *prompts[2:]]
    assert len({len(prompt) for prompt in prompts}) == 4
    model = load("float32")
    drafter = jaxspec_models.load_drafter(DIRECTORIES[0], model)
    options = {"sampling": jaxspec.Sampling(temperature=0), "max_new_tokens": 200, "eos_ids": ()}
    plain = jaxspec.generate(model, prompts, **options)
    tree = trees.sequoia([0.55, 0.15, 0.08, 0.05], 9, max_depth=4)
    drafted = jaxspec.generate(
        model, prompts, drafter=jaxspec_models.in_trees(drafter, tree), **options
    )
    np.testing.assert_array_equal(drafted.tokens, plain.tokens)
    assert np.all(drafted.stats.tokens_per_step > 1.7)
