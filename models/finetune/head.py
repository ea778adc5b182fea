"""A classification head in float32, which reads what the last token has become; beside it the last blocks."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, AutoModelForSequenceClassification
from transformers.modeling_outputs import CausalLMOutput
from transformers.utils import logging as transformers_logging

from models.files.checkpoint import SourceModel
from models.finetune import last_layers
from models.streaming.frame import Frame
from models.texts.material import read_tokenizer
from models.train.turns import filler_of
from models.train.whole import write_trained
from models.weights.quantized import Site
from squeeze.shapes.architectures import refuse_unclassifiable
from squeeze.steps.finetuning import Head, LastLayers

SPREAD = 0.02  # of the head as it begins, where the config names none


def sites_of(frame: Frame, step: Head) -> list[Site]:
    """The linear layers of the blocks that are trained, none by default; raises ModelMalformed where there are fewer
    blocks, and ArchitectureUnsupported where transformers has no classifier of the family.
    """
    refuse_unclassifiable(frame.source.config.get("model_type"))
    blocks = LastLayers(method="last_layers", layers=max(1, step.layers))
    return last_layers.sites_of(frame, blocks) if step.layers else []


def load(path: Path, labels: Sequence[str], dtype: torch.dtype, device: torch.device) -> Any:
    """A model directory's model with a head of so many labels, nothing of it to learn; of one that was written with a
    head, that. It says of every token what transformers' own classifier says of the last one alone, so that examples
    can share a sequence.
    """
    transformers_logging.disable_progress_bar()  # a worker's log is no terminal
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # it would list the head that there is not yet
    try:
        model = AutoModelForSequenceClassification.from_pretrained(
            path, dtype=dtype, trust_remote_code=False, **_told(labels)
        )
    finally:
        transformers_logging.set_verbosity(verbosity)
    model.config.use_cache = False
    kind = type(model)
    model.__class__ = type(kind.__name__, (EveryToken, kind), {"__module__": kind.__module__})
    return model.to(device).eval().requires_grad_(False)


def finetune(model: Any, step: Head, names: Sequence[str]) -> Any:
    """The model with a head that begins anew, as transformers begins it, in float32, and learns; with it the blocks of
    the named linears and the last norm.
    """
    model.score.float().requires_grad_(True)
    nn.init.normal_(model.score.weight, std=getattr(model.config, "initializer_range", SPREAD))
    if not names:
        return model
    return last_layers.finetune(model, LastLayers(method="last_layers", layers=step.layers), names)


def write(model: Any, labels: Sequence[str], source: SourceModel, out: Path) -> None:
    """Writes a directory that `AutoModelForSequenceClassification` loads. The weights are rounded in place, as
    `write_trained` does.

    Texts of a batch are filled up behind their ends, where a causal model does not see it, whatever the source does.
    """
    tokenizer = read_tokenizer(source.path)
    filler = filler_of(tokenizer)
    own: dict[str, Any] = {"padding_side": "right"}
    if filler is not None:
        own["pad_token"] = tokenizer.convert_ids_to_tokens(filler)
    settings: dict[str, Mapping[str, Any]] = {
        "config.json": {
            "architectures": [MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(model.config)].__name__],
            "problem_type": "single_label_classification",
            "pad_token_id": filler,
            **_told(labels),
        },
        "tokenizer_config.json": own,
    }
    write_trained(model, source, out, settings)


class EveryToken:
    """In front of a classifier of transformers: the head's logits of every token, (B, T, labels), float32."""

    base_model: Any
    score: nn.Linear

    def forward(self, input_ids: Tensor, **told: Any) -> CausalLMOutput:
        hidden = self.base_model(input_ids=input_ids, **told).last_hidden_state  # (B, T, C)
        return CausalLMOutput(logits=self.score(hidden.to(self.score.weight.dtype)))

    def get_output_embeddings(self) -> nn.Linear:
        return self.score


def _told(labels: Sequence[str]) -> dict[str, Any]:
    """What a config says of labels; it counts them itself."""
    return {"id2label": dict(enumerate(labels)), "label2id": {name: number for number, name in enumerate(labels)}}
