"""What `generate` and `stream` are given: every error says what to change, keys, padding."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxspec
from jaxspec import Sampling, arguments, drafters, policies, verifiers

programs = importlib.import_module("jaxspec.generate")

V = 8
GREEDY = Sampling(temperature=0)
TRACES = []


def apply(params, tokens, cache, *, start):
    del start
    TRACES.append(tokens.shape)
    return jaxspec.ModelOutput(params[tokens]), cache


def init_cache(batch, capacity, max_step):
    del batch, capacity, max_step
    return ()


def model(seed=0, vocab_size=V, **kwargs):
    table = np.random.default_rng(seed).normal(size=(vocab_size, vocab_size))
    return jaxspec.LanguageModel(
        jnp.asarray(table, jnp.float32), apply, init_cache, vocab_size=vocab_size, **kwargs
    )


LM = model()


def tokens_of(prompts, **kwargs):
    kwargs = {"max_new_tokens": 4, "sampling": GREEDY} | kwargs
    return jaxspec.generate(kwargs.pop("target", LM), prompts, **kwargs).tokens.tolist()


def key(seed=0):
    return jax.random.key(seed)


# ---------------------------------------------------------------------------------------------
# Errors. (id, what is changed in a valid call, the message)

ARRAY = np.array([[1, 2, 3], [4, 5, 6]])
LEFT = np.array([[0, 0, 3], [4, 5, 6]])
OTHER_LAYERS = type("Reads", (type(drafters.prompt_lookup()),), {"hidden_layers": (1,)})(3, 1)

ERRORS = [
    ("no model", {"target": "llama"}, "the target must be a jaxspec.LanguageModel, got str"),
    ("model, tokenizer", {"target": (LM, None)}, "jaxspec_models.load returns one, beside"),
    ("T = 0", {"max_new_tokens": 0}, "max_new_tokens must be a Python integer of at least 1"),
    ("T < 0", {"max_new_tokens": -3}, "max_new_tokens must be .* got -3"),
    ("T float", {"max_new_tokens": 4.0}, "max_new_tokens must be .* got 4.0"),
    ("T bool", {"max_new_tokens": True}, "max_new_tokens must be .* got True"),
    ("K = 0", {"drafter": "auto", "num_draft_tokens": 0}, "num_draft_tokens must be .* at least 1"),
    ("drafter is a model", {"drafter": LM}, r"pass drafter=jaxspec.drafters.model\(lm\)"),
    ("default drafter is a model", {"target": model(default_drafter=LM), "drafter": "auto"},
     r"pass drafter=jaxspec.drafters.model\(lm\)"),
    ("drafter string", {"drafter": "lookup"}, "drafter must come from jaxspec.drafters"),
    ("drafter not called", {"drafter": drafters.prompt_lookup}, "drafter must come from"),
    ("drafter is a policy", {"drafter": policies.fixed(2)}, "drafter must come from"),
    ("vocabularies", {"drafter": drafters.model(model(vocab_size=9))},
     "the drafter has 9 tokens and the target 8"),
    ("hidden layers", {"drafter": OTHER_LAYERS}, "apply takes hidden_layers; add it to"),
    ("verifier not called", {"verifier": verifiers.rejection}, "verifier must come from"),
    ("verifier string", {"verifier": "greedy"}, r"\(called: jaxspec.verifiers.name\(\)\)"),
    ("policy number", {"policy": 4}, "policy must come from jaxspec.policies"),
    ("policy not called", {"policy": policies.heuristic}, "policy must come from"),
    ("greedy rule, sampling", {"verifier": verifiers.greedy(), "sampling": Sampling()},
     "verifiers.greedy is exact at temperature 0 only"),
    ("greedy rule, one row samples",
     {"verifier": verifiers.greedy(), "sampling": Sampling(temperature=np.array([0, 1]))},
     "verifiers.greedy is exact at temperature 0 only"),
    ("text", {"prompts": "hello"}, "prompts must be token ids, got text"),
    ("texts", {"prompts": ["hello", [1]]}, "prompts must be token ids, got text"),
    ("no prompts", {"prompts": []}, "prompts is empty: pass at least one prompt"),
    ("empty prompt", {"prompts": [[1], [], []]}, "prompt 1 is empty: a model needs a token"),
    ("flat list", {"prompts": [1, 2, 3]}, r"wrap one prompt as \[prompt\]"),
    ("too deep", {"prompts": [[[1, 2]]]}, r"wrap one prompt as \[prompt\]"),
    ("floats", {"prompts": [[1.0, 2.0]]}, "prompts must hold integers"),
    ("bools", {"prompts": [[True]]}, "prompts must hold integers"),
    ("nothing", {"prompts": None}, r"pass prompts: a list of token-id lists, or an array"),
    ("vector", {"prompts": np.array([1, 2])}, r"integer array \[B, L\], got int64\(2,\)"),
    ("float array", {"prompts": np.ones((1, 2))}, r"integer array \[B, L\], got float64"),
    ("no rows", {"prompts": np.zeros((0, 3), int)}, r"shape \(0, 3\): pass at least one token"),
    ("no columns", {"prompts": np.zeros((2, 0), int)}, "pass at least one token a row"),
    ("list and lengths", {"prompts": [[1]], "prompt_lengths": [1]},
     "prompt_lengths goes with an array of prompts"),
    ("lengths' shape", {"prompts": ARRAY, "prompt_lengths": [3]},
     r"prompt_lengths must be 2 integers, one a row; got int64\(1,\)"),
    ("length 0", {"prompts": ARRAY, "prompt_lengths": [3, 0]}, "must lie in 1 … 3"),
    ("length 4", {"prompts": ARRAY, "prompt_lengths": [3, 4]}, r"Got \[3, 4\]"),
    ("left-padded", {"prompts": LEFT}, "prompts look left-padded. Pad on the right"),
    ("left-padded, lengths", {"prompts": LEFT, "prompt_lengths": [1, 3]}, "look left-padded"),
    ("left-padded, 7", {"prompts": np.array([[7, 1, 2], [4, 5, 6]]), "pad_id": 7},
     "if the leading 7s are real tokens, pass them as lists"),
    ("id too large", {"prompts": [[1, V]]}, "prompts hold the token id 8; the target's ids are 0"),
    ("id negative", {"prompts": [[-1]]}, "prompts hold the token id -1"),
    ("id in an array", {"prompts": ARRAY + 5}, "prompts hold the token id 11"),
    ("id beyond int32", {"prompts": np.array([[2**32 + 1]])}, "hold the token id 4294967297"),
    ("id beyond int32 in a list", {"prompts": [[2**32 + 1]]}, "hold the token id 4294967297"),
    ("too long", {"target": model(max_length=8), "prompts": [[1] * 5]},
     r"a prompt of 5 tokens \+ max_new_tokens \(4\) is 9, and the target is made for 8"),
    ("too long for the drafter", {"drafter": drafters.model(model(max_length=4))},
     "the drafter is made for 4 tokens"),
    ("eos shape", {"eos_ids": [[1, 2]]}, "eos_ids must be integers"),
    ("eos is a fraction", {"eos_ids": [2.5]}, "eos_ids must be integers"),
    ("lengths are fractions", {"prompts": ARRAY, "prompt_lengths": [3.0, 2.0]}, "2 integers"),
    ("no sampling", {"sampling": None}, "sampling must be a jaxspec.Sampling"),
    ("top_k is a fraction", {"sampling": Sampling(top_k=2.5)}, "top_k must be a whole number"),
    ("top_k is huge", {"sampling": Sampling(top_k=2**40)}, "top_k must be a whole number"),
    ("no key", {"sampling": Sampling()}, r"pass key=jax.random.key\(seed\)"),
    ("no key, array", {"sampling": Sampling(temperature=np.zeros(2))}, "sampling needs randomness"),
    ("key is a seed", {"key": 0}, "key must be jax.random.key"),
    ("raw key's shape", {"key": np.zeros(3, np.uint32)}, r"got uint32\(3,\)"),
    ("raw keys for other rows", {"key": np.zeros((3, 2), np.uint32)}, r"got uint32\(3, 2\)"),
    ("rbg", {"key": jax.random.key(0, impl="rbg")}, "key must be a threefry key"),
    ("keys for other rows", {"key": jax.random.split(key(), 3)}, "one key or 2 keys, one a row"),
    ("temperature", {"sampling": Sampling(temperature=-0.1)}, "temperature must be at least 0"),
    ("temperature NaN", {"sampling": Sampling(temperature=np.nan)}, "temperature must be"),
    ("temperature of a row", {"sampling": Sampling(temperature=[1.0, -1.0])}, "temperature must"),
    ("top_k", {"sampling": Sampling(top_k=-1)}, r"top_k must be a whole number of at least 0"),
    ("top_p 0", {"sampling": Sampling(top_p=0.0)}, r"top_p must be in \(0, 1\], got 0.0"),
    ("top_p", {"sampling": Sampling(top_p=1.1)}, r"top_p must be in \(0, 1\]"),
    ("min_p", {"sampling": Sampling(min_p=1.5)}, r"min_p must be in \[0, 1\]"),
    ("min_p < 0", {"sampling": Sampling(min_p=np.array(-0.5))}, "min_p must be"),
    ("penalty", {"sampling": Sampling(repetition_penalty=0)}, "repetition_penalty must be above 0"),
    ("greedy is checked too", {"sampling": Sampling(temperature=0, top_p=7)}, "top_p must be"),
    ("option's shape", {"sampling": Sampling(top_k=np.ones(3, int))},
     r"shape \(2,\); got shape \(3,\)"),
]  # fmt: skip


@pytest.mark.parametrize("function", [jaxspec.generate, jaxspec.stream])
@pytest.mark.parametrize(
    ("changes", "message"), [e[1:] for e in ERRORS], ids=[e[0] for e in ERRORS]
)
def test_errors(function, changes, message):
    """Before anything is traced; `stream` at the call, not at the first token."""
    settings = {"target": LM, "prompts": [[1, 2], [3]], "sampling": GREEDY, "max_new_tokens": 4}
    settings |= changes
    TRACES.clear()
    with pytest.raises(ValueError, match=message):
        function(settings.pop("target"), settings.pop("prompts"), **settings)
    assert not TRACES


def test_limits_are_reached_exactly():
    """prompt + T = max_length is allowed, though the bucket is wider; K does not count."""
    lm = model(max_length=9)
    out = jaxspec.generate(
        lm, [[1] * 5], drafter=drafters.model(lm), sampling=GREEDY, max_new_tokens=4
    )
    assert out.lengths.tolist() == [4]


# ---------------------------------------------------------------------------------------------
# Prompts.


def test_forms_of_one_prompt():
    prompts = [[1, 2, 3], [4]]
    want = tokens_of(prompts)
    padded = np.array([[1, 2, 3], [4, 0, 0]])
    lengths = [3, 1]
    assert tokens_of(tuple(tuple(p) for p in prompts)) == want
    assert tokens_of([np.array(p, np.uint8) for p in prompts]) == want
    assert tokens_of([jnp.array(p) for p in prompts]) == want
    for array in (padded, jnp.asarray(padded), padded.astype(np.int64), padded.astype(np.uint8)):
        assert tokens_of(array, prompt_lengths=lengths) == want
        assert tokens_of(array, prompt_lengths=jnp.asarray(lengths)) == want
    wide = np.pad(padded, ((0, 0), (0, 37)))
    assert tokens_of(wide, prompt_lengths=np.array(lengths)) == want
    traced = jax.jit(lambda x, n: jaxspec.generate(
        LM, x, prompt_lengths=n, sampling=GREEDY, max_new_tokens=4).tokens)  # fmt: skip
    assert traced(jnp.asarray(padded), jnp.asarray(lengths)).tolist() == want


@pytest.mark.parametrize("pad", [0, -100, 10**6])
def test_right_padding_may_be_anything(pad):
    """Also where a row begins with the id that fills the *result*: 0 is a token like others."""
    want = tokens_of([[0, 2, 3], [1, 2, 3, 4]])
    array = np.array([[0, 2, 3, pad], [1, 2, 3, 4]])
    assert tokens_of(array, prompt_lengths=[3, 4]) == want


def test_leading_pad_ids_that_are_tokens():
    """A common first token (BOS = pad) is no padding; lists are never doubted."""
    array = np.array([[0, 2, 3], [0, 5, 6]])
    assert tokens_of(array) == tokens_of(array.tolist())
    assert len(tokens_of([[0, 0, 3], [0]])) == 2


def test_lengths_in_one_bucket_share_every_program():
    prompt = np.random.default_rng(0).integers(V, size=65).tolist()

    def count():
        compiled = [program.num_compiled() for program in (programs.prefill, programs.run)]
        return [*compiled, programs.result._cache_size()]

    settings = {"drafter": drafters.prompt_lookup(), "key": key(), "sampling": Sampling()}
    TRACES.clear()
    tokens_of([prompt[:33]], **settings)
    sizes, traces = count(), len(TRACES)
    assert traces
    for length in (34, 47, 63, 64):
        tokens_of([prompt[:length]], **settings)
    # Nor does another value of anything that is data.
    tokens_of([prompt[:40]], **settings | {"target": model(seed=1), "key": key(9)})
    assert count() == sizes
    assert len(TRACES) == traces
    tokens_of([prompt[:65]], **settings)
    assert all(now == before + 1 for now, before in zip(count()[:2], sizes[:2], strict=True))


# ---------------------------------------------------------------------------------------------
# Keys.


def test_one_key_is_folded_with_the_rows_number():
    prompts = [[1, 2], [1, 2], [1, 2]]
    settings = {"sampling": Sampling(), "max_new_tokens": 12}
    want = tokens_of(prompts, key=key(5), **settings)
    assert want[0] != want[1] != want[2]

    def keys():
        return jax.vmap(lambda row: jax.random.fold_in(key(5), row))(jnp.arange(3))

    assert tokens_of(prompts, key=keys(), **settings) == want
    # A row's key follows the request, not the slot.
    assert tokens_of(prompts, key=keys()[::-1], **settings) == want[::-1]
    assert tokens_of(prompts[:1], key=keys()[2:], **settings) == want[2:]
    assert tokens_of(prompts[:1], key=key(5), **settings) == want[:1]
    # Raw keys, as jax.random.PRNGKey makes them.
    for raw in (jax.random.key_data(key(5)), np.asarray(jax.random.key_data(keys()))):
        assert raw.dtype == np.uint32
        assert tokens_of(prompts, key=raw, **settings) == want


def test_greedy_needs_no_key_and_ignores_one():
    want = tokens_of([[1, 2]])
    assert tokens_of([[1, 2]], key=key(1)) == want
    assert tokens_of([[1, 2]], sampling=Sampling(temperature=np.array(0.0)), key=key(2)) == want


# ---------------------------------------------------------------------------------------------
# Defaults.


def test_ends():
    text = tokens_of([[1]], max_new_tokens=8)[0]
    end = text[2]
    cut = [*text[: text.index(end) + 1], *[5] * 8][:8]
    for eos in (end, (end,), np.array([end]), [end, 99, -1]):
        assert tokens_of([[1]], max_new_tokens=8, eos_ids=eos, pad_id=5) == [cut]
    lm = model(eos_ids=(end,))
    assert tokens_of([[1]], target=lm, max_new_tokens=8, pad_id=5) == [cut]
    assert tokens_of([[1]], target=lm, max_new_tokens=8, eos_ids=()) == [text]


def test_strategies_left_out():
    def engine(target=LM, **kwargs):
        kwargs = {"sampling": Sampling(), "key": key()} | kwargs
        return arguments.prepare(target, [[1]], **kwargs).engine

    assert engine().drafter is None
    assert engine(num_draft_tokens=7).num_draft_tokens == 0
    assert engine(drafter="auto").drafter == drafters.prompt_lookup()
    own = drafters.prompt_lookup(5)
    assert engine(model(default_drafter=own), drafter="auto").drafter == own
    assert engine(drafter=own).num_draft_tokens == 4
    assert engine(drafter=own).policy == policies.fixed(4)
    assert engine(drafter=own).verifier == verifiers.block()
    assert engine(drafter=own, sampling=GREEDY).verifier == verifiers.greedy()
    # An array of zeros is data: the ratio rule serves it, and the greedy rule is allowed.
    zeros = Sampling(temperature=np.zeros(1))
    assert engine(drafter=own, sampling=zeros).verifier == verifiers.block()
    assert engine(verifier=verifiers.greedy(), sampling=zeros).verifier == verifiers.greedy()
