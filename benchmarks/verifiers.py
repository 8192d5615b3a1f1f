"""Which lossless rule accepts more, on the very same blocks?

    .venv/bin/python benchmarks/verifiers.py --max-new-tokens 100

Writes with the default model at temperature 1, drafted by a copy with noise in its weights, and
lets both rules judge every block of the run: `rejection` and `block`, each by its exact expected
number of accepted drafts given the drafts at hand, without a further draw. Beside them, what the
rule that ran accepted, and what `match` (its noise shared with the drafter) accepts in a run of
its own.
"""

from __future__ import annotations

import argparse
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jaxspec
import jaxspec_models
from jaxspec import Draft, Outcome, Signals, arguments, drafters, pytree, verifiers
from jaxspec.generate import prefill, run
from jaxspec.verifiers import ratio
from jaxspec.verifiers.block import margins, prefix_log_weights

PROMPTS = [
    "Tell me a short story about a lighthouse keeper who collects maps.",
    "What is the capital of France, and what is it known for?",
]


class Sums(NamedTuple):
    """Of each row: f32[B] each."""

    blocks: Any
    drafted: Any
    rejection: Any
    block: Any
    accepted: Any
    gain_squared: Any  # (block - rejection)²
    surprise_squared: Any  # (accepted - what the rule that ran expected, if that is block)²


@pytree.dataclass
class Judge:
    """A policy that drafts K tokens in every round and sums up what each rule would accept."""

    num_draft_tokens: int = pytree.static()

    def init(self, batch: int) -> Sums:
        """Zeros."""
        return Sums(*(jnp.zeros((batch,)) for _ in Sums._fields))

    def num_draft(self, state: Sums) -> Any:
        """K."""
        return jnp.full(state.blocks.shape, self.num_draft_tokens, jnp.int32)

    def keep_drafting(self, state: Sums, signals: Signals) -> Any:
        """Always."""
        return jnp.ones(state.blocks.shape, bool)

    def update(self, state: Sums, outcome: Outcome) -> Sums:
        """Adds one block of every row that drafted."""
        by_rejection, by_block = jax.vmap(expected_accepted)(
            outcome.draft, outcome.target_log_probs
        )
        accepted = outcome.verdict.num_accepted.astype(jnp.float32)
        counts = outcome.is_active & (outcome.draft.length > 0)
        new = Sums(
            jnp.ones_like(by_block),
            outcome.draft.length.astype(jnp.float32),
            by_rejection,
            by_block,
            accepted,
            (by_block - by_rejection) ** 2,
            (accepted - by_block) ** 2,
        )
        return jax.tree.map(lambda old, more: old + jnp.where(counts, more, 0.0), state, new)


def expected_accepted(draft: Draft, target_log_probs: Any) -> tuple[Any, Any]:
    """E[accepted | these drafts] under rejection and under block, f32[] each (unbatched)."""
    lengths = jnp.arange(1, draft.tokens.shape[0] + 1)
    is_drafted = lengths <= draft.length
    log_ratios = jnp.minimum(ratio.log_ratios(draft, target_log_probs), 0.0)
    by_rejection = jnp.where(is_drafted, jnp.exp(jnp.cumsum(log_ratios)), 0.0)
    excess, lack = margins(draft, target_log_probs, prefix_log_weights(draft, target_log_probs))
    total = excess + lack
    fails = jnp.where(is_drafted, jnp.where(total > 0, lack / total, 0.0), 1.0)
    # At least i stand unless every prefix of i or more fails.
    by_block = 1.0 - jnp.cumprod(fails[::-1])[::-1]
    return jnp.sum(by_rejection), jnp.sum(jnp.where(is_drafted, by_block, 0.0))


def noisy(model: jaxspec.LanguageModel, share: float = 0.06) -> jaxspec.LanguageModel:
    """The model with noise in its weights, in shares of their standard deviation."""
    leaves, structure = jax.tree.flatten(model.params)
    rng = np.random.default_rng(0)

    def disturb(leaf: Any) -> Any:
        if leaf.ndim < 2:
            return leaf
        values = np.asarray(leaf, np.float32)
        noise = rng.standard_normal(leaf.shape, np.float32)
        return jnp.asarray(values + share * values.std() * noise, leaf.dtype)

    return model.replace(params=jax.tree.unflatten(structure, [disturb(x) for x in leaves]))


def measure(
    target: jaxspec.LanguageModel,
    draft: jaxspec.LanguageModel,
    prompts: list[list[int]],
    *,
    verifier: Any,
    max_new_tokens: int,
    num_draft_tokens: int,
    key: Any,
) -> dict[str, float]:
    """Means over the run's blocks of `Sums`, and their number."""
    prepared = arguments.prepare(
        target,
        prompts,
        drafter=drafters.model(draft),
        verifier=verifier,
        policy=Judge(num_draft_tokens),
        max_new_tokens=max_new_tokens,
        num_draft_tokens=num_draft_tokens,
        eos_ids=(),
        key=key,
    )
    state = prefill(
        prepared.engine, prepared.request, prepared.prompts, max_new_tokens=max_new_tokens
    )
    sums = jax.tree.map(jnp.sum, run(prepared.engine, prepared.request, state, -1).policy)
    blocks = float(sums.blocks)
    means = {name: float(value) / blocks for name, value in sums._asdict().items()}
    return means | {"blocks": blocks}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--max-new-tokens", type=int, default=100)
    parser.add_argument("--num-draft-tokens", type=int, default=4)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()

    model = jaxspec_models.load_model(args.model, dtype=args.dtype)
    tokenizer = jaxspec_models.load_tokenizer(args.model)
    chats = [[{"role": "user", "content": text}] for text in PROMPTS]
    prompts = [
        tokenizer.encode(
            tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True),
            add_special_tokens=False,
        )
        for chat in chats
    ]
    draft = noisy(model)
    device = jax.devices()[0]
    print(f"{args.model} {args.dtype}, {device.platform}, jax {jax.__version__}, "
          f"K = {args.num_draft_tokens}, temperature 1, accepted drafts a block:")  # fmt: skip
    print(f"{'run with':>10} {'seed':>4} {'blocks':>6} {'drafted':>8} {'accepted':>9} "
          f"{'E[rejection]':>12} {'E[block]':>9}")  # fmt: skip
    for name in ("block", "rejection", "match"):
        for seed in range(args.seeds):
            row = measure(
                model,
                draft,
                prompts,
                verifier=getattr(verifiers, name)(),
                max_new_tokens=args.max_new_tokens,
                num_draft_tokens=args.num_draft_tokens,
                key=jax.random.key(seed),
            )
            same = (
                ["", ""] if name == "match" else [f"{row[r]:.3f}" for r in ("rejection", "block")]
            )
            print(f"{name:>10} {seed:>4} {row['blocks']:>6.0f} {row['drafted']:>8.2f} "
                  f"{row['accepted']:>9.3f} {same[0]:>12} {same[1]:>9}")  # fmt: skip


if __name__ == "__main__":
    main()
