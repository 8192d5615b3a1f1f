"""Sampling options: from logits to log-probabilities, at every draft position.

One function, `process`, serves the target's verification and a drafter's own sampling, so that
both mean the same by every option. It is unbatched and pure; `process_rows` maps it over a batch.
Whatever looks back counts the drafted prefix as if it had been emitted.

- `options`: what users pass, checked and spread over the rows.
- `memory`: what must be remembered of the committed tokens, and the view a position gets of them.
- `grammar`: finite-state machines that say which tokens may follow.
- `penalties`: what changes logits because of the tokens before them.
- `cuts`: what keeps the likeliest tokens only: top-k, top-p, typical-p.
- `processing`: all of it, in its order.
"""

from jaxspec.sampling.cuts import log_prob as log_prob
from jaxspec.sampling.cuts import log_softmax as log_softmax
from jaxspec.sampling.grammar import Grammar as Grammar
from jaxspec.sampling.grammar import grammar_of as grammar_of
from jaxspec.sampling.grammar import join_grammars as join_grammars
from jaxspec.sampling.memory import History as History
from jaxspec.sampling.memory import Memory as Memory
from jaxspec.sampling.memory import Text as Text
from jaxspec.sampling.memory import recall as recall
from jaxspec.sampling.memory import remember as remember
from jaxspec.sampling.options import Options as Options
from jaxspec.sampling.options import Sampling as Sampling
from jaxspec.sampling.options import check as check
from jaxspec.sampling.options import resolve as resolve
from jaxspec.sampling.options import spread as spread
from jaxspec.sampling.processing import Scores as Scores
from jaxspec.sampling.processing import process as process
from jaxspec.sampling.processing import process_rows as process_rows
