"""The exact law of one verified block, by calling a rule on explicit uniforms.

A verdict is piecewise constant in its uniforms. For every possible draft, the borders of the
pieces are found by bisection through the rule itself, and the pieces' volumes added up in
float64: no sampling, and no second implementation of the rule.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jaxspec.testing.oracle import Law, Text
from jaxspec.types import NO_NODE, Draft, Verdict

Array: TypeAlias = np.ndarray[Any, Any]
Laws: TypeAlias = Mapping[Text, Array]
# Numbers f32[R, K + 1, 3] -> tokens, their number before the last, and the node it stands behind.
_Run: TypeAlias = Callable[[Array], tuple[Array, Array, Array]]

_ALMOST_ONE = np.float32(1 - 2.0**-23)  # the largest number that jax.random.uniform returns
_STEPS = 24


@jax.jit
def _judge(verifier: Any, numbers: jax.Array, draft: Draft, target: jax.Array) -> Verdict:
    return jax.vmap(verifier.judge)(numbers, draft, target)


class Block:
    """The drafts of one block: their laws, the target's, and every text they can make.

    Args:
      target: {prefix: float64[V]} for every prefix of up to K tokens.
      drafted: the same for the draft's law q; None: `tokens_of` gives a deterministic draft.
      tokens_of: {prefix: token}, for deterministic drafts.
      length: how many of the K slots are drafted; None: all.
    """

    def __init__(
        self,
        target: Laws,
        drafted: Laws | None = None,
        *,
        tokens_of: Mapping[Text, int] | None = None,
        length: int | None = None,
    ):
        self.target, self.drafted, self.tokens_of = target, drafted, tokens_of
        self.vocab_size = len(target[()])
        self.num_draft = self.depth = max(len(prefix) for prefix in target)
        self.length = self.num_draft if length is None else length

    @property
    def is_drawn(self) -> bool:
        """Whether the tokens are drawn; else they are point masses."""
        return self.drafted is not None

    def texts(self) -> list[tuple[Text, float]]:
        """Every possible draft with its probability."""
        if self.drafted is None:
            assert self.tokens_of is not None
            text: Text = ()
            for _ in range(self.num_draft):
                text += (self.tokens_of[text],)
            return [(text, 1.0)]
        drafted = self.drafted
        texts = []
        for text in itertools.product(range(self.vocab_size), repeat=self.num_draft):
            # Impossible drafts stay, with mass 0: every law of a size shares one program.
            mass = np.prod([drafted[text[:i]][x] for i, x in enumerate(text)])
            texts.append((text, float(mass)))
        return texts

    def first_drafts(self, text: Text) -> set[int]:
        """The drafts of a text that may stand first."""
        return set(text[: min(self.length, 1)])

    def arrays(self, texts: list[Text]) -> tuple[Draft, jax.Array]:
        """The `Draft` and the target's log-probabilities f32[R, K + 1, V] of R texts."""
        size = self.num_draft
        with np.errstate(divide="ignore"):
            target = np.log([[self.target[t[:i]] for i in range(size + 1)] for t in texts])
            drafted = None
            if self.drafted is not None:
                laws = [[self.drafted[t[:i]] for i in range(size)] for t in texts]
                drafted = jnp.asarray(np.log(laws), jnp.float32)
        draft = Draft(
            jnp.asarray(texts, jnp.int32).reshape(len(texts), size),
            drafted,
            jnp.full((len(texts),), self.length, jnp.int32),
        )
        return draft, jnp.asarray(target, jnp.float32)

    def completed(self, emitted: Mapping[Text, float]) -> Law:
        """Emitted texts, carried on to one token more than the draft is deep by the target."""
        law: Law = {}

        def extend(text: Text, mass: float) -> None:
            if len(text) == self.depth + 1:
                law[text] = law.get(text, 0.0) + mass
                return
            for token, prob in enumerate(self.target[text].tolist()):
                if prob > 0:
                    extend((*text, token), mass * prob)

        for text, mass in emitted.items():
            extend(text, mass)
        return law

    def target_law(self) -> Law:
        """The target's own law of the completed texts."""
        return self.completed({(): 1.0})


