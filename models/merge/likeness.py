"""Whether a model is a finetuned one of the same base, as far as its settings and its tokenizer tell."""

from pathlib import Path
from typing import Any

from transformers import AutoConfig

from models.distill.vocabulary import shared_vocabulary
from models.files.checkpoint import SourceModel, read_config
from models.formats.directory import without_private
from models.quoting import quoted
from squeeze.errors import ModelAlreadyCompressed, ModelMalformed, VocabulariesDiffer

# What shapes come from, and what weights of the same shapes can be computed with in another way.
MEANING = (
    "num_hidden_layers",
    "n_layer",
    "hidden_size",
    "n_embd",
    "vocab_size",
    "num_attention_heads",
    "n_head",
    "n_heads",
    "num_key_value_heads",
    "num_kv_heads",
    "head_dim",
    "hidden_act",
    "hidden_activation",
    "activation_function",
    "num_experts_per_tok",
    "tie_word_embeddings",
)
# What says nothing of how weights are meant.
BESIDE = frozenset(
    {"model_type", "dtype", "torch_dtype", "transformers_version", "architectures", "use_cache", "initializer_range"}
)
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")


def refuse_other_settings(base: Path, other: Path, label: str) -> None:
    """Raises where another model can't be merged with the base, from the `config.json` in both directories."""
    own, its = _settings(base), _settings(other)
    if its.get("quantization_config"):
        raise ModelAlreadyCompressed(
            f"the weights of {label} are quantized; name the 16-bit model that they were made from"
        )
    for name in ("model_type", *MEANING):
        if own.get(name) != its.get(name):
            raise ModelMalformed(
                f"{label} has {name} {its.get(name)!r}, the base {own.get(name)!r}: merged are models that were "
                "finetuned from one base, with its shapes and its vocabulary"
            )


def refuse_other_tokens(base: SourceModel, other: SourceModel, label: str) -> None:
    """Raises VocabulariesDiffer where another model means other words by the same numbers; one without a tokenizer is
    taken at its shapes.
    """
    if has_tokenizer(base) and has_tokenizer(other) and shared_vocabulary(base.path, other.path) is None:
        raise VocabulariesDiffer(
            f"{label} cuts text into other tokens than the base, so that their embeddings mean different things: "
            "merged are models of one vocabulary"
        )


def warnings_of(base: SourceModel, other: SourceModel, label: str) -> list[str]:
    """What the user should know of a model that can be merged."""
    own, its, found = _settings(base.path), _settings(other.path), []
    apart = [name for name in own if name in its and own[name] != its[name] and not _beside(name)]
    if apart:
        found.append(f"{label} differs from the base in {', '.join(sorted(apart))}; the result has the base's settings")
    if other.dtype.itemsize < base.dtype.itemsize:
        found.append(
            f"{label} is stored in fewer bits than the base: what they differ by is rounding too, of which some "
            "methods take the largest for learned"
        )
    if _talks(other) and not _talks(base):
        found.append(f"{label} has a chat template, which the base and so the result lacks")
    return found


def has_tokenizer(source: SourceModel) -> bool:
    return any((source.path / name).is_file() for name in TOKENIZERS)


def _talks(source: SourceModel) -> bool:
    settings = source.path / "tokenizer_config.json"
    if (source.path / "chat_template.jinja").is_file():
        return True
    return settings.is_file() and '"chat_template"' in settings.read_text(encoding="utf-8")


def _settings(path: Path) -> dict[str, Any]:
    """As transformers reads them, what is left out included."""
    read_config(path)  # says what is wrong with one that is none
    try:
        settings: dict[str, Any] = AutoConfig.from_pretrained(path, trust_remote_code=False).to_dict()
    except (ValueError, OSError, KeyError, TypeError) as error:
        raise ModelMalformed(f"transformers can't read its config.json: {quoted(error, 300)}") from error
    return without_private(settings)


def _beside(name: str) -> bool:
    return name in BESIDE or name in MEANING or name.endswith(("token_id", "dropout", "_pdrop"))
