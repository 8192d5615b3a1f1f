"""Every lossless rule in every mix of rows, drawn through `generate`, against exact enumeration.

Each law fails a correct program with probability 1e-6 (fixed seeds: it either always does or
never), and sees one that is off by a total variation of 0.03 with probability 0.99, by the
calculation in `Comparison.power`, which is asserted for every cell. The planted bugs are small
patches of the shipped modules; each has to be caught by a run of the matrix.
"""

import functools

import jax
import pytest
from support import matrix
from support.matrix import Run
from support.mutants import mutant
from support.running import generate_with

import jaxspec
from jaxspec import Sampling, loop, trees
from jaxspec.testing import Oracle

exactness = pytest.mark.exactness
_DISTANCE, _POWER = 0.03, 0.99
PROVEN_RUNS = [
    *matrix.DEFAULT_RUNS,
    *matrix.RUNS_LOOKING_BACK,
    *matrix.TREE_RUNS,
    *matrix.TREE_RUNS_LOOKING_BACK,
]


def prove(run, record_property):
    report = matrix.check(run)
    assert not matrix.problems_of(run, report)
    for row in report.rows:
        assert row.power(_DISTANCE) >= _POWER
    record_property("proven", len(report.rows))
    record_property("total_variation", max(row.total_variation for row in report.rows))


def test_the_matrix_is_large_enough():
    assert sum(map(matrix.cells_of, matrix.DEFAULT_RUNS)) >= 120
    assert sum(map(matrix.cells_of, matrix.RUNS_LOOKING_BACK)) >= 80
    assert sum(map(matrix.cells_of, matrix.TREE_RUNS + matrix.TREE_RUNS_LOOKING_BACK)) >= 60
    for axis, names in enumerate(
        (matrix.DRAFTERS, matrix.VERIFIERS, matrix.POLICIES, matrix.MIXES)
    ):
        missing = set(names) - {run[axis] for run in matrix.DEFAULT_RUNS} - {"default"}
        assert not missing
    for axis, names in enumerate((matrix.TREE_DRAFTERS, matrix.TREE_VERIFIERS)):
        assert set(names) <= {run[axis] for run in matrix.TREE_RUNS}
    pairs = {(run.policy, run.mix) for run in matrix.DEFAULT_RUNS}
    assert len(pairs) == len(matrix.POLICIES) * len(matrix.MIXES)


@pytest.mark.parametrize("group", matrix.GROUPS)
@pytest.mark.parametrize("mix", matrix.MIXES)
def test_every_option_moves_the_law(mix, group):
    """Else the matrix could not see it missing."""
    prompts, eos_ids = matrix.MIXES[mix]
    fixed = {"processor": matrix.shy} if group == "processed" else {}
    for prompt in set(prompts):
        plain = Oracle(matrix.TARGET, prompt, matrix.NEW, eos_ids=eos_ids).law
        for name, options in matrix.GROUPS[group].items():
            if name == "min new tokens" and eos_ids == (matrix.VOCAB,):
                continue  # no token ends the text
            sampling = Sampling(**matrix.own(options), **fixed)
            moved = Oracle(matrix.TARGET, prompt, matrix.NEW, sampling, eos_ids=eos_ids).law
            texts = set(plain) | set(moved)
            distance = 0.5 * sum(abs(plain.get(t, 0.0) - moved.get(t, 0.0)) for t in texts)
            assert distance >= 0.05, name


@exactness
@pytest.mark.parametrize("run", PROVEN_RUNS, ids=str)
def test_law(run, record_property):
    prove(run, record_property)


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "run",
    [r for r in matrix.ALL_RUNS + matrix.ALL_TREE_RUNS if r not in PROVEN_RUNS],
    ids=str,
)
def test_law_exhaustively(run, record_property):
    prove(run, record_property)


@exactness
@pytest.mark.parametrize("drafter", matrix.DRAFTERS)
def test_refused_with_its_reason(drafter, record_property):
    """The greedy rule is exact at temperature 0 only, and says so for every other option."""
    num_refused = 0
    for options in matrix.GROUPS["drawing"].values():
        for sampling in (
            Sampling(**(options or {"temperature": 1.0})),
            matrix.sampling_of({"greedy": {"temperature": 0.0}, "other": options}),
        ):
            if options == {"temperature": 0.0}:
                continue
            with pytest.raises(ValueError, match=r"verifiers\.greedy is exact at temperature 0"):
                jaxspec.generate(
                    matrix.TARGET,
                    [[1], [2]],
                    drafter=matrix.DRAFTERS[drafter](),
                    verifier=jaxspec.verifiers.greedy(),
                    sampling=sampling,
                    key=jax.random.key(0),
                )
            num_refused += 1
    record_property("refused", num_refused)


