"""What do the lossy rules bring, and how far do they move the law?

    .venv/bin/python benchmarks/lossy.py --max-new-tokens 200

Writes with the default model at temperature 1, drafted by a copy with noise in its weights and
judged by `rejection`. On the very same blocks each rule's expectations are computed, without a
further draw: accepted drafts a block; the share of a block's drafts that it accepts and
speculative sampling would have rejected ("fast"); and the total variation between the law of the
block's first token and the target's, in the mean over blocks and in the worst of them.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from verifiers import PROMPTS, noisy

import jaxspec
import jaxspec_models
from jaxspec import Outcome, Signals, arguments, drafters, pytree, verifiers
from jaxspec.generate import begin, run
from jaxspec_models.text import encode_prompt


def _lenient(share: float) -> Callable[..., Any]:
    return lambda p, q: (jnp.minimum(1, p / (share * q)), jnp.maximum(p - share * q, 0))


def _confidence(threshold: float) -> Callable[..., Any]:
    return lambda p, q: (
        jnp.where(p >= threshold, 1.0, jnp.minimum(1, p / q)),
        jnp.maximum(p - q, 0),
    )


def _typical(p: Any, q: Any) -> Any:
    entropy = -jnp.sum(jnp.where(p > 0, p * jnp.log(p), 0.0), axis=-1, keepdims=True)
    return (p > jnp.minimum(0.3, 0.09 * jnp.exp(-entropy))).astype(jnp.float32) + 0 * q, p


# How each accepts token x of p and q, f32[…, V], and what it draws from else.
RULES = {
    "rejection": _lenient(1.0),
    "lenient(0.8)": _lenient(0.8),
    "lenient(0.5)": _lenient(0.5),
    "lenient(0.2)": _lenient(0.2),
    "confidence(0.8)": _confidence(0.8),
    "confidence(0.5)": _confidence(0.5),
    "confidence(0.2)": _confidence(0.2),
    "typical()": _typical,
}


class Sums(NamedTuple):
    """f32[B, rules], but `blocks` and `drafted` f32[B]."""

    blocks: Any
    drafted: Any
    accepted: Any
    fast: Any
    moved: Any
    most_moved: Any


@pytree.dataclass
class Judge:
    """A policy that drafts K tokens in every round and sums up what each rule would do."""

    num_draft_tokens: int = pytree.static()

    def init(self, batch: int) -> Sums:
        """Zeros."""
        one, many = jnp.zeros((batch,)), jnp.zeros((batch, len(RULES)))
        return Sums(one, one, many, many, many, many)

    def num_draft(self, state: Sums) -> Any:
        """K."""
        return jnp.full(state.blocks.shape, self.num_draft_tokens, jnp.int32)

    def keep_drafting(self, state: Sums, signals: Signals) -> Any:
        """Always."""
        return jnp.ones(state.blocks.shape, bool)

    def update(self, state: Sums, outcome: Outcome) -> Sums:
        """Adds one block of every row that drafted."""
        draft = outcome.draft
        p = jnp.exp(outcome.target_log_probs[:, :-1])
        q = jnp.maximum(jnp.exp(draft.log_probs), 1e-30)
        is_drafted = jnp.arange(p.shape[1])[None] < draft.length[:, None]
        exact = jnp.minimum(1, p / q)
        accepted, fast, moved = [], [], []
        for rule in RULES.values():
            accepts, left = rule(p, q)
            of_drafts = jnp.where(is_drafted, _of(accepts, draft.tokens), 0.0)
            accepted.append(jnp.sum(jnp.cumprod(of_drafts, axis=1), axis=1))
            gains = jnp.maximum(of_drafts - _of(exact, draft.tokens), 0.0)
            fast.append(jnp.sum(jnp.where(is_drafted, gains, 0.0), axis=1))
            kept = q[:, 0] * accepts[:, 0]
            missing = 1 - jnp.sum(kept, axis=-1, keepdims=True)
            rest = left[:, 0] / jnp.maximum(jnp.sum(left[:, 0], axis=-1, keepdims=True), 1e-30)
            moved.append(0.5 * jnp.sum(jnp.abs(kept + missing * rest - p[:, 0]), axis=-1))
        counts = (outcome.is_active & (draft.length > 0)).astype(jnp.float32)
        new = Sums(
            jnp.ones_like(counts),
            draft.length.astype(jnp.float32),
            *(jnp.stack(x, axis=1) for x in (accepted, fast, moved, moved)),
        )
        added = jax.tree.map(
            lambda old, x: old + x * counts.reshape(-1, *[1] * (x.ndim - 1)), state, new
        )
        worst = jnp.maximum(state.most_moved, new.most_moved * counts[:, None])
        return added._replace(most_moved=worst)


def _of(law: Any, tokens: Any) -> Any:
    return jnp.take_along_axis(law, tokens[:, :, None], axis=2)[:, :, 0]


def measure(
    target: jaxspec.LanguageModel,
    draft: jaxspec.LanguageModel,
    prompts: list[list[int]],
    *,
    max_new_tokens: int,
    num_draft_tokens: int,
    seed: int,
) -> dict[str, dict[str, float]]:
    """Each rule's figures, over one run of all prompts."""
    prepared = arguments.prepare(
        target,
        prompts,
        drafter=drafters.model(draft),
        verifier=verifiers.rejection(),
        policy=Judge(num_draft_tokens),
        max_new_tokens=max_new_tokens,
        num_draft_tokens=num_draft_tokens,
        eos_ids=(),
        key=jax.random.key(seed),
    )
    sums = run(prepared.engine, prepared.request, begin(prepared), -1).policy
    blocks, drafted = float(jnp.sum(sums.blocks)), float(jnp.sum(sums.drafted))
    return {
        name: {
            "blocks": blocks,
            "accepted": float(jnp.sum(sums.accepted[:, i])) / blocks,
            "fast": float(jnp.sum(sums.fast[:, i])) / drafted,
            "moved": float(jnp.sum(sums.moved[:, i])) / blocks,
            "most_moved": float(jnp.max(sums.most_moved[:, i])),
        }
        for i, name in enumerate(RULES)
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--max-new-tokens", type=int, default=200)
    parser.add_argument("--num-draft-tokens", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    target = jaxspec_models.load_model(args.model, dtype=args.dtype)
    tokenizer = jaxspec_models.load_tokenizer(args.model)
    prompts = [encode_prompt(tokenizer, [{"role": "user", "content": text}]) for text in PROMPTS]
    figures = measure(
        target,
        noisy(target),
        prompts,
        max_new_tokens=args.max_new_tokens,
        num_draft_tokens=args.num_draft_tokens,
        seed=args.seed,
    )
    device, blocks = jax.devices()[0].platform, figures["rejection"]["blocks"]
    print(f"{args.model} {args.dtype}, {device}, jax {jax.__version__}, "
          f"K = {args.num_draft_tokens}, temperature 1, {blocks:.0f} blocks")  # fmt: skip
    print(f"{'rule':>16} {'accepted':>9} {'fast':>6} {'TV, mean':>9} {'worst':>6}")
    for name, row in figures.items():
        print(f"{name:>16} {row['accepted']:9.2f} {row['fast']:6.1%} {row['moved']:9.4f} "
              f"{row['most_moved']:6.2f}")  # fmt: skip


if __name__ == "__main__":
    main()
