"""What `generate` and `stream` are given, checked and brought into the loop's form.

Everything wrong with static arguments is found here, before anything runs, and says what to
change. Values under a trace are not checked.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jaxspec import drafters, prefilling, prompting, states, strategies
from jaxspec.sampling import Sampling, resolve
from jaxspec.sampling.options import id_lists
from jaxspec.settings import Settings
from jaxspec.types import Drafter, LanguageModel, Policy, Verifier

Array: TypeAlias = jax.Array


class Prepared(NamedTuple):
    """A call, ready for the loop.

    Attributes:
      engine: the strategies.
      request: the rows' limits, keys and options.
      prompts: i32[P, L], right-padded with 0; each begins B / P rows.
      max_new_tokens: T.
      pad_id: fills the result behind each row's tokens.
      capacity: slots of the caches.
      returns_state: whether the result can be continued.
      resumption: what is taken up, with the sizes of its token buffer and its caches from now on;
        None: new texts.
    """

    engine: states.Engine
    request: states.Request
    prompts: Array
    max_new_tokens: int
    pad_id: int
    capacity: int
    returns_state: bool
    resumption: tuple[prefilling.Continuation, int, int] | None


def prepare(
    target: LanguageModel,
    prompts: Any,
    *,
    drafter: Drafter | str | None = None,
    verifier: Verifier | None = None,
    policy: Policy | None = None,
    sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
    max_new_tokens: Any = 128,
    num_draft_tokens: int = 4,
    settings: Settings | str | os.PathLike[str] | None = None,
    eos_ids: Sequence[int] | int | None = None,
    stop_sequences: Any = None,
    pad_id: int = 0,
    key: Array | None = None,
    prompt_lengths: Any = None,
    num_return_sequences: int = 1,
    num_top_log_probs: int = 0,
    prompt_log_probs: bool = False,
    state: prefilling.Continuation | None = None,
    return_state: bool = False,
    exact: bool = True,
) -> Prepared:
    """Checks the arguments of `jaxspec.generate`, which documents them.

    Raises:
      ValueError: see `jaxspec.generate`.
    """
    if not isinstance(target, LanguageModel):
        raise ValueError(
            f"the target must be a jaxspec.LanguageModel, got {type(target).__name__}; "
            "jaxspec_models.load returns one, beside its tokenizer."
        )
    if not isinstance(sampling, Sampling):
        raise ValueError(f"sampling must be a jaxspec.Sampling, got {type(sampling).__name__}.")
    most = _most_new_tokens(max_new_tokens)
    if not isinstance(pad_id, (int, np.integer)) or not -(2**31) <= pad_id < 2**31:
        raise ValueError(f"pad_id must be a Python integer within int32, got {pad_id!r}.")
    outputs = _outputs(num_top_log_probs, prompt_log_probs, target.vocab_size)
    if drafter == "auto":
        drafter = target.default_drafter or drafters.prompt_lookup()
    if settings is not None:
        drafter, num_draft_tokens = strategies.tuned(drafter, settings)
    engine = strategies.engine(
        target, drafter, verifier, policy, sampling, num_draft_tokens, outputs
    )
    if exact:
        strategies.check_exact(engine)
    strategies.check_count("num_return_sequences", num_return_sequences)
    if state is None:
        tokens, lengths = prompting.read(prompts, prompt_lengths, pad_id, target.vocab_size)
        standing: Any = 0
    else:
        _check_continuation(state, engine, num_return_sequences)
        tokens, lengths = _following(prompts, prompt_lengths, pad_id, engine, state)
        standing = state.state.lengths
    num_prompts, copies = tokens.shape[0], int(num_return_sequences)
    if np.shape(max_new_tokens) not in ((), (num_prompts,)):
        raise ValueError(
            f"max_new_tokens must be one number or {num_prompts}, one a row; got shape "
            f"{np.shape(max_new_tokens)}."
        )
    if not isinstance(standing, jax.core.Tracer):
        standing = np.asarray(standing)
        _check_fits(engine, tokens, standing + lengths, max_new_tokens)

    def for_rows(tree: Any) -> Any:
        return jax.tree.map(lambda x: jnp.repeat(x, copies, axis=0), tree) if copies > 1 else tree

    options = resolve(sampling, num_prompts, target.vocab_size).repeat(copies)
    if key is None and state is not None:
        row_keys = state.keys
    else:
        row_keys = _row_keys(key, num_prompts, copies, sampling.is_greedy)
    lengths = jnp.asarray(lengths, jnp.int32)
    starts = for_rows(jnp.asarray(standing, jnp.int32) + lengths)
    limits = jnp.broadcast_to(jnp.asarray(max_new_tokens, jnp.int32), (num_prompts,))
    request = states.Request(
        keys=row_keys,
        prompt_lengths=starts,
        start_lengths=starts,
        max_lengths=starts + for_rows(limits),
        eos_ids=_eos_ids(target, eos_ids),
        stop_sequences=for_rows(_stop_sequences(stop_sequences, num_prompts, target.vocab_size)),
        options=options,
    )
    if state is not None and tokens.shape[1] == 0:  # what stands there is written on
        request = request._replace(prompt_lengths=state.prompt_lengths)
    # Padding may be anything (-100, a pad id beyond the vocabulary): a model is fed valid ids.
    is_prompt = jnp.arange(tokens.shape[1])[None] < lengths[:, None]
    tokens = jnp.where(is_prompt, jnp.asarray(tokens, jnp.int32), 0)
    prepared = Prepared(
        engine,
        request,
        tokens,
        most,
        int(pad_id),
        prefilling.cache_capacity(tokens.shape[1], most, engine.num_draft_tokens),
        bool(return_state),
        None,
    )
    return prepared if state is None else _resumed(prepared, state, standing)


def _outputs(num_top_log_probs: Any, prompt_log_probs: Any, vocab_size: int) -> states.Outputs:
    is_count = isinstance(num_top_log_probs, (int, np.integer)) and not isinstance(
        num_top_log_probs, bool
    )
    if not is_count or not 0 <= num_top_log_probs <= vocab_size:
        raise ValueError(
            f"num_top_log_probs must be a Python integer in 0 … {vocab_size}, got "
            f"{num_top_log_probs!r}."
        )
    return states.Outputs(int(num_top_log_probs), bool(prompt_log_probs))


# ---------------------------------------------------------------------------------------------
# Texts that are taken up again.


def _check_continuation(state: Any, engine: states.Engine, num_return_sequences: int) -> None:
    if not isinstance(state, prefilling.Continuation):
        raise ValueError(
            "state must be the `Generation.state` of a call with return_state=True, got "
            f"{type(state).__name__}."
        )
    if num_return_sequences != 1:
        raise ValueError(
            "num_return_sequences goes with new prompts; a state has its rows already."
        )
    batch, before = state.state.lengths.shape[0], state.state
    drafter = engine.drafter
    made = {
        "target": jax.eval_shape(lambda: engine.target.init_cache(batch, state.capacity, 1)),
        "drafter": None
        if drafter is None
        else jax.eval_shape(lambda: drafter.init(batch, state.capacity)),
        "policy": jax.eval_shape(lambda: engine.policy.init(batch)),
    }
    had = {"target": before.cache, "drafter": before.drafter, "policy": before.policy}
    for name, new in made.items():
        if jax.tree.map(jnp.ndim, had[name]) != jax.tree.map(lambda x: x.ndim, new):
            raise ValueError(
                f"the state was left by another kind of {name}; continue with the same target, "
                "drafter and policy."
            )


def _following(
    prompts: Any, prompt_lengths: Any, pad_id: int, engine: states.Engine, state: Any
) -> tuple[Any, Any]:
    """The tokens that follow a state's texts; none where they are written on."""
    batch = state.state.lengths.shape[0]
    if prompts is None:
        return np.zeros((batch, 0), np.int32), np.zeros((batch,), np.int32)
    tokens, lengths = prompting.read(prompts, prompt_lengths, pad_id, engine.target.vocab_size)
    if tokens.shape[0] != batch:
        raise ValueError(
            f"the state has {batch} rows: pass as many prompts, the tokens that follow each text, "
            f"or None to write on; got {tokens.shape[0]}."
        )
    return tokens, lengths


