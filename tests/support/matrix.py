"""The exactness matrix: drafters × verifiers × policies × options × batch mixes.

One *run* is one call of `check_lossless`: a drafter, a verifier, a policy, a mix and a group of
options, with a row of the batch for every option of the group, so that rows of all of them are
neighbours in one compiled program. One *cell* is one option of one run.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jaxspec
from jaxspec import Draft, Sampling, drafters, policies, pytree, sampling, trees, verifiers
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
# A drafter as users write them.


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


# ---------------------------------------------------------------------------------------------
# The axes.

_OWN = Sampling(
    temperature=0.7,
    top_k=2,
    top_p=0.9,
    min_p=0.05,
    repetition_penalty=1.3,
    frequency_penalty=0.4,
    min_new_tokens=2,
)

DRAFTERS = {
    "equal": lambda module=drafters: module.model(TARGET),
    "disagreeing": lambda module=drafters: module.model(OTHER),
    "own sampling": lambda module=drafters: module.model(OTHER, sampling=_OWN),
    "greedy drafts": lambda module=drafters: module.model(OTHER, sampling=Sampling(temperature=0)),
    "prompt lookup": lambda module=drafters: module.prompt_lookup(max_ngram=2),
    "user-written": lambda module=drafters: Unigram(VOCAB),
    "lookup, else a model": lambda module=drafters: module.fallback(
        module.prompt_lookup(max_ngram=2, min_ngram=2), module.model(OTHER)
    ),
}
_COMB, _BINARY = trees.comb((2, 2, 1)), trees.kary((2, 2))
_SEQUOIA = trees.sequoia([0.55, 0.2, 0.1], 7)
_BEAM = trees.Beam(width=1, depth=3, branching=2)  # which of two goes on, the draw decides
_BEST = trees.Beam(width=2, depth=3, best=5)
TREE_DRAFTERS = {
    "k-ary, without replacement": lambda module=drafters: module.model(OTHER, tree=_BINARY),
    "comb, without replacement": lambda module=drafters: module.model(OTHER, tree=_COMB),
    "Sequoia, without replacement": lambda module=drafters: module.model(OTHER, tree=_SEQUOIA),
    "k-ary, independent": lambda module=drafters: module.model(
        OTHER, tree=_BINARY, children="independent"
    ),
    "comb, independent": lambda module=drafters: module.model(
        OTHER, tree=_COMB, children="independent"
    ),
    "Sequoia, independent, own sampling": lambda module=drafters: module.model(
        OTHER, tree=_SEQUOIA, children="independent", sampling=_OWN
    ),
    "k-ary, top-k": lambda module=drafters: module.model(OTHER, tree=_BINARY, children="top_k"),
    "comb, top-k": lambda module=drafters: module.model(OTHER, tree=_COMB, children="top_k"),
    "Sequoia, top-k": lambda module=drafters: module.model(OTHER, tree=_SEQUOIA, children="top_k"),
    "prompt lookup, k-ary, top-k": lambda module=drafters: module.prompt_lookup(2, tree=_BINARY),
    "token recycling, comb, top-k": lambda module=drafters: module.token_recycling(
        VOCAB, tree=_COMB, num_successors=2
    ),
    "beam, independent": lambda module=drafters: module.model(
        OTHER, tree=_BEAM, children="independent"
    ),
    "best of a beam, top-k": lambda module=drafters: module.model(OTHER, tree=_BEST),
    "beam, without replacement": lambda module=drafters: module.model(OTHER, tree=_BEAM),
}
TREE_VERIFIERS = {
    "descent": verifiers.descent,
    "recursive rejection": verifiers.recursive_rejection,
    "recursive rejection, independent": functools.partial(
        verifiers.recursive_rejection, with_replacement=True
    ),
    "k-seq": verifiers.k_seq,
    "traversal": verifiers.traversal,
    "traversal, independent": functools.partial(verifiers.traversal, with_replacement=True),
}
TREE_POLICIES = {"whole tree": lambda: policies.fixed(99)}
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
    "confidence": lambda: policies.confidence(0.3),
    "goodput": lambda: policies.goodput(_PROFILE, memory=2.0),
    "guarded": lambda: policies.guarded(
        policies.fixed(2), _PROFILE, allowance=0.1, pause=1, longest_pause=2
    ),
}
_DRAWING = {
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
# State 3 allows everything and never changes: the rows of the other options start there.
_TABLE = [[1, 0, 2], [2, -1, 1], [0, 2, -1], [3, 3, 3]]
_MACHINE = sampling.grammar_of(_TABLE)
_BIAS, _BAD_WORDS = [1.2, -0.8, 0.0], [[-1, 0, 2], [2, 1, 1]]
_LOOKING_BACK = {
    "typical-p": {"typical_p": 0.5},
    "presence penalty": {"presence_penalty": 1.5},
    "frequency penalty": {"frequency_penalty": 0.9},
    "no pair twice": {"no_repeat_ngram_size": 2},
    "no token twice": {"no_repeat_ngram_size": 1},  # soon none is left, and the row stops
    "logit bias": {"logit_bias": _BIAS},
    "bad words": {"bad_words": _BAD_WORDS},
    "suppressed token": {"suppress_tokens": [0]},
    "min new tokens": {"min_new_tokens": 3},
    "grammar": {"grammar": 0},
    # eleven combinations
    "three penalties": {
        "repetition_penalty": 1.4,
        "presence_penalty": 0.6,
        "frequency_penalty": 0.5,
    },
    "rewards for repeating": {"presence_penalty": -0.8, "frequency_penalty": -0.4},
    "greedy row with penalties": {"temperature": 0.0, "frequency_penalty": 0.7},
    "frequency penalty and top-k": {"frequency_penalty": 0.8, "temperature": 0.7, "top_k": 2},
    "presence penalty and top-p": {"presence_penalty": 1.1, "top_p": 0.8},
    "typical-p behind top-p": {"temperature": 1.4, "top_p": 0.93, "typical_p": 0.7},
    "bias under a penalty": {"logit_bias": _BIAS, "repetition_penalty": 1.8},
    "no pair twice, no bad words": {"no_repeat_ngram_size": 2, "bad_words": _BAD_WORDS},
    "grammar and a penalty": {"grammar": 1, "repetition_penalty": 1.7, "temperature": 0.8},
    "min new tokens and a penalty": {"min_new_tokens": 2, "frequency_penalty": -1.0},
    "everything": {
        "logit_bias": _BIAS,
        "repetition_penalty": 1.2,
        "presence_penalty": 0.3,
        "frequency_penalty": 0.2,
        "no_repeat_ngram_size": 3,
        "bad_words": _BAD_WORDS,
        "min_new_tokens": 1,
        "temperature": 1.3,
        "top_k": 2,
        "top_p": 0.9,
        "min_p": 0.05,
        "typical_p": 0.95,
    },
}


def shy(text, logits):
    """A user's processor: the token two places back is unlikely, and 1 never follows 1."""
    before = text.tokens[jnp.maximum(text.length - 2, 0)]
    last = text.tokens[text.length - 1]
    logits = logits.at[before].add(-1.3)
    return logits.at[jnp.where(last == 1, 1, logits.shape[0])].set(-jnp.inf, mode="drop")


