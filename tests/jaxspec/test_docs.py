"""What is public is documented: arguments, errors, source and an example that runs."""

import inspect
import pathlib
import re

import jax
import pytest

import jaxspec
import jaxspec_models
from jaxspec import drafters, policies, sampling, status, testing, verifiers
from jaxspec_models import answers, grammars

_FUNCTIONS = [
    jaxspec.generate,
    jaxspec.stream,
    jaxspec.verify,
    status.message,
    *(getattr(drafters, name) for name in drafters.__all__),
    *(getattr(policies, name) for name in policies.__all__),
    *(getattr(verifiers, name) for name in verifiers.__all__),
    *(getattr(testing, name) for name in testing.__all__ if name.islower()),
    jaxspec_models.load,
    jaxspec_models.load_drafter,
    jaxspec_models.load_model,
    jaxspec_models.load_tokenizer,
    jaxspec_models.generate_text,
    jaxspec_models.from_hf,
    jaxspec_models.stop_strings,
    sampling.grammar_of,
    sampling.join_grammars,
    grammars.regex_grammar,
    grammars.token_bytes,
    answers.read_prompts,
    answers.write_answers,
]
_ALGORITHMS = [jaxspec.generate, jaxspec.verify] + [
    getattr(module, name) for module in (drafters, policies, verifiers) for name in module.__all__
]
_CLASSES = [
    getattr(jaxspec, name)
    for name in dir(jaxspec)
    if inspect.isclass(getattr(jaxspec, name)) and not name.startswith("_")
] + [getattr(testing, name) for name in testing.__all__ if name.endswith(("Report", "Comparison"))]


@pytest.mark.parametrize("function", _FUNCTIONS, ids=lambda f: f.__name__)
def test_public_functions_have_examples_and_describe_every_argument(function):
    text = inspect.getdoc(function)
    assert "Example:" in text
    assert ">>>" in text
    if "arguments and errors as `load`" in text:
        return
    parameters = list(inspect.signature(function).parameters)
    if parameters:
        assert "Args:" in text
        assert all(f"{name}:" in text for name in parameters), parameters
    assert "Returns:" in text


@pytest.mark.parametrize("function", _ALGORITHMS, ids=lambda f: f.__name__)
def test_algorithms_name_their_source(function):
    assert "References:" in inspect.getdoc(function)


@pytest.mark.parametrize("cls", _CLASSES, ids=lambda c: c.__name__)
def test_public_classes_describe_every_field(cls):
    text = inspect.getdoc(cls)
    fields = getattr(cls, "_fields", None) or [
        f for f in getattr(cls, "__dataclass_fields__", {}) if not f.startswith("_")
    ]
    assert fields
    assert "Attributes:" in text
    assert all(f"{name}:" in text for name in fields), fields


@pytest.mark.exactness
@pytest.mark.parametrize("name", ["CONTRIBUTING.md", "docs/exactness.md", "docs/trees.md"])
def test_the_documents_code_runs(name):
    """Block after block, and the tests that the blocks define."""
    text = (pathlib.Path(__file__).parents[2] / name).read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) >= 3
    namespace = {"__name__": "documentation"}
    # Readers run it with JAX's own defaults.
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        for block in blocks:
            exec(compile(block, name, "exec"), namespace)
        for function in [f for key, f in namespace.items() if key.startswith("test_")]:
            function()