def _resumed(prepared: Prepared, state: prefilling.Continuation, standing: Any) -> Prepared:
    """Finds room: buffers stay as they are where they are large enough."""
    had = state.state.tokens.shape[1]
    sizes = (
        prepared.prompts.shape[1],
        prepared.max_new_tokens,
        prepared.engine.num_draft_tokens,
    )

    def needed(num_before: int) -> tuple[int, int]:
        return (
            num_before + prefilling.token_buffer_length(*sizes),
            prefilling.cache_capacity(*sizes, num_before=num_before),
        )

    longest = had if isinstance(standing, jax.core.Tracer) else int(standing.max())
    num_slots, capacity = needed(longest)
    if num_slots > had or capacity > state.capacity:
        # Lengths of a power of two, so that a longer text rarely means a new program.
        num_slots, capacity = needed(prompting.bucket(longest))
    num_slots, capacity = max(num_slots, had), max(capacity, state.capacity)
    return prepared._replace(capacity=capacity, resumption=(state, num_slots, capacity))


# ---------------------------------------------------------------------------------------------
# Limits, ends and randomness.


def _most_new_tokens(max_new_tokens: Any) -> int:
    """T, the size of the output's arrays: the largest of the rows' limits."""
    if isinstance(max_new_tokens, jax.core.Tracer):
        raise ValueError(
            "max_new_tokens decides about the output's shape and can't be traced; pass Python "
            "integers or an array that is known before running."
        )
    if np.ndim(max_new_tokens) == 0:
        strategies.check_count("max_new_tokens", max_new_tokens)
        return int(max_new_tokens)
    limits = np.asarray(max_new_tokens)
    if not np.issubdtype(limits.dtype, np.integer) or limits.size == 0 or limits.min() < 1:
        raise ValueError(
            f"max_new_tokens must be integers of at least 1, one a row; got {max_new_tokens!r}."
        )
    return int(limits.max())