class TreeBlock(Block):
    """The drafts of one tree of K nodes.

    Args:
      target: {path: float64[V]} for every path of up to the tree's depth.
      drafted: the same for q; with "top_k" children, the nodes are its likeliest tokens.
      parents: of each node, -1 or an earlier node.
      children: how siblings are found, see `jaxspec.types.Verifier`.
      length: how many of the nodes are drafted; None: all.
    """

    def __init__(
        self,
        target: Laws,
        drafted: Laws,
        *,
        parents: Sequence[int],
        children: str,
        length: int | None = None,
    ):
        super().__init__(target, drafted)
        self.parents, self.children = tuple(parents), children
        self.num_draft = len(self.parents)
        self.length = self.num_draft if length is None else length

    @property
    def is_drawn(self) -> bool:
        """As `Block.is_drawn`."""
        return self.children != "top_k"

    def _path(self, text: Text, slot: int) -> Text:
        """The tokens down to a node, itself included; () for the pending token."""
        if slot < 0:
            return ()
        return (*self._path(text, self.parents[slot]), text[slot])

    def _is_missing(self, text: Text, slot: int) -> bool:
        return self.vocab_size in self._path(text, slot)

    def texts(self) -> list[tuple[Text, float]]:
        """Every possible draft with its probability; V stands for a node that does not exist."""
        found: list[tuple[Text, float]] = [((), 1.0)]
        for slot, parent in enumerate(self.parents):
            longer = []
            for text, mass in found:
                for token, share in enumerate(self._shares(text, slot, parent)):
                    if share > 0:
                        longer.append(((*text, token), mass * share))
            found = longer
        return found

    def _shares(self, text: Text, slot: int, parent: int) -> Array:
        """Probabilities float64[V + 1] of a node's token, given those before it."""
        missing = np.eye(self.vocab_size + 1)[-1]
        if self._is_missing(text, parent):
            return missing
        assert self.drafted is not None
        law = np.append(self.drafted[self._path(text, parent)], 0.0)
        elder = [text[i] for i in range(slot) if self.parents[i] == parent]
        if self.children == "independent":
            return law
        law[elder] = 0.0
        if law.sum() == 0:
            return missing
        if self.children == "top_k":
            return np.eye(self.vocab_size + 1)[np.argmax(law)]
        return law / law.sum()

    def first_drafts(self, text: Text) -> set[int]:
        """As `Block.first_drafts`: the children of the pending token."""
        children = zip(text[: self.length], self.parents, strict=False)
        return {token for token, parent in children if parent < 0} - {self.vocab_size}

    def arrays(self, texts: list[Text]) -> tuple[Draft, jax.Array]:
        """As `Block.arrays`."""
        assert self.drafted is not None
        any_law = np.full(self.vocab_size, 1.0 / self.vocab_size)

        def laws(of: Laws, text: Text, slots: Sequence[int]) -> list[Array]:
            return [
                any_law if self._is_missing(text, s) else of[self._path(text, s)] for s in slots
            ]

        slots = range(-1, self.num_draft)
        with np.errstate(divide="ignore"):
            target = np.log([laws(self.target, text, slots) for text in texts])
            drafted = np.log([laws(self.drafted, text, self.parents) for text in texts])
        is_missing = np.array([[self._is_missing(t, s) for s in slots[1:]] for t in texts])
        draft = Draft(
            jnp.asarray(np.where(is_missing, 0, np.array(texts)), jnp.int32),
            jnp.asarray(drafted, jnp.float32) if self.is_drawn else None,
            jnp.full((len(texts),), self.length, jnp.int32),
            parents=jnp.asarray(np.where(is_missing, NO_NODE, np.array(self.parents)), jnp.int32),
        )
        return draft, jnp.asarray(target, jnp.float32)


def emitted_laws(verifier: Any, blocks: Sequence[Block]) -> list[Law]:
    """{tokens that one block emits: probability}, exactly, up to the borders' rounding.

    Args:
      verifier: a rule with a `judge`, see `jaxspec.types.Verifier`.
      blocks: of one V and K, all with sampled or all with deterministic drafts.

    Returns:
      A law for each block.

    Raises:
      ValueError: the rule does not work as described.
    """
    size, vocab_size = blocks[0].num_draft, blocks[0].vocab_size
    owners, masses, parts = [], [], []
    for number, block in enumerate(blocks):
        texts = block.texts()
        owners += [number] * len(texts)
        masses += [mass for _, mass in texts]
        parts.append(block.arrays([text for text, _ in texts]))
    draft, target = jax.tree.map(lambda *arrays: jnp.concatenate(arrays), *parts)
    rows = len(owners)

    def run(numbers: Array) -> tuple[Array, Array, Array]:
        verdict = _judge(verifier, jnp.asarray(numbers), draft, target)
        tokens, count = np.asarray(verdict.tokens), np.asarray(verdict.num_accepted)
        if verdict.path is None:
            return tokens, count, count
        last = np.asarray(verdict.path)[np.arange(rows), np.maximum(count - 1, 0)]
        return tokens, count, np.where(count > 0, last + 1, 0)  # the node that stands

    borders = _test_borders(run, rows, size)
    laws: list[Law] = [{} for _ in blocks]
    # Every combination of passed and failed tests, also behind the first failure.
    for passed in itertools.product([False, True], repeat=size):
        numbers = np.full((rows, size + 1, 3), 0.5, np.float32)
        volume = np.array(masses)
        for i, does_pass in enumerate(passed):
            border = borders[:, i]
            inside = (border + 1) / 2 if does_pass else border / 2
            numbers[:, i, 0] = np.minimum(inside, _ALMOST_ONE)
            volume = volume * ((1 - border) if does_pass else border)
        for owner, text, mass in _split_by_token(run, numbers, volume, vocab_size):
            law = laws[owners[owner]]
            law[text] = law.get(text, 0.0) + mass
    _check_pieces(run, borders)
    return laws


