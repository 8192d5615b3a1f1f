"""Exact speculative decoding in JAX: several tokens per target forward, one compiled program."""

from jaxspec import drafters as drafters
from jaxspec import lossy as lossy
from jaxspec import policies as policies
from jaxspec import status as status
from jaxspec import testing as testing
from jaxspec import verifiers as verifiers
from jaxspec.costs import measure_costs as measure_costs
from jaxspec.generate import Generation as Generation
from jaxspec.generate import generate as generate
from jaxspec.profile import Profile as Profile
from jaxspec.sampling import Sampling as Sampling
from jaxspec.settings import Settings as Settings
from jaxspec.stats import Stats as Stats
from jaxspec.stream import stream as stream
from jaxspec.types import Context as Context
from jaxspec.types import Draft as Draft
from jaxspec.types import LanguageModel as LanguageModel
from jaxspec.types import ModelOutput as ModelOutput
from jaxspec.types import Outcome as Outcome
from jaxspec.types import Signals as Signals
from jaxspec.types import Verdict as Verdict
from jaxspec.verify import verify as verify

__version__ = "0.1.0"