def _check_fits(engine: states.Engine, tokens: Any, lengths: Any, max_new_tokens: Any) -> None:
    if isinstance(lengths, jax.core.Tracer):
        return
    row = int(np.argmax(lengths + np.asarray(max_new_tokens)))
    length = int(np.broadcast_to(lengths, (tokens.shape[0],))[row])
    max_new_tokens = int(np.broadcast_to(max_new_tokens, (tokens.shape[0],))[row])
    needed = length + max_new_tokens
    drafter_limit = getattr(engine.drafter, "max_length", None)
    for name, limit in (("target", engine.target.max_length), ("drafter", drafter_limit)):
        if limit is not None and needed > limit:
            raise ValueError(
                f"a prompt of {length} tokens + max_new_tokens "
                f"({max_new_tokens}) is {needed}, and the {name} is made for {limit} tokens; "
                "shorten the prompt or lower max_new_tokens."
            )


def _eos_ids(target: LanguageModel, eos_ids: Sequence[int] | int | None) -> Array:
    if eos_ids is None:
        eos_ids = target.eos_ids
    if isinstance(eos_ids, (int, np.integer)):
        eos_ids = (int(eos_ids),)
    ids: Any = eos_ids
    if not isinstance(ids, (jax.Array, np.ndarray)):
        ids = np.asarray(list(ids) or np.zeros(0, np.int32))
    if ids.ndim != 1 or not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(
            "eos_ids must be integers, the ids of the tokens that end a text; got "
            f"{ids.dtype}{ids.shape}."
        )
    return jnp.asarray(ids).astype(jnp.int32)


def _stop_sequences(value: Any, batch: int, vocab_size: int) -> Array:
    """i32[B, W, L]."""
    sequences = id_lists("stop_sequences", value, vocab_size)
    if sequences is None:
        return jnp.zeros((batch, 0, 1), jnp.int32)
    if sequences.ndim == 3 and sequences.shape[0] != batch:
        raise ValueError(
            f"stop_sequences must be the same for all rows, [W, L], or one set for each of {batch} "
            f"rows; got shape {sequences.shape}."
        )
    return jnp.broadcast_to(sequences, (batch, *sequences.shape[-2:]))


def _row_keys(key: Array | None, num_prompts: int, copies: int, is_greedy: bool) -> Array:
    """key[B]: as given, or one key folded once with each row's number.

    Where prompts have a key each, it is folded with the number of the copy.
    """
    batch = num_prompts * copies
    if key is None:
        if not is_greedy:
            raise ValueError(
                "sampling needs randomness: pass key=jax.random.key(seed), or "
                "sampling=Sampling(temperature=0) (a Python 0, not an array) for greedy decoding."
            )
        key = jax.random.key(0, impl="threefry2x32")
    key = jnp.asarray(key)
    if not jax.dtypes.issubdtype(key.dtype, jax.dtypes.prng_key):
        if key.dtype != jnp.uint32 or key.shape not in ((2,), (num_prompts, 2)):
            raise ValueError(
                f"key must be jax.random.key(seed), or one key a row, got {key.dtype}{key.shape}."
            )
        key = jax.random.wrap_key_data(key, impl="threefry2x32")
    if key.dtype != jax.random.key(0, impl="threefry2x32").dtype:
        raise ValueError(
            "key must be a threefry key, jax.random.key(seed, impl='threefry2x32'): under vmap "
            f"{key.dtype} gives a row other numbers in another batch."
        )
    if key.shape == ():
        return jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(batch))
    if key.shape != (num_prompts,):
        raise ValueError(
            f"key must be one key or {num_prompts} keys, one a row; got shape {key.shape}."
        )
    if copies == 1:
        return key
    of_copies = jax.vmap(jax.random.fold_in, in_axes=(None, 0))
    return jax.vmap(of_copies, in_axes=(0, None))(key, jnp.arange(copies)).ravel()
