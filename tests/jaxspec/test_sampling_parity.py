"""Sampling options against values that HF transformers computed, in HF's order."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxspec import Sampling, sampling
from jaxspec.sampling import processing

_FILE = np.load(Path(__file__).parents[1] / "fixtures" / "sampling.npz")
_CASES = sorted({int(name.split("/")[0]) for name in _FILE})
_EOS_IDS = [2, 5]


def _halve_even_ids(text, logits):
    del text
    return jnp.where(jnp.arange(logits.shape[0]) % 2 == 0, logits / 2, logits)


def _sampling(options):
    """`GenerationConfig`'s fields as ours; HF leaves out a bad word that is an EOS alone."""
    options = dict(options)
    if options.pop("custom", False):
        options["processor"] = _halve_even_ids
    if bias := options.pop("sequence_bias", None):
        options["logit_bias"] = {ids[0]: value for ids, value in bias}
    if words := options.pop("bad_words_ids", None):
        options["bad_words"] = [word for word in words if word not in [[e] for e in _EOS_IDS]]
    return Sampling(**options)


@pytest.mark.parametrize("as_drafts", [False, True])
@pytest.mark.parametrize("case", _CASES)
def test_scores_are_those_of_transformers(case, as_drafts):
    """The last tokens count the same whether committed or drafted."""
    ids, logits = _FILE[f"{case}/input_ids"], _FILE[f"{case}/logits"]
    scores, prompt_length = _FILE[f"{case}/scores"], int(_FILE[f"{case}/prompt_length"])
    batch, length = ids.shape
    vocab_size = logits.shape[1]
    options = json.loads(str(_FILE[f"{case}/options"]))
    resolved = sampling.resolve(_sampling(options), batch, vocab_size)
    num_drafts = 4 if as_drafts else 0
    num_committed = length - num_drafts
    tokens = np.where(np.arange(length + 1) < num_committed, np.pad(ids, ((0, 0), (0, 1))), 7)
    history = sampling.recall(
        resolved,
        jnp.asarray(tokens, jnp.int32),
        jnp.full((batch,), num_committed, jnp.int32),
        vocab_size=vocab_size,
        prompt_lengths=jnp.full((batch,), prompt_length, jnp.int32),
        eos_ids=jnp.asarray(_EOS_IDS),
    )
    drafts = jnp.asarray(np.pad(ids[:, num_committed:], ((0, 0), (0, 1))), jnp.int32)
    ours = jax.jit(processing.process_rows)(
        jnp.asarray(logits), resolved, history, drafts, num_drafts
    ).log_probs
    with np.errstate(divide="ignore"):
        expected = scores - scores.max(axis=1, keepdims=True)
        expected = expected - np.log(np.exp(expected).sum(axis=1, keepdims=True))
    np.testing.assert_array_equal(np.isfinite(ours), np.isfinite(expected))
    np.testing.assert_allclose(np.asarray(ours), expected, atol=2e-6, rtol=1e-5)


def test_every_option_of_a_case_changes_something():
    for case in _CASES:
        options = json.loads(str(_FILE[f"{case}/options"]))
        difference = np.exp(_FILE[f"{case}/logits"]) - np.exp(_FILE[f"{case}/scores"])
        # 8 tokens are new: a minimum of 8 is met, and one of 9 is not.
        is_neutral = options in ({}, {"min_new_tokens": 8})
        assert (np.abs(difference).max() > 1e-3) != is_neutral, options