def _test_borders(run: _Run, rows: int, size: int) -> Array:
    """Where each draft's test turns from failing to passing, float64[rows, K]; 1: never.

    A test may be hidden while others pass or fail (the first failure ends `rejection`, the last
    success decides `block`), so each border is looked for in every combination of the others.
    """
    borders = np.full((rows, size), np.nan)
    for i in range(size):
        for others in itertools.product([0.0, float(_ALMOST_ONE)], repeat=size - 1):
            numbers = np.full((rows, size + 1, 3), 0.5, np.float32)
            numbers[:, [j for j in range(size) if j != i], 0] = others

            def end(u: Array, i: int = i, numbers: Array = numbers) -> Array:
                at = numbers.copy()
                at[:, i, 0] = u
                return run(at)[2]

            lowest, highest = end(np.zeros(rows)), end(np.full(rows, _ALMOST_ONE))
            changes = lowest != highest
            if changes.any():

                def differs(u: Array, end: Any = end, lowest: Array = lowest) -> Array:
                    return end(u) != lowest

                found = _smallest(differs, rows)
                borders[:, i] = np.where(changes & np.isnan(borders[:, i]), found, borders[:, i])
    # A test that never shows decides nothing: passing and failing are the same.
    return np.where(np.isnan(borders), 0.0, borders)


def _smallest(holds: Callable[[Array], Array], rows: int) -> Array:
    """The border of a monotone condition in [0, 1), float64[rows]; 1 where it never holds."""
    low, high = np.zeros(rows), np.ones(rows)
    never = ~holds(np.full(rows, _ALMOST_ONE, np.float32))
    always = holds(np.zeros(rows, np.float32))
    for _ in range(_STEPS):
        middle = (low + high) / 2
        is_above = holds(np.minimum(middle, _ALMOST_ONE).astype(np.float32))
        high, low = np.where(is_above, middle, high), np.where(is_above, low, middle)
    return np.where(never, 1.0, np.where(always, 0.0, high))


def _split_by_token(
    run: _Run, numbers: Array, volume: Array, vocab_size: int
) -> Iterator[tuple[int, Text, float]]:
    """Splits each row's piece by the token drawn at its end: (row, emitted text, mass)."""
    rows = len(volume)

    def last_token(u: Array) -> Array:
        at = numbers.copy()
        at[:, :, 2] = u[:, None]
        tokens, count, _ = run(at)
        return tokens[np.arange(rows), count]

    borders = [np.zeros(rows)]
    for token in range(vocab_size - 1):

        def is_later(u: Array, token: int = token) -> Array:
            return last_token(u) > token

        borders.append(_smallest(is_later, rows))
    borders.append(np.ones(rows))
    for first, end in itertools.pairwise(borders):
        at = numbers.copy()
        at[:, :, 2] = np.minimum((first + end) / 2, _ALMOST_ONE)[:, None]
        tokens, count, _ = run(at)
        for row in range(rows):
            mass = volume[row] * (end[row] - first[row])
            if mass > 0:
                yield row, tuple(tokens[row, : count[row] + 1].tolist()), float(mass)


def _check_pieces(run: _Run, borders: Array) -> None:
    """The verdict must be constant inside each piece, but for [i, 2]: tried at random points."""
    rng = np.random.default_rng(0)
    rows, size = borders.shape
    for _ in range(16):
        numbers = rng.random((rows, size + 1, 3)).astype(np.float32)
        numbers = np.minimum(numbers, _ALMOST_ONE)
        centre = numbers.copy()
        centre[:, :, 1] = rng.random((rows, size + 1))  # it decides between blocks of 256 tokens
        for i in range(size):
            border = borders[:, i]
            passes = numbers[:, i, 0] > border
            inside = np.where(passes, (border + 1) / 2, border / 2)
            is_clear = np.abs(numbers[:, i, 0] - border) > 1e-6
            centre[:, i, 0] = np.where(is_clear, np.minimum(inside, _ALMOST_ONE), numbers[:, i, 0])
        if any((one != other).any() for one, other in zip(run(numbers), run(centre), strict=True)):
            raise ValueError(
                "the rule's judge cannot be enumerated: number [i, 0] must decide about draft i "
                "alone, failing below one border and passing above it, and [i, 2] alone draw the "
                "token behind i drafts. Leave judge out; the law is then sampled."
            )
