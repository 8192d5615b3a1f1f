"""The exactness matrix: drafters × verifiers × policies × options × batch mixes.

One *run* is one call of `check_lossless`: a drafter, a verifier, a policy and a mix, with a row of
the batch for every option, so that rows of all options are neighbours in one compiled program.
One *cell* is one option of one run.
"""

from __future__ import annotations

import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jaxspec
from jaxspec import Draft, Sampling, drafters, policies, pytree, verifiers
from jaxspec.drawing import draw
from jaxspec.testing import check_lossless, random_logits, table_model
from jaxspec.types import Signals

VOCAB, ORDER, NEW, DRAFTS = 3, 2, 4, 3


def _target_logits():
    table = random_logits(4, vocab_size=VOCAB, order=ORDER, scale=1.0)
    # Behind the greedy row's prompt (… 0, 2): two logits a hair's breadth apart.
    table[0 * VOCAB + 2] = [0.25, 1.0, 1.000002]
    return table


TARGET = table_model(_target_logits(), order=ORDER)
# All logits 100 higher: the same law, unless they are rounded to bfloat16 somewhere.
OTHER = table_model(random_logits(1, vocab_size=VOCAB, order=ORDER) + np.float32(100), order=ORDER)

# ---------------------------------------------------------------------------------------------
# A drafter and a policy as users write them.


@pytree.dataclass
class Unigram:
    """Draws from the row's own token counts, as in docs/exactness.md, and asks the policy."""

    vocab_size: int = pytree.static()

    hidden_layers = ()

    def init(self, batch, capacity):
        return ()

    def prefill(self, state, tokens, hidden, start, num_new):
        return state

    def propose(self, keys, state, context, num_draft, keep_drafting):
        is_text = jnp.arange(context.tokens.shape[1])[None] < context.lengths[:, None]
        of_each = jax.nn.one_hot(context.tokens, self.vocab_size)
        counts = 1.0 + jnp.sum(jnp.where(is_text[:, :, None], of_each, 0.0), axis=1)
        log_probs = jnp.log(counts / jnp.sum(counts, axis=1, keepdims=True))  # f32[B, V]
        uniforms = jax.vmap(jax.vmap(lambda key: jax.random.uniform(key, (2,))))(keys)
        tokens = jax.vmap(jax.vmap(draw, in_axes=(0, None)))(uniforms, jnp.exp(log_probs))
        # The policy's say before each slot, from the law alone.
        length = jnp.zeros_like(num_draft)
        for slot in range(keys.shape[1]):
            at = jnp.full_like(num_draft, slot)
            goes_on = keep_drafting(Signals(at, log_probs)) & (slot < num_draft)
            length = length + (goes_on & (length == slot)).astype(jnp.int32)
        shape = (*keys.shape, self.vocab_size)
        return Draft(tokens, jnp.broadcast_to(log_probs[:, None], shape), length), state

    def commit(self, state, outcome):
        return state


@pytree.dataclass
class Confident:
    """Drafts while the law about to be drawn from is concentrated: looks at q, never at a token."""

    threshold: float

    def init(self, batch):
        return jnp.zeros((batch,), jnp.int32)

    def num_draft(self, state):
        return jnp.full_like(state, DRAFTS)

    def keep_drafting(self, state, signals):
        return jnp.max(signals.log_probs, axis=-1) > jnp.log(self.threshold)

    def update(self, state, outcome):
        return state


# ---------------------------------------------------------------------------------------------
# The axes.

_OWN = Sampling(temperature=0.7, top_k=2, top_p=0.9, min_p=0.05, repetition_penalty=1.3)

