"""The exact law of one verified block, by calling a shipped verifier on explicit uniforms.

A verdict is piecewise constant in its uniforms. For every possible draft, the borders of the
pieces are found by bisection through the verifier itself, and the pieces' volumes added up in
float64: no sampling, and no second implementation of the rule.
"""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from jaxspec import Draft

_ALMOST_ONE = np.float32(1 - 2.0**-23)  # the largest number that jax.random.uniform returns
_STEPS = 24


@functools.cache
def _compiled(verify):
    return jax.jit(jax.vmap(verify))


class BlockOracle:
    """Laws of blocks of K drafts over V tokens under one verifier.

    Args:
      verify: `(numbers f32[K + 1, 3], draft, target_log_probs) -> Verdict`; [i, 0] decides
        about draft i and [i, 2] draws the token at offset i, both monotonically.
      target: {prefix tuple: float64[V]} for every prefix of up to K tokens.
      drafted: the same for the draft's law; None: `tokens_of` gives a deterministic draft.
      tokens_of: {prefix tuple: token}, for deterministic drafts.
    """

    def __init__(self, verify, target, drafted=None, *, tokens_of=None):
        self.target, self.drafted, self.tokens_of = target, drafted, tokens_of
        self.vocab_size = len(target[()])
        self.num_draft = max(len(prefix) for prefix in target)
        self._verify = _compiled(verify)

    def _texts(self):
        """Every possible draft with its probability."""
        if self.drafted is None:
            text = ()
            for _ in range(self.num_draft):
                text += (self.tokens_of[text],)
            return [(text, 1.0)]
        texts = []
        for text in itertools.product(range(self.vocab_size), repeat=self.num_draft):
            # Impossible drafts stay, with mass 0: every law of a size shares one program.
            mass = np.prod([self.drafted[text[:i]][x] for i, x in enumerate(text)])
            texts.append((text, float(mass)))
        return texts

    def _run(self, numbers, texts, length):
        """Verdict tokens and counts for each row of uniforms f32[R, K + 1, 3]."""
        with np.errstate(divide="ignore"):
            target = np.log(
                [[self.target[t[:i]] for i in range(self.num_draft + 1)] for t in texts]
            )
            drafted = None
            if self.drafted is not None:
                drafted = np.log(
                    [[self.drafted[t[:i]] for i in range(self.num_draft)] for t in texts]
                )
                drafted = jnp.asarray(drafted, jnp.float32)
        draft = Draft(
            jnp.asarray(texts, jnp.int32).reshape(len(texts), self.num_draft),
            drafted,
            jnp.full((len(texts),), length, jnp.int32),
        )
        verdict = self._verify(jnp.asarray(numbers), draft, jnp.asarray(target, jnp.float32))
        return np.asarray(verdict.tokens), np.asarray(verdict.num_accepted)

    @staticmethod
    def _smallest(holds, rows):
        """The border of a monotone condition in [0, 1), float64[rows]; 1 where it never holds."""
        low, high = np.zeros(rows), np.ones(rows)
        never = ~holds(np.full(rows, _ALMOST_ONE, np.float32))
        always = holds(np.zeros(rows, np.float32))
        for _ in range(_STEPS):
            middle = (low + high) / 2
            is_above = holds(np.minimum(middle, _ALMOST_ONE).astype(np.float32))
            high, low = np.where(is_above, middle, high), np.where(is_above, low, middle)
        return np.where(never, 1.0, np.where(always, 0.0, high))

    def emitted_law(self, length=None) -> dict:
        """{emitted tokens of one block: probability}."""
        size = self.num_draft
        length = size if length is None else length
        texts, masses = map(list, zip(*self._texts(), strict=True))
        rows = len(texts)

        # Where each draft's own test turns from rejection to acceptance.
        borders = np.zeros((rows, size))
        for i in range(size):

            def passes(u, i=i):
                numbers = np.full((rows, size + 1, 3), _ALMOST_ONE, np.float32)
                numbers[:, i, 0] = u
                return self._run(numbers, texts, length)[1] > i

            borders[:, i] = self._smallest(passes, rows)

        # Every combination of passed and failed tests, also behind the first failure.
        law: dict = {}
        for passed in itertools.product([False, True], repeat=size):
            numbers = np.full((rows, size + 1, 3), 0.5, np.float32)
            volume = np.array(masses)
            for i, does_pass in enumerate(passed):
                border = borders[:, i]
                numbers[:, i, 0] = np.minimum(
                    (border + 1) / 2 if does_pass else border / 2, _ALMOST_ONE
                )
                volume = volume * ((1 - border) if does_pass else border)
            self._add_drawn(law, numbers, texts, length, volume)
        return law

    def _add_drawn(self, law, numbers, texts, length, volume):
        """Splits each piece by the token drawn at its end."""
        rows = len(texts)

        def last_token(u):
            at = numbers.copy()
            at[:, :, 2] = u[:, None]
            tokens, count = self._run(at, texts, length)
            return tokens[np.arange(rows), count]

        borders = [np.zeros(rows)]
        for token in range(self.vocab_size - 1):
            borders.append(self._smallest(lambda u, t=token: last_token(u) > t, rows))
        borders.append(np.ones(rows))
        for first, end in itertools.pairwise(borders):
            at = numbers.copy()
            at[:, :, 2] = np.minimum((first + end) / 2, _ALMOST_ONE)[:, None]
            tokens, count = self._run(at, texts, length)
            for row in range(rows):
                mass = volume[row] * (end[row] - first[row])
                if mass > 0:
                    text = tuple(tokens[row, : count[row] + 1].tolist())
                    law[text] = law.get(text, 0.0) + mass

    def completed_law(self, length=None) -> dict:
        """The emitted tokens, carried on to K + 1 tokens by the target itself."""
        law: dict = {}

        def extend(text, mass):
            if len(text) == self.num_draft + 1:
                law[text] = law.get(text, 0.0) + mass
                return
            for token, prob in enumerate(self.target[text]):
                if prob > 0:
                    extend((*text, token), mass * prob)

        for text, mass in self.emitted_law(length).items():
            extend(text, mass)
        return law

    def target_law(self) -> dict:
        """The target's own law of K + 1 tokens."""
        law: dict = {}
        for text in itertools.product(range(self.vocab_size), repeat=self.num_draft + 1):
            mass = np.prod([self.target[text[:i]][x] for i, x in enumerate(text)])
            if mass > 0:
                law[text] = float(mass)
        return law

    def distance(self, length=None) -> float:
        """Total variation between the completed law and the target's."""
        ours, exact = self.completed_law(length), self.target_law()
        return 0.5 * sum(
            abs(ours.get(text, 0.0) - exact.get(text, 0.0)) for text in set(ours) | set(exact)
        )

    def expected_accepted(self, length=None) -> float:
        """E[number of accepted drafts]."""
        return sum(mass * (len(text) - 1) for text, mass in self.emitted_law(length).items())


def random_laws(seed, *, vocab_size, num_draft, zeros=0):
    """A law float64[V] for every prefix of up to K tokens, with `zeros` impossible tokens each."""
    rng = np.random.default_rng(seed)
    laws = {}
    for size in range(num_draft + 1):
        for prefix in itertools.product(range(vocab_size), repeat=size):
            weights = rng.gamma(0.7, size=vocab_size) + 0.01
            weights[rng.permutation(vocab_size)[:zeros]] = 0.0
            laws[prefix] = weights / weights.sum()
    return laws
