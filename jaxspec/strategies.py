"""Which drafter, rule and policy a call runs: checked, and chosen where they were left open."""

from __future__ import annotations

import os
from typing import Any

import jax
import numpy as np

from jaxspec import policies, states, verifiers
from jaxspec.sampling import Sampling
from jaxspec.settings import Settings
from jaxspec.settings import read as read_settings
from jaxspec.types import Drafter, LanguageModel, Policy, Verifier


def engine(
    target: LanguageModel,
    drafter: Drafter | str | None,
    verifier: Verifier | None,
    policy: Policy | None,
    options: Sampling,
    num_draft_tokens: int,
    outputs: states.Outputs,
) -> states.Engine:
    """Checks strategies against each other, and puts them together.

    Args:
      target: the target.
      drafter: what drafts; None: nothing.
      verifier: the rule; None: the strongest exact one.
      policy: None: always as many drafts.
      options: the sampling options.
      num_draft_tokens: K, but a tree's nodes where trees are drafted.
      outputs: what is reported.

    Returns:
      The engine; its K is 0 without a drafter.

    Raises:
      ValueError: something is no strategy, or does not go with the others.
    """
    if isinstance(drafter, LanguageModel):
        raise ValueError("to draft with a model, pass drafter=jaxspec.drafters.model(lm).")
    if isinstance(drafter, str) or not (drafter is None or isinstance(drafter, Drafter)):
        raise ValueError(
            "drafter must come from jaxspec.drafters or follow jaxspec.types.Drafter, or be "
            f"'auto' or None; got {drafter!r}{_lacks(drafter, Drafter)}."
        )
    if drafter is None:
        num_draft_tokens = 0
    else:
        check_count("num_draft_tokens", num_draft_tokens)
        size = getattr(drafter, "vocab_size", None)
        if size is not None and size != target.vocab_size:
            raise ValueError(
                f"the drafter has {size} tokens and the target {target.vocab_size}; both must "
                "use one vocabulary. Choose a draft model with the target's tokenizer."
            )
        if drafter.hidden_layers:
            target.require(["hidden_layers"], "this drafter")
        if hasattr(drafter, "num_nodes"):
            target.require_trees("this drafter")
            num_draft_tokens = drafter.num_nodes
        _check_pytree(drafter)
    check_type("verifier", verifier, Verifier, "jaxspec.verifiers")
    check_type("policy", policy, Policy, "jaxspec.policies")
    is_greedy = options.is_greedy or _is_all_zero(options.temperature)
    if getattr(verifier, "needs_greedy_sampling", False) and not is_greedy:
        raise ValueError(
            "verifiers.greedy is exact at temperature 0 only; pass "
            "sampling=Sampling(temperature=0) with a Python 0, not an array, or leave "
            "verifier=None for the right rule."
        )
    rule = _strongest_rule(drafter, options) if verifier is None else verifier
    _check_children(drafter, rule)
    chosen: Policy = policies.fixed(num_draft_tokens) if policy is None else policy
    kinds = (type(drafter), type(rule), type(chosen))
    return states.Engine(target, drafter, rule, chosen, num_draft_tokens, outputs, kinds)


def tuned(drafter: Any, settings: Settings | str | os.PathLike[str]) -> tuple[Drafter | None, int]:
    """The drafter as settings want it, and K.

    Raises:
      ValueError: there are no such settings, or no drafter that can follow them.
    """
    if not isinstance(settings, Settings):
        if not isinstance(settings, (str, os.PathLike)):
            raise ValueError(
                "settings must be a jaxspec.Settings or a file of `jaxspec tune`, got "
                f"{type(settings).__name__}."
            )
        settings = read_settings(settings)
    if drafter is None:
        raise ValueError("settings tell how to draft; pass a drafter, such as drafter='auto'.")
    if settings.num_draft_tokens == 0:
        return None, 1
    if settings.tree is None:
        return drafter, settings.num_draft_tokens
    if not hasattr(drafter, "in_tree"):
        raise ValueError(
            f"the settings want a tree, and {type(drafter).__name__} has no in_tree(topology) that "
            "makes a drafter of trees; run `jaxspec tune` with the drafter that is to be used."
        )
    return drafter.in_tree(settings.tree), settings.num_draft_tokens


def _strongest_rule(drafter: Any, options: Sampling) -> Verifier:
    """The lossless rule that accepts most of what a drafter drafts."""
    if options.is_greedy:
        return verifiers.greedy()
    if not hasattr(drafter, "num_nodes"):
        return verifiers.block()
    if drafter.children == "top_k":
        return verifiers.descent()
    return verifiers.traversal(with_replacement=drafter.children == "independent")


def _check_children(drafter: Any, rule: Verifier) -> None:
    """Refuses a rule for trees that were made otherwise, which would change the output's law."""
    if not hasattr(drafter, "num_nodes"):
        return
    children, takes = drafter.children, getattr(rule, "takes_children", ())
    if children not in takes:
        wanted = f"children found as {' or '.join(takes)}" if takes else "chains only"
        raise ValueError(
            f"the drafter drafts trees whose children are {children!r}, and {type(rule).__name__} "
            f"is exact for {wanted}; leave verifier=None for the right rule."
        )


def check_exact(engine: states.Engine) -> None:
    """Raises ValueError where the output's law would not be the target's."""
    name = type(engine.verifier).__name__
    if engine.verifier.guarantee == "none":
        raise ValueError(
            f"{name} is a lossy rule: its texts have another distribution than the target's. Pass "
            "exact=False to allow that, or verifier=None for the strongest exact rule."
        )
    for kind, strategy in (("drafter", engine.drafter), ("policy", engine.policy)):
        if getattr(strategy, "is_anticipating", False):
            raise ValueError(
                f"the {kind} {type(strategy).__name__} drops drafted tokens for their own value, "
                "which changes the output's distribution whatever the rule (arXiv 2211.17192 "
                "needs draft lengths that do not look ahead). Decide before a token is drawn "
                "(`Policy.keep_drafting`), or pass exact=False."
            )


def check_type(name: str, value: Any, protocol: type, home: str) -> None:
    """Raises ValueError unless `value` is None or a strategy that jit can take."""
    # Functions satisfy a protocol of one call: a factory that was not called has a name.
    if value is None or (isinstance(value, protocol) and not hasattr(value, "__name__")):
        _check_pytree(value)
        return
    raise ValueError(
        f"{name} must come from {home} (called: {home}.name()) or follow "
        f"jaxspec.types.{protocol.__name__}; got {value!r}{_lacks(value, protocol)}."
    )


def _lacks(value: Any, protocol: type) -> str:
    """What keeps a value from following a protocol, as the end of a sentence."""
    if isinstance(value, type):
        return ", a class: pass an instance"
    names = [name for name in vars(protocol) if not name.startswith("_")]
    missing = [name for name in names if not hasattr(value, name)]
    return f", which lacks {', '.join(missing)}" if 0 < len(missing) < len(names) else ""


def _check_pytree(strategy: Any) -> None:
    if any(leaf is strategy for leaf in jax.tree.leaves(strategy)):
        raise ValueError(
            f"{type(strategy).__name__} is no pytree: decorate the class with "
            "jaxspec.pytree.dataclass."
        )


def _is_all_zero(temperature: Any) -> bool:
    if temperature is None or isinstance(temperature, jax.core.Tracer):
        return False
    return not np.any(np.asarray(temperature))


def check_count(name: str, value: Any) -> None:
    """Raises ValueError unless `value` is a Python integer of at least 1."""
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a Python integer of at least 1, got {value!r}.")
