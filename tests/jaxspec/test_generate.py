"""The façade: traceable, traced once a shape, streamable, and free of what it does not need."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxspec
from jaxspec import drafters, policies, pytree, verifiers
from jaxspec.testing import random_logits, table_model

_LOGITS = random_logits(3, vocab_size=6, order=2)
_GREEDY = jaxspec.Sampling(temperature=0)
_PROMPTS = [[1, 2, 3], [5]]


def _model(seed=3):
    return table_model(random_logits(seed, vocab_size=6, order=2), order=2)


def _equal(left, right):
    jax.tree.map(np.testing.assert_array_equal, left, right)


@pytest.mark.parametrize("drafter", [None, "model", "lookup"])
def test_generate_inside_a_users_jit(drafter):
    """Models and strategies are pytree arguments: new weights and values never retrace."""
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def program(target, drafter, prompts, lengths, key, temperature):
        return jaxspec.generate(
            target, prompts, prompt_lengths=lengths, drafter=drafter, key=key,
            sampling=jaxspec.Sampling(temperature=temperature), max_new_tokens=9,
        )  # fmt: skip

    make = {
        None: lambda seed: None,
        "model": lambda seed: drafters.model(_model(seed)),
        "lookup": lambda seed: drafters.prompt_lookup(),
    }[drafter]
    prompts = jnp.array([[1, 2, 3], [5, 0, 0]])
    lengths = jnp.array([3, 1])
    for seed, temperature in ((3, 0.0), (4, 0.7), (5, 1.3)):
        arguments = (_model(seed), make(seed), prompts, lengths)
        inside = program(*arguments, jax.random.key(seed), jnp.float32(temperature))
        outside = jaxspec.generate(
            arguments[0], prompts, prompt_lengths=lengths, drafter=arguments[1],
            key=jax.random.key(seed), max_new_tokens=9,
            sampling=jaxspec.Sampling(temperature=np.full(2, temperature)),
        )  # fmt: skip
        np.testing.assert_array_equal(inside.tokens, outside.tokens)
        assert inside.guarantee == "distribution"


def test_generate_runs_without_host_transfers():
    program = jax.jit(
        lambda model, prompts, key: jaxspec.generate(
            model, prompts, drafter=drafters.model(model), key=key, max_new_tokens=20
        )
    )
    arguments = (_model(), jnp.array([[1, 2], [3, 4]]), jax.random.key(0))
    compiled = program.lower(*arguments).compile()
    with jax.transfer_guard("disallow"):
        generation = compiled(*arguments)
        jax.block_until_ready(generation)
    assert generation.lengths.tolist() == [20, 20]
    for host in ("infeed", "outfeed", "callback"):
        assert host not in compiled.as_text()


class _Traces:
    """Counts how often a model is traced."""

    count = 0

    @staticmethod
    def apply(params, tokens, cache, *, start):
        _Traces.count += 1
        return jaxspec.ModelOutput(params[tokens]), cache


def _init_cache(batch, capacity, max_step):
    return ()


def _traced():
    return jaxspec.LanguageModel(jnp.asarray(_LOGITS[:6]), _Traces.apply, _init_cache, 6)


def test_one_trace_a_shape():
    """New values of options, keys, weights, prompts, lengths and limits on ends are data."""

    def run(prompts, seed=0, k=3, **options):
        jaxspec.generate(
            _traced().replace(params=jnp.asarray(_LOGITS[seed : seed + 6])), prompts,
            drafter=drafters.prompt_lookup(), policy=policies.fixed(k), max_new_tokens=8,
            key=jax.random.key(seed), sampling=jaxspec.Sampling(**options),
            eos_ids=(seed,),
        )  # fmt: skip

    run([[1, 2], [3]], temperature=0.5, top_p=0.8)
    before = _Traces.count
    run([[1, 2], [3]], seed=1, temperature=0.9, top_p=0.3)
    run([[4], [1, 2, 3, 4, 5, 0, 1, 2]], seed=2, k=1, temperature=2.0, top_p=0.99)
    run([[1] * 31, [2] * 32], temperature=0.1, top_p=0.5)
    assert _Traces.count == before
    run([[1] * 33, [2]], temperature=0.1, top_p=0.5)  # the next bucket
    grown = _Traces.count
    assert grown > before
    run([[1] * 64, [2] * 40], temperature=0.1, top_p=0.5)
    assert _Traces.count == grown


@pytree.dataclass
class _Weak:
    """A policy whose state is weakly typed before its first round, or from then on."""

    length: int = pytree.static()
    at_first: bool = pytree.static()

    def num_draft(self, state):
        return jnp.full(state.shape, self.length, jnp.int32)

    def keep_drafting(self, state, signals):
        return jnp.ones(state.shape, bool)

    def init(self, batch):
        state = jnp.where(jnp.ones((batch,), bool), 1.0, 0.0)
        return state if self.at_first else state.astype(jnp.float32)

    def update(self, state, outcome):
        state = jnp.where(state > 0, 2.0, 1.0)
        return state.astype(jnp.float32) if self.at_first else state


_PROFILE = jaxspec.Profile(jnp.linspace(1.0, 1.4, 5), jnp.float32(0.1), jnp.float32(0.1))
_STREAMED = {
    "fixed": lambda: policies.fixed(4),
    "heuristic": lambda: policies.heuristic(2),
    "goodput": lambda: policies.goodput(_PROFILE),
    "guarded": lambda: policies.guarded(policies.goodput(_PROFILE)),
    "weak at first": lambda: _Weak(2, True),
    "weak later": lambda: _Weak(2, False),
}


@pytest.mark.parametrize("policy", _STREAMED)
def test_stream_is_generate_and_compiles_nothing_new(policy):
    arguments = {
        "drafter": drafters.model(_model(4)), "max_new_tokens": 11, "eos_ids": (4,),
        "policy": _STREAMED[policy](),
    }  # fmt: skip
    generation = jaxspec.generate(_model(), _PROMPTS, key=jax.random.key(1), **arguments)
    from jaxspec.generate import prefill, run

    sizes = prefill.num_compiled(), run.num_compiled()
    rows = {0: [], 1: []}
    streamed = jaxspec.stream(_model(), _PROMPTS, key=jax.random.key(1), **arguments)
    while True:
        try:
            row, ids = next(streamed)
        except StopIteration as stop:
            result = stop.value
            break
        assert ids.dtype == np.int32
        assert ids.size >= 1
        rows[row].extend(ids.tolist())
    assert (prefill.num_compiled(), run.num_compiled()) == sizes
    _equal(result, generation)
    for row, ids in rows.items():
        assert ids == generation.tokens[row, : generation.lengths[row]].tolist()


def test_stream_checks_its_arguments_at_the_call():
    with pytest.raises(ValueError, match="key"):
        jaxspec.stream(_model(), _PROMPTS)


def test_the_state_is_donated_and_the_prompts_are_not():
    prompts = jnp.array([[1, 2, 3]])
    for _ in range(2):
        jaxspec.generate(_model(), prompts, sampling=_GREEDY, max_new_tokens=3)
    assert prompts.tolist() == [[1, 2, 3]]


def test_auto_takes_the_models_own_drafter_or_prompt_lookup():
    run = {"sampling": _GREEDY, "max_new_tokens": 12, "num_draft_tokens": 3}
    own = _model().replace(default_drafter=drafters.model(_model()))
    stats = jaxspec.generate(own, _PROMPTS, drafter="auto", **run).stats
    assert stats.num_spec_steps.tolist() == [3, 3]  # its own drafts are accepted whole
    auto = jaxspec.generate(_model(), _PROMPTS, drafter="auto", **run)
    lookup = jaxspec.generate(_model(), _PROMPTS, drafter=drafters.prompt_lookup(), **run)
    _equal(auto, lookup)


def test_a_rule_that_fits_any_temperature_is_greedy_at_zero():
    """`rejection` at the Python temperature 0 equals the greedy rule and needs no key."""
    run = {"drafter": drafters.model(_model(4)), "sampling": _GREEDY, "max_new_tokens": 12}
    by_default = jaxspec.generate(_model(), _PROMPTS, **run)
    by_rejection = jaxspec.generate(_model(), _PROMPTS, verifier=verifiers.rejection(), **run)
    _equal(by_default, by_rejection)
    as_data = jaxspec.generate(
        _model(), _PROMPTS, key=jax.random.key(0),
        **run | {"sampling": jaxspec.Sampling(temperature=np.zeros(2))},
    )  # fmt: skip
    np.testing.assert_array_equal(as_data.tokens, by_default.tokens)
    np.testing.assert_allclose(as_data.log_probs, by_default.log_probs, atol=1e-6)


def test_generation_is_a_pytree_with_a_static_guarantee():
    generation = jaxspec.generate(_model(), _PROMPTS, sampling=_GREEDY, max_new_tokens=4)
    doubled = jax.tree.map(lambda x: x + x, generation)
    assert doubled.guarantee == "distribution"
    chex.assert_shape([generation.tokens, generation.log_probs], (2, 4))
    chex.assert_type([generation.tokens, generation.lengths, generation.status], jnp.int32)
    chex.assert_type(generation.log_probs, jnp.float32)


# ---------------------------------------------------------------------------------------------
# What is imported, and which way dependencies point.

_FOREIGN = (
    "flax",
    "optax",
    "chex",
    "transformers",
    "tokenizers",
    "safetensors",
    "scipy",
    "jaxspec_models",
)


def _python(code):
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False
    )


def test_jaxspec_needs_only_jax_and_numpy():
    done = _python(
        f"""
        import sys

        class Blocker:
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] in {_FOREIGN!r}:
                    raise ImportError(f"{{name}} must not be imported")

        sys.meta_path.insert(0, Blocker())
        import jax.numpy as jnp
        import jaxspec

        def apply(params, tokens, cache, *, start):
            return jaxspec.ModelOutput(params[tokens]), cache

        def init_cache(batch, capacity, max_step):
            return ()

        model = jaxspec.LanguageModel(jnp.eye(4)[jnp.array([1, 2, 3, 0])], apply, init_cache, 4)
        out = jaxspec.generate(model, [[0]], drafter=jaxspec.drafters.model(model),
                               sampling=jaxspec.Sampling(temperature=0), max_new_tokens=3)
        print(out.tokens.tolist())
        """
    )
    assert done.stdout.strip() == "[[1, 2, 3]]", done.stderr


def test_importing_jaxspec_starts_no_backend():
    done = _python(
        """
        import jaxspec
        from jax._src import xla_bridge
        print(xla_bridge.backends_are_initialized())
        """
    )
    assert done.stdout.strip() == "False", done.stderr


def test_the_loop_imports_no_concrete_strategy():
    import importlib
    import inspect

    source = inspect.getsource(importlib.import_module("jaxspec.loop"))
    for package in ("drafters", "verifiers", "policies", "generate"):
        assert f"jaxspec.{package}" not in source.replace("`jaxspec.", "")
        assert f"import {package}" not in source


def test_generate_under_64_bit_jax():
    """Carries keep their dtypes, and the texts are those of 32 bits."""
    code = """
        import sys
        import jax
        import numpy as np
        jax.config.update("jax_enable_x64", sys.argv[1] == "64")
        import jaxspec
        from jaxspec.testing import random_logits, table_model

        model = table_model(random_logits(3, vocab_size=6, order=2), order=2)
        other = table_model(random_logits(4, vocab_size=6, order=2), order=2)
        for drafter in (None, jaxspec.drafters.model(other), jaxspec.drafters.prompt_lookup()):
            for temperature in (0,) if drafter is None else (np.array([0.7, 0.0]),):
                sampling = jaxspec.Sampling(
                    temperature=temperature, top_k=5, top_p=0.9, min_p=0.01, typical_p=0.97,
                    repetition_penalty=1.2, presence_penalty=0.2, frequency_penalty=0.1,
                    no_repeat_ngram_size=4, min_new_tokens=2, logit_bias={1: 0.5},
                    bad_words=[[4], [3, 3]], suppress_tokens=[5])
                out = jaxspec.generate(model, [[1, 2], [3]], drafter=drafter, sampling=sampling,
                                       policy=jaxspec.policies.heuristic(2), eos_ids=0,
                                       stop_sequences=[[1, 2, 1, 1], [2, 2, 2]],
                                       max_new_tokens=[9, 7], key=jax.random.key(0))
                print(out.tokens.dtype, out.log_probs.dtype, out.tokens.tolist())
        """
    root = str(Path(__file__).parents[1])
    runs = [
        subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code), bits],
            capture_output=True,
            text=True,
            check=False,
            env=os.environ | {"PYTHONPATH": os.pathsep.join([root, *sys.path])},
        )
        for bits in ("32", "64")
    ]
    assert runs[1].returncode == 0, runs[1].stderr
    assert runs[1].stdout == runs[0].stdout
    assert runs[0].stdout.count("int32 float32") == 3


def test_broken_options_under_a_trace_stop_the_row():
    """A traced temperature of NaN has no law: a status, and no token that does not exist."""
    program = jax.jit(
        lambda temperature: jaxspec.generate(
            _model(), _PROMPTS, key=jax.random.key(0), max_new_tokens=4,
            sampling=jaxspec.Sampling(temperature=temperature),
        )
    )  # fmt: skip
    broken = program(jnp.array([jnp.nan, 1.0]))
    assert broken.status.tolist() == [jaxspec.status.NONFINITE, jaxspec.status.LENGTH]
    assert broken.lengths.tolist() == [0, 4]


@pytest.mark.parametrize(
    ("apply", "message"),
    [
        (lambda params, tokens, cache, *, start: (params[tokens], cache), "ModelOutput"),
        (
            lambda params, tokens, cache, *, start: (
                jaxspec.ModelOutput(params[tokens][..., :5]),
                cache,
            ),
            "vocab_size = 6",
        ),
    ],
)
def test_a_model_of_a_wrong_shape_is_named(apply, message):
    model = jaxspec.LanguageModel(jnp.asarray(_LOGITS[:6]), apply, _init_cache, 6)
    with pytest.raises(ValueError, match=message):
        jaxspec.generate(model, [[1]], sampling=_GREEDY, max_new_tokens=2)


def test_positions_stay_below_the_models_limit():
    """Buckets, chunks and drafts reach beyond it: learned positions would be out of range."""

    def apply(params, tokens, cache, *, start, positions):
        del start
        table = jnp.zeros((20, 1))
        here = table.at[positions].get(mode="fill", fill_value=jnp.nan)
        return jaxspec.ModelOutput(params[tokens] + here), cache

    model = jaxspec.LanguageModel(jnp.asarray(_LOGITS[:6]), apply, _init_cache, 6, max_length=20)
    for drafter in (None, drafters.prompt_lookup(), drafters.model(model)):
        out = jaxspec.generate(
            model, [[1, 2, 3]], drafter=drafter, sampling=_GREEDY, max_new_tokens=17
        )
        assert out.status.tolist() == [jaxspec.status.LENGTH]
