"""Training drafters: what is minimised, and the steps (needs optax; see `jaxspec train`).

Nothing else in `jaxspec` imports this package.
"""

from jaxspec.training import losses as losses
from jaxspec.training import steps as steps
