"""A tiny target, its answers with features, and drafters of every method for it."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jaxspec
from jaxspec_models import answers, drafter_training, features, llama
from jaxspec_models.drafters import learning, methods, parts

V, K = 32, 3
CONFIG = llama.LlamaConfig(
    vocab_size=V, hidden_size=16, intermediate_size=24, num_hidden_layers=3,
    num_attention_heads=2, num_key_value_heads=1, head_dim=8, dtype="float32", eos_ids=(3,),
)  # fmt: skip
PARAMS = llama.init_params(CONFIG, seed=0)
PARAMS["head"]["weight"] *= 2  # surer of itself
TARGET = llama.language_model(CONFIG, PARAMS)
LAYERS = (1, 2, -1)
_SHARED = {"num_draft_tokens": K, "draft_vocab_size": 24, "intermediate_size": 24}
SHAPES = {
    "block": methods.of("block").config(
        CONFIG, LAYERS, num_hidden_layers=2, markov_rank=8, **_SHARED
    ),
    "eagle3": methods.of("eagle3").config(CONFIG, LAYERS, **_SHARED),
    "student": methods.of("student").config(CONFIG, num_hidden_layers=1, **_SHARED),
}
SETTINGS = drafter_training.Settings(
    num_steps=40, tokens_a_part=1024, parts_a_step=2, anchors_a_text=24, learning_rate=1e-2
)


class Tokenizer:
    """As many tokens as characters."""

    def encode(self, text, add_special_tokens=True):
        del add_special_tokens
        return [ord(letter) % V for letter in text]

    def apply_chat_template(self, messages, *, tokenize, add_generation_prompt):
        del tokenize, add_generation_prompt
        return messages[0]["content"]


class Learned(NamedTuple):
    """Answers of the target.

    Attributes:
      texts: what a step learns from, by the name of the method.
      ids: the draft vocabulary.
      frozen: of the target.
    """

    texts: dict[str, drafter_training.Texts]
    ids: np.ndarray
    frozen: learning.Frozen


def write(root, prompts=range(64), settings=SETTINGS, **options) -> Learned:
    """Lets the target answer prompts, told apart by their numbers."""
    prompts = ["".join(map(chr, np.random.default_rng(i).integers(97, 122, 6))) for i in prompts]
    options = {"max_new_tokens": 40, "batch": 32, **options}
    answers.write_answers(TARGET, Tokenizer(), prompts, root / "answers", target="tiny", **options)
    features.write_features(
        TARGET, root / "answers", root / "features", layers=LAYERS, weights="float32"
    )
    texts = {}
    for method, shape in SHAPES.items():
        found, read = features.read_features(
            root / "answers", root / "features", layers=(*shape.tapped_layers, -1)
        )
        texts[method] = drafter_training.Texts(found, read, settings)
    ids = parts.draft_vocabulary(
        [a.tokens[a.prompt_length :] for a in found], 24, vocab_size=V, always=(3,)
    )
    return Learned(texts, ids, learning.frozen_part(TARGET, SHAPES["block"], jnp.asarray(ids)))


def first_params(learned: Learned, method: str) -> Any:
    """Weights before training."""
    sample = learned.texts[method].sample()
    return methods.of(method).module.init_params(SHAPES[method], TARGET, sample, SETTINGS.seed)


def train(learned: Learned, directory, method="block", settings=SETTINGS, **options) -> Any:
    """Trained weights."""
    options = {"steps_an_evaluation": 10, "seconds_a_checkpoint": 0.0, **options}
    return drafter_training.train(
        SHAPES[method], first_params(learned, method), learned.frozen, learned.texts[method],
        settings, directory, **options,
    )  # fmt: skip


def drafter(learned: Learned, params, method="block", *, shape=None, module=None) -> Any:
    """The drafter of weights; of another module with the method's functions where one is given."""
    module = module or methods.of(method).module
    return module.drafter(TARGET, shape or SHAPES[method], params, learned.ids)


def tokens_per_step(drafter, temperature) -> float:
    """Of eight prompts that were not learned."""
    prompts = np.random.default_rng(9).integers(4, V, (8, 6))
    out = jaxspec.generate(
        TARGET, jnp.asarray(prompts, jnp.int32), drafter=drafter, num_draft_tokens=K,
        max_new_tokens=32, eos_ids=(), key=jax.random.key(0),
        sampling=jaxspec.Sampling(temperature=temperature),
    )  # fmt: skip
    return float(np.sum(out.stats.num_emitted_tokens) / np.sum(out.stats.num_spec_steps))


def with_settings(**changes) -> drafter_training.Settings:
    """The settings with some changed."""
    return dataclasses.replace(SETTINGS, **changes)