DRAFTERS = {
    "equal": lambda module=drafters: module.model(TARGET),
    "disagreeing": lambda module=drafters: module.model(OTHER),
    "own sampling": lambda module=drafters: module.model(OTHER, sampling=_OWN),
    "greedy drafts": lambda module=drafters: module.model(OTHER, sampling=Sampling(temperature=0)),
    "prompt lookup": lambda module=drafters: module.prompt_lookup(max_ngram=2),
    "user-written": lambda module=drafters: Unigram(VOCAB),
}
VERIFIERS = {
    "default": lambda: None,
    "rejection": verifiers.rejection,
    "block": verifiers.block,
    "match": verifiers.match,
    "match, own noise": functools.partial(verifiers.match, share_noise=False),
    "greedy": verifiers.greedy,
}
# Lengths of 0, 1 and 3 all come up in four tokens, and so do pauses.
_PROFILE = jaxspec.Profile(jnp.array([1.0, 1.2, 1.7, 1.8]), jnp.float32(0.05), jnp.float32(0.05))
POLICIES = {
    "fixed": lambda: policies.fixed(DRAFTS),
    "heuristic": lambda: policies.heuristic(1),
    "confident": lambda: Confident(0.5),
    "goodput": lambda: policies.goodput(_PROFILE, memory=2.0),
    "guarded": lambda: policies.guarded(
        policies.fixed(2), _PROFILE, allowance=0.1, pause=1, longest_pause=2
    ),
}
OPTIONS = {
    "temperature": {"temperature": 0.5},
    "top-k": {"top_k": 2},
    "top-p": {"top_p": 0.8},
    "min-p": {"min_p": 0.3},
    "repetition penalty": {"repetition_penalty": 2.5},
    "temperature and top-p": {"temperature": 1.7, "top_p": 0.75},  # in this order
    "all at once": {
        "temperature": 1.3,
        "top_k": 2,
        "top_p": 0.85,
        "min_p": 0.05,
        "repetition_penalty": 1.5,
    },
    "greedy row": {"temperature": 0.0},
}
GREEDY_OPTIONS = {
    "greedy row": {},
    "greedy row, repetition penalty": {"repetition_penalty": 2.5},
}
_LONG, _MIDDLE, _SHORT = (2, 0, 2), (0, 1), (2,)  # a token unseen in each: penalties show
MIXES = {
    # (prompts, one for each option in turn; EOS tokens)
    "one length": ((_LONG,), (VOCAB,)),  # an id that is never drawn: one shape for all
    "other lengths": ((_MIDDLE, _LONG, _SHORT), (VOCAB,)),
    "rows that stop early": ((_LONG, _SHORT, _MIDDLE), (1,)),
}
_NEUTRAL = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}


class Run(NamedTuple):
    drafter: str
    verifier: str
    policy: str
    mix: str

    def __str__(self):
        return ", ".join(self)


def prompts_of(mix: str, options) -> list[tuple[int, ...]]:
    """One prompt for each option; the greedy row's ends in (0, 2)."""
    prompts = MIXES[mix][0]
    numbers = {name: i for i, name in enumerate(OPTIONS)}
    return [
        _LONG if "greedy" in name else prompts[numbers[name] % len(prompts)] for name in options
    ]


def sampling_of(options: dict) -> Sampling:
    """An array of one element for each option: data, one program for all."""
    return Sampling(
        **{
            name: np.array([option.get(name, neutral) for option in options.values()])
            for name, neutral in _NEUTRAL.items()
        }
    )


def check(
    run: Run, options=None, *, drafter=None, verifier=None, policy=None, generate=None, **kwargs
):
    """The `LosslessReport` of a run; strategies given by value replace those of its names."""
    options = {name: OPTIONS[name] for name in options or OPTIONS}
    sampling = sampling_of(options)
    if run.verifier == "greedy":
        options = GREEDY_OPTIONS
        penalty = np.array([option.get("repetition_penalty", 1.0) for option in options.values()])
        sampling = Sampling(temperature=0, repetition_penalty=penalty)
        kwargs["num_samples"] = 200  # a law of one text
    return check_lossless(
        TARGET,
        DRAFTERS[run.drafter]() if drafter is None else drafter,
        VERIFIERS[run.verifier]() if verifier is None else verifier,
        POLICIES[run.policy]() if policy is None else policy,
        sampling,
        prompts=prompts_of(run.mix, options),
        max_new_tokens=NEW,
        num_draft_tokens=DRAFTS,
        eos_ids=MIXES[run.mix][1],
        key=jax.random.key(7),
        generate=jaxspec.generate if generate is None else generate,
        **kwargs,
    )


def problems_of(run: Run, report) -> list[str]:
    """What a run shows to be wrong: the report's findings, and a draft equal to the target."""
    problems = [] if report.passed else [str(report)]
    is_deterministic = run.verifier in ("match, own noise", "greedy")
    if run.drafter == "equal" and not is_deterministic:
        if report.acceptance_rate != 1.0:
            problems.append(f"an equal draft is accepted at {report.acceptance_rate}, not 1")
        never_stops = MIXES[run.mix][1] == (VOCAB,)
        if run.policy == "fixed" and never_stops and report.tokens_per_step != NEW:
            problems.append(f"{report.tokens_per_step} tokens a step, not {NEW}: no bonus")
    return problems


ALL_RUNS = [Run(*names) for names in itertools.product(DRAFTERS, VERIFIERS, POLICIES, MIXES)]


def _default_runs() -> list[Run]:
    """Every pair of drafter and verifier; with each, another policy and mix (a Latin square)."""
    runs = []
    lossless = [name for name in VERIFIERS if name != "default"]  # the default is one of them
    for (i, drafter), (j, verifier) in itertools.product(enumerate(DRAFTERS), enumerate(lossless)):
        policy = list(POLICIES)[(i + j) % len(POLICIES)]
        mix = list(MIXES)[(i + 2 * j + i // 3) % len(MIXES)]
        runs.append(Run(drafter, verifier, policy, mix))
    return runs


DEFAULT_RUNS = _default_runs()