# ---------------------------------------------------------------------------------------------
# Planted bugs. Each: the run that catches it, the options of its rows, and what to patch.

_DISAGREE = Run("disagreeing", "rejection", "fixed", "other lengths")
_BLOCK = _DISAGREE._replace(verifier="block")
_STOPPING = _DISAGREE._replace(mix="rows that stop early")
_EQUAL = _DISAGREE._replace(drafter="equal")
_LOOKING_BACK = _STOPPING._replace(group="looking back")
_PROCESSED = _DISAGREE._replace(group="processed")
_TREE = Run("k-ary, without replacement", "recursive rejection", "whole tree", "one length")
_FEW = 15_000  # rows for each prompt: a bug is to be seen with fewer than a proof takes
_LOOP, _DRAFTER = "jaxspec.loop", "jaxspec.drafters.model"
_RATIO, _PROCESSING = "jaxspec.verifiers.ratio", "jaxspec.sampling.processing"
_CUTS, _MEMORY = "jaxspec.sampling.cuts", "jaxspec.sampling.memory"
_BEFORE_KEYS = "    if _is_keyed_by_position(engine.verifier):\n        keys ="
_REMEMBER = "memory=sampling.remember(request.options, state.memory, verdict.tokens, num_emitted)"
_ACCEPTED = "num_accepted=jnp.minimum(verdict.num_accepted, num_emitted)"


def _in_loop(*patches, within=None):
    """The loop, or a module that it uses, patched."""
    return lambda: {
        "generate": functools.partial(generate_with, mutant(_LOOP, *patches, within=within))
    }


def _in_prefill(*patches):
    return lambda: {
        "generate": functools.partial(
            generate_with, loop, prefilling=mutant("jaxspec.prefilling", *patches)
        )
    }


def _in_drafter(*patches, lm=matrix.OTHER):
    return lambda: {"drafter": mutant(_DRAFTER, *patches).model(lm)}


def _in_rule(rule, *patches, within=None):
    def strategies():
        broken = mutant(f"jaxspec.verifiers.{rule}", *patches, within=within)
        return {"verifier": getattr(broken, rule)()}

    return strategies


def _in_growth(tree, *patches):
    """How trees are grown, patched."""
    way = ("jaxspec.drafters.model_tree", "jaxspec.drafters.branching")
    return lambda: {
        "drafter": mutant(_DRAFTER, *patches, within=way).model(matrix.OTHER, tree=tree),
    }


def _best_of_drawn():
    """A beam of drawn children, of which those with the largest q are kept."""
    broken = mutant(
        _DRAFTER,
        ("if beam.best is not None:", "if True:"),
        ("lax.top_k(worth, beam.best)", "lax.top_k(worth, 3)"),
        ("jnp.arange(beam.best)", "jnp.arange(3)"),
        ("    log_probs = jnp.concatenate(all_laws, axis=1) if all_laws else None",
         "    log_probs = jnp.concatenate(all_laws, axis=1)[rows, best]\n"
         "    tokens, log_probs = (jnp.pad(x, [(0, 0), (0, 3)] + [(0, 0)] * (x.ndim - 2))\n"
         "                         for x in (tokens, log_probs))\n"
         "    parents = jnp.pad(parents, ((0, 0), (0, 3)), constant_values=NO_NODE)\n"
         "    places = jnp.pad(places, ((0, 0), (0, 3)), constant_values=-1)"),
        within=("jaxspec.drafters.model_tree", "jaxspec.drafters.branching"),
    )  # fmt: skip
    return {"drafter": broken.model(matrix.OTHER, tree=trees.Beam(1, 3, 2))}


def _noise_reused():
    """The draw behind a rejection sees the very number that drew the rejected draft."""
    broken = mutant(
        _LOOP, ("_PROPOSE, _VERIFY, _NOISE = 0, 1, 2", "_PROPOSE, _VERIFY, _NOISE = 0, 0, 2")
    )
    rule = mutant(
        "jaxspec.verifiers.rejection",
        ("jax.random.uniform(key, (3,), jnp.float32))(keys)",
         "jnp.roll(jax.random.uniform(key, (3,), jnp.float32), 1))(keys)"),
        within=_RATIO,
    )  # fmt: skip
    return {"generate": functools.partial(generate_with, broken), "verifier": rule.rejection()}