_PROCESSED = {
    "processor": {},
    "processor and penalties": {"repetition_penalty": 1.5, "frequency_penalty": 0.6},
    "processor and cuts": {"temperature": 0.8, "top_k": 2, "min_p": 0.1},
    "processor and greedy row": {"temperature": 0.0},
}
GROUPS = {"drawing": _DRAWING, "looking back": _LOOKING_BACK, "processed": _PROCESSED}
_GREEDY_GROUPS = {
    "drawing": {
        "greedy row": {},
        "greedy row, repetition penalty": {"repetition_penalty": 2.5},
    },
    "looking back": {
        name: {key: value for key, value in options.items() if key != "temperature"}
        for name, options in _LOOKING_BACK.items()
        if not {"top_k", "top_p", "min_p", "typical_p"} & set(options)
    },
    "processed": {"processor": {}},
}
_LONG, _MIDDLE, _SHORT = (2, 0, 2), (0, 1), (2,)  # a token unseen in each: penalties show
MIXES = {
    # (prompts, one for each option in turn; EOS tokens)
    "one length": ((_LONG,), (VOCAB,)),  # an id that is never drawn: one shape for all
    "other lengths": ((_MIDDLE, _LONG, _SHORT), (VOCAB,)),
    "rows that stop early": ((_LONG, _SHORT, _MIDDLE), (1,)),
}
_NUMBERS = {
    field.name: field.default for field in dataclasses.fields(Sampling) if field.default is not None
}
_FREE = 3
_ARRAYS = {
    "logit_bias": [0.0] * VOCAB,
    "bad_words": [[-1, -1, -1]] * 2,
    "suppress_tokens": [-1],
    "grammar": _FREE,
}


class Run(NamedTuple):
    drafter: str
    verifier: str
    policy: str
    mix: str
    group: str = "drawing"

    def __str__(self):
        return ", ".join(self)


def prompts_of(mix: str, options) -> list[tuple[int, ...]]:
    """One prompt for each option; the greedy row's ends in (0, 2)."""
    prompts = MIXES[mix][0]
    numbers = {name: i for group in GROUPS.values() for i, name in enumerate(group)}
    return [
        _LONG if "greedy" in name else prompts[numbers[name] % len(prompts)] for name in options
    ]


def sampling_of(options: dict, group: str = "drawing", **fixed) -> Sampling:
    """An array of one element for each option: data, one program for all."""
    neutral = _NUMBERS | _ARRAYS
    if group == "drawing":  # only what these options use: the rest is off
        used = {name for option in _DRAWING.values() for name in option}
        neutral = {name: value for name, value in _NUMBERS.items() if name in used}
    if group == "processed":
        fixed = fixed | {"processor": shy}
    given = {
        name: np.array([option.get(name, value) for option in options.values()])
        for name, value in neutral.items()
    }
    if "grammar" in given:
        given["grammar"] = dataclasses.replace(_MACHINE, start=given["grammar"])
    return Sampling(**given | fixed)


