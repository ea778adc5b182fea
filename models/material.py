"""What a job reads beside the weights: the tokenizer, the calibration sequences, the evaluation windows."""

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from models.data import LEAST_TOKENS, Calibration, Windows, calibration_batches, evaluation_windows
from models.frame import Frame
from models.quoting import quoted
from squeeze.errors import DataUnusable, ModelMalformed, ModelUnsafe
from squeeze.specs import JobSpec
from squeeze.steps import Quantize

# On tiny random models at 3 bits GPTQ was worse than round-to-nearest at 3 tokens per input, a fifth better at 16.
TOKENS_PER_INPUT = 8
GENERIC_WARNING = (
    "measured on generic text (the source of Python's standard library); figures on it say little about your own "
    "text: upload some and name it as data.source"
)


def read_tokenizer(model: Path) -> Any:
    """The tokenizer of a model directory; raises where there is none that works."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    except Exception as error:
        if "trust_remote_code" in str(error):
            raise ModelUnsafe(
                "the model's tokenizer needs code from its repository, which is never run here"
            ) from error
        raise ModelMalformed(
            f"the model's tokenizer is missing or can't be loaded ({quoted(error, 300)}). It needs a tokenizer.json, "
            "which transformers' save_pretrained writes"
        ) from error
    # Where the files are missing, some classes start with special tokens alone and turn every text into nothing.
    if len(tokenizer.get_vocab()) <= len(tokenizer.all_special_tokens):
        raise ModelMalformed(
            "the model's tokenizer has no vocabulary: tokenizer.json, or vocab.json and merges.txt, is missing"
        )
    return tokenizer


class Material:
    """The token batches of a job.

    calibration_text, evaluation_text: uploaded files; None: the generic text, or a held-out part of calibration_text.
    """

    def __init__(
        self,
        spec: JobSpec,
        step: Quantize,
        tokenizer: Any,
        frame: Frame,
        calibration_text: Path | None,
        evaluation_text: Path | None,
    ) -> None:
        self.asked = spec.data.sequence_length
        self.length = min(self.asked, frame.max_positions or self.asked)
        if self.length < LEAST_TOKENS:
            raise DataUnusable(
                f"the model has {self.length} positions; at least {LEAST_TOKENS} are needed to measure it"
            )
        self.samples = spec.data.samples
        self.calibration: Calibration | None = None
        self.windows: Windows | None = None
        if step.needs_calibration:
            self.calibration = calibration_batches(
                tokenizer, calibration_text, spec.data.source, spec.data.samples, self.length, spec.seed
            )
        if spec.evaluation.perplexity or spec.evaluation.divergence:
            own = evaluation_text is not None
            self.windows = evaluation_windows(
                tokenizer,
                evaluation_text if own else calibration_text,
                spec.evaluation.source if own else spec.data.source,
                not own,
                spec.evaluation.samples,
                self.length,
                spec.evaluation.stride,
            )
        self.widest = max(site.columns for n in range(frame.count) for site in frame.sites(n))
        vocabulary = int(frame.model.config.vocab_size)
        for ids in (text.ids for text in (self.calibration, self.windows) if text):
            if int(ids.max()) >= vocabulary:
                raise ModelMalformed(
                    f"the tokenizer gives id {int(ids.max())}, but the model knows only {vocabulary} tokens; "
                    "tokenizer and weights are not of one model"
                )

    def warnings(self) -> list[str]:
        """What the user should know of these texts."""
        found = []
        if self.length < self.asked:
            found.append(f"sequence_length {self.asked} was cut to the model's {self.length} positions")
        if self.calibration is not None:
            count, length = self.calibration.ids.shape
            if count < self.samples or length < self.length:
                found.append(
                    f"the calibration text gave {count} sequences of {length} tokens, fewer than the {self.samples} of "
                    f"{self.length} asked for"
                )
            if count * length < TOKENS_PER_INPUT * self.widest:
                found.append(
                    f"{count * length:,} calibration tokens are few for layers with {self.widest:,} inputs; below "
                    f"{TOKENS_PER_INPUT * self.widest:,} the rounding fits the sample rather than the language"
                )
        if any(text.text.generic for text in (self.calibration, self.windows) if text):
            found.append(GENERIC_WARNING)
        return found