def _prompt_mask():
    broken = mutant(
        "jaxspec.arguments",
        (
            "tokens = jnp.where(is_prompt, jnp",
            "tokens = jnp.where(is_prompt & (tokens != pad_id), jnp",
        ),
    )
    return {"generate": functools.partial(generate_with, loop, arguments=broken)}


_MUTANTS = {
    # algorithms that took q from elsewhere
    "q of the raw logits, drafts of the processed ones": (
        _DISAGREE, ["temperature"], _in_drafter(
            ('progress.log_probs.at[rows, at].set(scores, mode="drop")',
             'progress.log_probs.at[rows, at].set('
             'jax.nn.log_softmax(output.logits[:, 0]), mode="drop")')),
    ),
    "drafts of logits rounded to bfloat16, q of the float32 ones": (
        _DISAGREE, ["top-p", "repetition penalty"], _in_drafter(
            ("token = choose(jnp.minimum(slot, num_slots - 1), scores)",
             "rounded = output.logits[:, 0].astype(jnp.bfloat16)\n"
             "                token = choose(jnp.minimum(slot, num_slots - 1), jax.vmap("
             "sampling.process)(rounded, options, history, prefix, slot).log_probs)")),
    ),
    "q one slot late": (
        _DISAGREE, ["temperature"], _in_drafter(
            ("at = jnp.where(draws, slot, num_slots)  # out of range: dropped",
             "at = jnp.where(draws, jnp.maximum(slot - 1, 0), num_slots)")),
    ),
    "noise of the draft reused for the residual": (_DISAGREE, ["temperature"], _noise_reused),
    "drafts trimmed by their own value": (
        _DISAGREE, ["temperature"], _in_drafter(
            ("draws = has_next & is_open",
             "peek = choose(jnp.minimum(slot, num_slots - 1), scores)\n"
             "            is_open = is_open & (scores[rows, peek] > jnp.log(0.5))\n"
             "            draws = has_next & is_open")),
    ),
    # options
    "top-p before temperature in verification": (
        _DISAGREE, ["temperature and top-p"], _in_loop(
            ("weighed = cuts.keep_top_p(weighed, options.top_p)",
             "weighed = weighed.where("
             "cuts.keep_top_p(cuts.weigh(logits), options.top_p).weights > 0)"),
            within=_PROCESSING),
    ),
    "greedy rows scaled by a sentinel temperature": (
        _DISAGREE, ["greedy row", "temperature"], _in_loop(
            ("is_greedy_row, 1.0, options.temperature", "is_greedy_row, 1e-5, options.temperature"),
            ("jnp.where(is_greedy_row, _point_mass(logits), log_probs)", "log_probs"),
            within=_PROCESSING),
    ),
    "the bonus skips the options": (
        _DISAGREE, ["top-k"], _in_loop(
            (_BEFORE_KEYS,
             "    scores = scores._replace(log_probs=jnp.concatenate([scores.log_probs[:, :-1], "
             "jax.nn.log_softmax(logits)[:, -1:]], axis=1))\n" + _BEFORE_KEYS)),
    ),
    "penalties frozen at the block's start": (
        _DISAGREE, ["repetition penalty"], _in_loop(
            ("of_row(logits, options, history, drafts, offsets)",
             "of_row(logits, options, history, drafts, 0 * offsets)"),
            within=_PROCESSING),
    ),
    "output penalties frozen at the block's start": (
        _LOOKING_BACK, ["frequency penalty"], _in_loop(
            ("memory.with_drafts(options, history.memory, prefix, prefix_length)",
             "memory.with_drafts(options, history.memory, prefix, 0 * prefix_length)"),
            within=_PROCESSING),
    ),
    "an n-gram banned one position late": (
        _LOOKING_BACK, ["no pair twice"], _in_loop(
            ("Text.of(history, prefix, prefix_length)",
             "Text.of(history, prefix, jnp.maximum(prefix_length - 1, 0))"),
            within=_PROCESSING),
    ),
    "a frequency that counts rejected drafts": (
        _LOOKING_BACK, ["frequency penalty"], _in_loop(
            (_REMEMBER, _REMEMBER.replace("verdict.tokens, num_emitted",
                                          "draft.tokens, draft.length"))),
    ),
    "output penalties count the prompt": (
        _LOOKING_BACK, ["presence penalty"], _in_prefill(
            ("        prompt_lengths=request.prompt_lengths,\n",
             "        prompt_lengths=0 * request.prompt_lengths,\n")),
    ),
    "a grammar advanced over a rejected draft": (
        _LOOKING_BACK, ["grammar"], _in_loop(
            (_REMEMBER, _REMEMBER.replace("verdict.tokens, num_emitted",
                                          "draft.tokens, draft.length"))),
    ),
    "a grammar that stands still inside a draft": (
        _LOOKING_BACK, ["grammar"], _in_loop(
            ("state = grammars.advance(options.grammar, state, prefix, prefix_length)", "pass"),
            within=(_PROCESSING, _MEMORY)),
    ),
    "the end counted from the prompt's beginning": (
        _LOOKING_BACK, ["min new tokens"], _in_loop(
            ("state.memory, state.tokens, state.lengths, request.prompt_lengths, eos_ids",
             "state.memory, state.tokens, state.lengths, 0 * request.prompt_lengths, eos_ids")),
    ),
    "a row without tokens left writes on": (
        _LOOKING_BACK._replace(mix="other lengths"), ["no token twice"], _in_loop(
            ("& jnp.isfinite(jnp.max(log_probs, axis=-1))", "")),
    ),
    "the bonus skips the processor": (
        _PROCESSED, ["processor"], _in_loop(
            (_BEFORE_KEYS,
             "    scores = scores._replace(log_probs=jnp.concatenate([scores.log_probs[:, :-1], "
             "jax.nn.log_softmax(logits)[:, -1:]], axis=1))\n" + _BEFORE_KEYS)),
    ),
    "penalties forget the emitted tokens": (
        _DISAGREE, ["repetition penalty"], _in_loop((_REMEMBER, "memory=state.memory")),
    ),
    "penalties remember rejected drafts": (
        _DISAGREE, ["repetition penalty"], _in_loop(
            (_REMEMBER, _REMEMBER.replace("verdict.tokens, num_emitted",
                                          "draft.tokens, draft.length"))),
    ),
    "a nucleus without the token that crosses top-p": (
        _DISAGREE, ["top-p"], _in_loop(
            ("    return weighed.where((keys >= low) & (~is_tie | (ids >= first_to_stay)))",
             "    keep = (keys >= low) & (~is_tie | (ids >= first_to_stay))\n"
             "    lowest = jnp.min(jnp.where(keep, keys, _HIGHEST))\n"
             "    return weighed.where(keep & ((keys > lowest) | (jnp.sum(keep) == 1)))"),
            within=(_PROCESSING, _CUTS)),
    ),
    # batches
    "the batch's least acceptance, correction written over accepted tokens": (
        _DISAGREE, ["temperature", "min-p"], _in_loop(
            ("    num_emitted, new_status = _truncate(",
             "    least = jnp.min(verdict.num_accepted)\n"
             "    last = jnp.take_along_axis("
             "verdict.tokens, verdict.num_accepted[:, None], axis=1)\n"
             "    slots = jnp.arange(verdict.tokens.shape[1])[None]\n"
             "    verdict = verdict._replace(\n"
             "        tokens=jnp.where(slots == least, last, verdict.tokens),\n"
             "        num_accepted=jnp.zeros_like(verdict.num_accepted) + least)\n"
             "    num_emitted, new_status = _truncate(")),
    ),
    "the pending token is not fed": (
        _DISAGREE, ["temperature"],
        _in_loop(("    start = state.lengths - 1\n", "    start = state.lengths\n")),
    ),
    "prompt tokens equal to the pad id hidden": (_DISAGREE, ["temperature", "min-p"], _prompt_mask),
    # rules
    "the product of the ratios, clipped at the end": (
        _BLOCK, ["temperature"], _in_rule(
            "block",
            ("jnp.minimum(log_weight + log_ratio, 0.0)\n        return log_weight, log_weight",
             "log_weight + log_ratio\n        return log_weight, jnp.minimum(log_weight, 0.0)")),
    ),
    "block breaks at the first failure": (
        _BLOCK, ["temperature"], _in_rule(
            "block",
            ("jnp.max(jnp.where(passes, lengths, 0)).astype(jnp.int32)",
             "jnp.sum(jnp.cumprod(passes.astype(jnp.int32)), dtype=jnp.int32)")),
    ),
    "a bonus behind a last draft that was rejected": (
        _DISAGREE, ["temperature"], _in_rule(
            "rejection",
            ("        return ratio.conclude(",
             "        is_last = num_accepted == draft.length - 1\n"
             "        num_accepted = jnp.where(is_last, draft.length, num_accepted)\n"
             "        return ratio.conclude(")),
    ),
    "drafts behind a rejection still accepted": (
        _DISAGREE, ["temperature"], _in_rule(
            "rejection", ("jnp.cumprod(passes.astype(jnp.int32))", "passes.astype(jnp.int32)")),
    ),
    "target read one position late": (
        _DISAGREE, ["temperature"], _in_rule(
            "rejection",
            ("target_log_probs[slots, draft.tokens]", "target_log_probs[slots + 1, draft.tokens]"),
            within=_RATIO),
    ),
    "residual clamped from below and not renormalised": (
        _DISAGREE, ["top-k"], _in_rule(
            "rejection",
            ("jnp.maximum(target - jnp.exp(draft.log_probs[slot]), 0.0)",
             "jnp.maximum(target - jnp.exp(draft.log_probs[slot]), 1e-3)"),
            within=_RATIO),
    ),
    "no bonus": (
        _EQUAL, ["temperature"], _in_loop(
            ("    num_emitted = jnp.where(is_active, num_emitted, 0)\n",
             "    is_whole = (verdict.num_accepted == draft.length) & (draft.length > 0)\n"
             "    num_emitted = jnp.where("
             "is_whole, jnp.minimum(num_emitted, draft.length), num_emitted)\n"
             "    new_status = jnp.where(state.lengths + num_emitted < request.max_lengths, "
             "status.RUNNING, new_status)\n"
             "    num_emitted = jnp.where(is_active, num_emitted, 0)\n")),
    ),
    # randomness
    "one round's randomness for all rounds": (
        _DISAGREE, ["temperature"], _in_loop(
            ("key = jax.random.fold_in(jax.random.fold_in(key, number), purpose)",
             "key = jax.random.fold_in(jax.random.fold_in(key, 0 * number), purpose)")),
    ),
    "block's uniforms keyed by position": (
        _BLOCK._replace(drafter="own sampling"), ["temperature", "repetition penalty"], _in_loop(
            ("keys = _keys(request.keys, state.num_rounds, _VERIFY, width)",
             "keys = _noise_keys(request.keys, state.lengths, width)")),
    ),
    "noise of match keyed by round": (
        _DISAGREE._replace(verifier="match"), ["temperature"],
        _in_loop((_BEFORE_KEYS, "    if False:\n        keys =")),
    ),
    # counting
    "accepted drafts counted past EOS": (
        _STOPPING, ["temperature"], _in_loop((_ACCEPTED, "num_accepted=verdict.num_accepted")),
    ),
    "tokens emitted past EOS": (
        _STOPPING, ["temperature"], _in_loop(
            ("num_emitted = jnp.where(has_eos, jnp.argmax(is_eos, axis=1) + 1, num_emitted)", "")),
    ),
    "corrections counted as accepted": (
        _DISAGREE, ["temperature"], _in_loop((_ACCEPTED, "num_accepted=num_emitted")),
    ),
    # several drafters
    "a copied draft passed off as drawn": (
        _DISAGREE._replace(drafter="lookup, else a model", mix="one length"), ["temperature"],
        lambda: {"drafter": mutant(
            "jaxspec.drafters.fallback",
            ("jnp.where(is_token, 0.0, -jnp.inf)",
             "jnp.full(is_token.shape, -jnp.log(vocab_size))"),
        ).fallback(jaxspec.drafters.prompt_lookup(1), jaxspec.drafters.model(matrix.OTHER))},
    ),
    # the draft cache
    "the draft cache misses a token behind a whole acceptance": (
        _EQUAL._replace(policy="heuristic"), ["temperature"], _in_drafter(
            ("num_cached = jnp.minimum(state.num_cached, standing)", "num_cached = standing"),
            lm=matrix.TARGET),
    ),
    # trees
    "a penalty that sees another node's path": (
        _TREE, ["repetition penalty"], _in_loop(
            ("request.options, history, paths, depths)",
             "request.options, history, jnp.roll(paths, 1, axis=1), depths)")),
    ),
    "drawn nodes ranked by their value": (_TREE, ["temperature"], _best_of_drawn),
    "an exhausted q renormalised": (
        _TREE, ["top-k"], _in_growth(
            trees.kary((3, 1)),
            ("exists = jnp.sum(weights) > 0",
             "exists, weights = True, jnp.where(jnp.sum(weights) > 0, weights, 1.0)")),
    ),
}  # fmt: skip


@exactness
@pytest.mark.parametrize("name", _MUTANTS)
def test_planted_bug_is_caught(name, record_property):
    run, options, strategies = _MUTANTS[name]
    with jax.debug_key_reuse(False):  # which would find some of them by itself
        report = matrix.check(run, options, num_samples=_FEW, **strategies())
    assert matrix.problems_of(run, report), f"survived: {name}\n{report}"
    record_property("caught", 1)


def test_enough_bugs_are_planted():
    assert len(_MUTANTS) == 42  # as the documents say; never fewer than 16
    assert all(options for _, options, _ in _MUTANTS.values())