def own(options: dict) -> dict:
    """One row's options as arguments of `Sampling`."""
    if "grammar" not in options:
        return options
    return options | {"grammar": dataclasses.replace(_MACHINE, start=np.array(options["grammar"]))}


def check(
    run: Run, options=None, *, drafter=None, verifier=None, policy=None, generate=None, **kwargs
):
    """The `LosslessReport` of a run; strategies given by value replace those of its names."""
    options = {name: GROUPS[run.group][name] for name in options or GROUPS[run.group]}
    sampling = sampling_of(options, run.group)
    if run.verifier == "greedy":
        options = _GREEDY_GROUPS[run.group]
        sampling = sampling_of(options, run.group, temperature=0)
        kwargs["num_samples"] = 200  # a law of one text
    return check_lossless(
        TARGET,
        (DRAFTERS | TREE_DRAFTERS)[run.drafter]() if drafter is None else drafter,
        (VERIFIERS | TREE_VERIFIERS)[run.verifier]() if verifier is None else verifier,
        (POLICIES | TREE_POLICIES)[run.policy]() if policy is None else policy,
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
        # A row that has no token left ("no token twice") stops, too.
        never_stops = MIXES[run.mix][1] == (VOCAB,) and run.group != "looking back"
        if run.policy == "fixed" and never_stops and report.tokens_per_step != NEW:
            problems.append(f"{report.tokens_per_step} tokens a step, not {NEW}: no bonus")
    return problems


ALL_RUNS = [
    Run(*names) for names in itertools.product(DRAFTERS, VERIFIERS, POLICIES, MIXES, GROUPS)
]


def _default_runs() -> list[Run]:
    """Every pair of drafter and verifier; with each, another policy and mix (a Latin square)."""
    runs = []
    lossless = [name for name in VERIFIERS if name != "default"]  # the default is one of them
    for (i, drafter), (j, verifier) in itertools.product(enumerate(DRAFTERS), enumerate(lossless)):
        policy = list(POLICIES)[(i + j) % len(POLICIES)]
        mix = list(MIXES)[(i + 2 * j + i // 3) % len(MIXES)]
        runs.append(Run(drafter, verifier, policy, mix))
    return runs


def cells_of(run: Run) -> int:
    """How many laws a run compares."""
    return len((_GREEDY_GROUPS if run.verifier == "greedy" else GROUPS)[run.group])


DEFAULT_RUNS = _default_runs()
# Each drafter and each rule, and the end that can be banned in half of them.
RUNS_LOOKING_BACK = [
    Run("disagreeing", "block", "fixed", "rows that stop early", "looking back"),
    Run("own sampling", "rejection", "goodput", "other lengths", "looking back"),
    Run("prompt lookup", "match", "heuristic", "rows that stop early", "looking back"),
    Run("user-written", "block", "confidence", "other lengths", "looking back"),
    Run("greedy drafts", "greedy", "guarded", "rows that stop early", "looking back"),
    Run("equal", "rejection", "fixed", "other lengths", "processed"),
    Run("disagreeing", "match, own noise", "guarded", "rows that stop early", "processed"),
]


def _tree_runs() -> list[Run]:
    """Every rule for trees with every topology and way to find children that it takes."""
    names = {
        "without replacement": ("recursive rejection", "traversal", "descent"),
        "independent": ("recursive rejection, independent", "traversal, independent", "k-seq"),
        "top-k": ("descent", "recursive rejection", "traversal"),
    }
    runs = []
    for i, drafter in enumerate(TREE_DRAFTERS):
        kind = next(name for name in names if name in drafter)
        for j, verifier in enumerate((*names[kind], "greedy")):
            policy = ("whole tree", "fixed", "heuristic")[len(runs) // 3 % 3]
            mix = list(MIXES)[(i + 2 * j + i // 3) % len(MIXES)]
            runs.append(Run(drafter, verifier, policy, mix))
    return runs


ALL_TREE_RUNS = _tree_runs()
# Each drafter with one of its rules, each rule with each way to find children that it is for.
TREE_RUNS = [ALL_TREE_RUNS[4 * i + i % 3] for i in range(len(TREE_DRAFTERS))]
TREE_RUNS_LOOKING_BACK = [
    Run("Sequoia, without replacement", "traversal", "whole tree", "other lengths", "looking back"),
    Run("k-ary, top-k", "descent", "heuristic", "rows that stop early", "looking back"),
    Run("comb, without replacement", "greedy", "whole tree", "other lengths", "looking back"),
    Run(
        "k-ary, without replacement",
        "recursive rejection",
        "whole tree",
        "rows that stop early",
        "processed",
    ),
]
