"""Calls of transformers' `generate`, translated."""

import jax
import numpy as np
import pytest
import transformers

import jaxspec
from jaxspec import Sampling
from jaxspec.testing import random_logits, table_model
from jaxspec_models import from_hf

LEFT = {
    "input_ids": np.array([[9, 9, 5], [3, 4, 5], [9, 1, 9]]),
    "attention_mask": np.array([[0, 0, 1], [1, 1, 1], [0, 1, 1]]),
}
ROWS = [[5], [3, 4, 5], [1, 9]]


def _config(**fields):
    return transformers.GenerationConfig(**fields)


@pytest.mark.parametrize("make", [_config, dict])
def test_every_field_has_its_counterpart(make):
    config = make(
        max_new_tokens=7, min_new_tokens=2, do_sample=True, temperature=0.7, top_k=11, top_p=0.8,
        min_p=0.05, typical_p=0.9, repetition_penalty=1.3, no_repeat_ngram_size=3,
        bad_words_ids=[[4, 5], [2], [6]], suppress_tokens=[1, 3], sequence_bias={(7,): -1.5},
        eos_token_id=[2, 8], pad_token_id=9, num_return_sequences=3,
    )  # fmt: skip
    assert from_hf(LEFT, config) == {
        "prompts": ROWS,
        "max_new_tokens": 7,
        "eos_ids": (2, 8),
        "pad_id": 9,
        "num_return_sequences": 3,
        "sampling": Sampling(
            temperature=0.7, top_k=11, top_p=0.8, min_p=0.05, typical_p=0.9,
            repetition_penalty=1.3, no_repeat_ngram_size=3, min_new_tokens=2,
            bad_words=[[4, 5], [6]], suppress_tokens=[1, 3], logit_bias={7: -1.5},
        ),
    }  # fmt: skip


def test_what_is_left_out_is_what_transformers_takes():
    assert from_hf(LEFT) == {
        "prompts": ROWS, "max_new_tokens": 17, "sampling": Sampling(temperature=0),
    }  # fmt: skip
    sampled = from_hf(LEFT, _config(do_sample=True))
    assert sampled["sampling"] == Sampling(top_k=50)
    # Greedy: the numbers of drawing do not count.
    greedy = from_hf(LEFT, _config(temperature=0.3, top_k=2, repetition_penalty=1.1))
    assert greedy["sampling"] == Sampling(temperature=0, repetition_penalty=1.1)


def test_lengths_with_the_prompt():
    arguments = from_hf(LEFT, {"max_length": 10, "min_length": 6})
    assert arguments["max_new_tokens"] == 7
    assert arguments["sampling"].min_new_tokens == 3
    assert from_hf(LEFT, {"max_length": 3, "max_new_tokens": 4})["max_new_tokens"] == 4
    with pytest.raises(ValueError, match=r"max_length=3 counts the 3 tokens .* set max_new_tokens"):
        from_hf(LEFT, {"max_length": 3})


def test_prompt_lookup():
    arguments = from_hf(LEFT, _config(prompt_lookup_num_tokens=6, max_matching_ngram_size=4))
    assert arguments["num_draft_tokens"] == 6
    assert arguments["drafter"] == jaxspec.drafters.prompt_lookup(max_ngram=4)
    assert from_hf(LEFT, {"num_assistant_tokens": 3})["num_draft_tokens"] == 3


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"num_beams": 4}, "num_beams=4"),
        ({"stop_strings": ["."]}, "stop_strings"),
        ({"guidance_scale": 2.0, "forced_eos_token_id": 2}, "guidance_scale=2.0"),
        ({"guidance_scale": 2.0, "forced_eos_token_id": 2}, "forced_eos_token_id=2"),
        ({"output_scores": True}, "output_scores=True .log_probs"),
        ({"output_hidden_states": True}, "output_hidden_states=True"),
        ({"a_field_of_tomorrow": 1}, "a_field_of_tomorrow=1"),
        ({"sequence_bias": {(1, 2): 3.0}}, r"sequence_bias of \[1, 2\]"),
    ],
)
def test_what_has_no_counterpart_is_named(fields, named):
    with pytest.raises(ValueError, match=named):
        from_hf(LEFT, fields)


@pytest.mark.parametrize(
    "fields",
    [{"num_beams": 1}, {"use_cache": True}, {"guidance_scale": None}, {"output_scores": False}],
)
def test_neutral_fields_are_dropped(fields):
    assert from_hf(LEFT, fields) == from_hf(LEFT)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"tokens": [[1]]}, r"inputs must have input_ids.*got \['tokens'\]"),
        ([[1], [2, 3]], r"input_ids must be integers \[B, L\]"),
        ([1, 2], "input_ids must be integers"),
        ([[0.5]], "input_ids must be integers"),
        ({"input_ids": [[1, 2]], "attention_mask": [[1]]}, "attention_mask must have the shape"),
        ({"input_ids": [[1], [2]], "attention_mask": [[1], [0]]}, "row 1 is all padding"),
    ],
)
def test_wrong_inputs_are_refused(inputs, message):
    with pytest.raises(ValueError, match=message):
        from_hf(inputs)
    with pytest.raises(ValueError, match=r"must be a transformers\.GenerationConfig or a mapping"):
        from_hf(LEFT, 3)


def test_a_left_padded_batch_is_generated():
    target = table_model(random_logits(0, vocab_size=10, order=2), order=2)
    config = _config(do_sample=True, top_p=0.9, max_new_tokens=6, num_return_sequences=2)
    out = jaxspec.generate(target, key=jax.random.key(0), **from_hf(LEFT, config))
    want = jaxspec.generate(
        target, [row for row in ROWS for _ in range(2)], key=jax.random.key(0), max_new_tokens=6,
        sampling=Sampling(top_k=50, top_p=0.9),
    )  # fmt: skip
    np.testing.assert_array_equal(out.tokens, want.tokens)


def test_a_tokenizers_output_is_taken_as_it_is():
    inputs = transformers.BatchEncoding({k: v.tolist() for k, v in LEFT.items()})
    assert from_hf(inputs)["prompts"] == ROWS
    assert from_hf([[1, 2]])["prompts"] == [[1, 2]]
