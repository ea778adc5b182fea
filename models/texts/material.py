"""What a job reads beside the weights: the tokenizer, the calibration sequences, the evaluation windows."""

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from models.job import Inputs
from models.progress import Notify, Silent
from models.quoting import quoted
from models.streaming.frame import Frame
from models.texts.coverage import coverage_warnings, repetition_warnings
from models.texts.data import LEAST_TOKENS, Calibration, Windows, calibration_batches, evaluation_windows, text_of
from models.texts.self_text import refuse_beforehand, sampled_text
from squeeze.errors import DataUnusable, ModelMalformed, ModelUnsafe
from squeeze.specs.job_spec import SELF, JobSpec
from squeeze.steps.compressing import Compress
from squeeze.steps.merging import Merge
from squeeze.steps.slimming import Slim

# On tiny random models at 3 bits GPTQ was worse than round-to-nearest at 3 tokens per input, a fifth better at 16.
TOKENS_PER_INPUT = 8
GENERIC_WARNING = (
    "measured on generic text (the source of Python's standard library); figures on it say little about your own "
    "text: upload some and name it as data.source"
)
SELF_WARNING = (
    "calibrated on text that the model sampled itself, and measured on generic text (the source of Python's standard "
    "library), because on text of its own making a model looks better than it is; name your text as evaluation.source"
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


def few_tokens(count: int, length: int, widest: int) -> list[str]:
    """A warning where so many calibration sequences of so many tokens are few. widest: most inputs of a layer."""
    if count * length >= TOKENS_PER_INPUT * widest:
        return []
    return [
        f"{count * length:,} calibration tokens are few for layers with {widest:,} inputs; below "
        f"{TOKENS_PER_INPUT * widest:,} the rounding fits the sample rather than the language"
    ]


def refuse_too_large_for_self(spec: JobSpec, step: Compress, frame: Frame) -> None:
    """Raises DataUnusable where a model that is to sample its own text doesn't fit in memory; needs no weights."""
    if spec.data.source == SELF and step.needs_calibration:
        refuse_beforehand(frame, spec.data.samples, _length(spec, frame))


class Material:
    """The token batches of a job.

    calibration_text, evaluation_text: files, or directories of them; None: the generic text, or a held-out part of
    calibration_text; `self` has no file. origins: what the report calls either text, where the request's own word for
    it says too little. work: keeps what the model samples itself, between attempts.
    """

    @classmethod
    def of(
        cls, inputs: Inputs, spec: JobSpec, step: Compress | Merge | Slim, frame: Frame, notify: Notify
    ) -> "Material":
        """Of a step of a job. spec: the job's, with what of its evaluation the step has. frame: of the model."""
        return cls(
            spec,
            step,
            read_tokenizer(inputs.model),
            frame,
            inputs.calibration_text,
            inputs.evaluation_text,
            origins=(inputs.calibration_origin, inputs.evaluation_origin),
            work=inputs.work,
            notify=notify,
        )

    def __init__(
        self,
        spec: JobSpec,
        step: Compress | Merge | Slim,
        tokenizer: Any,
        frame: Frame,
        calibration_text: Path | None,
        evaluation_text: Path | None,
        origins: tuple[str | None, str | None] = (None, None),
        work: Path | None = None,
        notify: Notify | None = None,
    ) -> None:
        self.tokenizer, self.spec, self.step = tokenizer, spec, step
        self.asked = spec.data.length
        self.length = _length(spec, frame)
        if self.length < LEAST_TOKENS:
            raise DataUnusable(
                f"the model has {self.length} positions; at least {LEAST_TOKENS} are needed to measure it"
            )
        self.samples = spec.data.samples
        self.calibration: Calibration | None = None
        self.windows: Windows | None = None
        own_text = None if spec.data.source == SELF else spec.data.source
        if step.needs_calibration and spec.data.source == SELF:
            assert work is not None, "what the model samples itself is kept somewhere"
            ids, origin = sampled_text(frame, tokenizer, self.samples, self.length, spec.seed, work, notify or Silent())
            self.calibration = Calibration(ids, text_of(ids, origin, generic=False))
        elif step.needs_calibration:
            self.calibration = calibration_batches(
                tokenizer,
                calibration_text,
                origins[0] or own_text,
                self.samples,
                self.length,
                spec.seed,
                spec.data.column,
            )
        if spec.evaluation.perplexity or spec.evaluation.divergence:
            own = evaluation_text is not None
            self.windows = evaluation_windows(
                tokenizer,
                evaluation_text if own else calibration_text,
                (origins[1] or spec.evaluation.source) if own else (origins[0] or own_text),
                not own,
                spec.evaluation.samples,
                self.length,
                spec.evaluation.stride,
                spec.evaluation.column if own else spec.data.column,
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
            if not isinstance(self.step, Slim):
                found += few_tokens(count, length, self.widest)
            found += repetition_warnings(self.calibration.ids, "calibration text")
        found += self._of_language()
        sampled = self.calibration is not None and self.spec.data.source == SELF
        if sampled and self.windows is not None and self.windows.text.generic:
            found.append(SELF_WARNING)
        elif any(text.text.generic for text in (self.calibration, self.windows) if text):
            found.append(GENERIC_WARNING)
        return found

    def _of_language(self) -> list[str]:
        """Of a user's own texts; one that is held out of the other needs no second word."""
        if self.calibration is not None and not self.calibration.text.generic and self.spec.data.source != SELF:
            found = coverage_warnings(self.tokenizer, self.calibration.ids, "calibration text")
            if self.spec.evaluation.source is None:
                return found
        else:
            found = []
        if self.windows is not None and not self.windows.text.generic:
            found += coverage_warnings(self.tokenizer, self.windows.ids, "evaluation text")
        return found


def _length(spec: JobSpec, frame: Frame) -> int:
    """Tokens of a sequence: no more than the model has positions."""
    return min(spec.data.length, frame.max_positions or spec.data.length)
