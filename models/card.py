"""The model card: `README.md` of a written directory, with the front matter that the Hub reads."""

import json
from pathlib import Path
from typing import Any

from models.files.disk import write_whole
from squeeze.names import Format
from squeeze.reports.parts import Quality, Text
from squeeze.reports.report import Report
from squeeze.reports.training import Training
from squeeze.reports.vocabulary import Trimming
from squeeze.reports.words import size_text
from squeeze.steps.finetuning import QLoRA

LOADING = {
    "compressed-tensors": "pip install transformers compressed-tensors",
    "gptq": "pip install transformers optimum gptqmodel",
    "awq": "pip install transformers accelerate gptqmodel",
    "bitsandbytes": "pip install transformers accelerate bitsandbytes",
    "safetensors": "pip install transformers",
    "safetensors-zst": "zstd -d --rm *.zst && sha256sum -c SHA256SUMS && pip install transformers",
    "onnx": "pip install onnxruntime-genai",
    "peft": "pip install transformers peft",
    "gguf": "llama-cli --model model.gguf --prompt 'Once upon a time'",
}

ONNX_LINES = [
    "import onnxruntime_genai as og  # or onnxruntime itself: past_key_values.N.key goes in, present.N.key comes out",
    "",
    'directory = "…"  # where this file lies',
    "model = og.Model(directory)",
    "tokenizer = og.Tokenizer(model)",
]


def write_card(directory: Path, format_name: Format, report: Report) -> None:
    """Writes the card of one format of a report's result."""
    parts = [
        _front_matter(format_name, report),
        f"# {_short_name(report)}, {_made_by(format_name, report)} ({format_name})\n",
        _origin(report),
        _recipe(format_name, report),
        _figures(format_name, report),
        _loading(directory, format_name, report),
    ]
    write_whole(directory / "README.md", "\n".join(parts))


def _front_matter(format_name: Format, report: Report) -> str:
    fields: dict[str, Any] = {}
    if _is_hub_id(report.source.model):
        fields["base_model"] = report.source.model.partition("@")[0]
        fields["base_model_relation"] = _relation(format_name, report)
    if report.source.license:
        fields["license"] = report.source.license
    fields["library_name"] = "peft" if format_name == "peft" else "transformers"
    fields["pipeline_tag"] = "text-classification" if _labels(report) else "text-generation"
    bits = sorted({f"{step['bits']}-bit" for step in report.recipe if "bits" in step and step["bits"] != "auto"})
    bits += [] if report.allocation is None else ["mixed-precision"]
    fields["tags"] = ["squeeze", format_name, *dict.fromkeys(step["method"] for step in report.recipe), *bits]
    fields["tags"] = list(dict.fromkeys(fields["tags"]))
    # JSON is YAML, and quoted strings can't be mistaken for anything else.
    lines = [f"{name}: {json.dumps(value, ensure_ascii=False)}" for name, value in fields.items()]
    return "\n".join(["---", *lines, "---", ""])


def _relation(format_name: Format, report: Report) -> str:
    if format_name == "peft":
        return "adapter"
    if _is_base(format_name, report):
        return "quantized"
    kinds = {step["kind"] for step in report.recipe}
    if "quantize" in kinds:
        return "quantized"
    return "merge" if kinds == {"merge"} else "finetune"


def _origin(report: Report) -> str:
    source = report.source
    revision = f", revision `{source.revision}`" if source.revision else ""
    terms = f" License of the original: `{source.license}`." if source.license else ""
    return (
        f"Made from `{_public_name(report)}`{revision} ({source.architecture}, {source.parameters:,} parameters, "
        f"{source.dtype}) by Squeeze {report.squeeze}.{terms}\n"
    )


def _recipe(format_name: Format, report: Report) -> str:
    lines = ["## Recipe", ""]
    for number, step in enumerate(report.recipe, start=1):
        settings = ", ".join(
            f"{name} {json.dumps(value)}" for name, value in step.items() if name not in {"kind", "method"}
        )
        lines.append(f"{number}. **{step['kind']}** by `{step['method']}`: {settings}")
    lines.append("")
    if report.calibration is not None:
        lines += [f"Calibrated on {_text(report.calibration)}, drawn with seed {report.seed}.", ""]
    if report.merging is not None:
        named = [f"`{one.model}` ({one.kind}, weight {one.weight:.3g})" for one in report.merging.models]
        lines += [f"Merged: {', '.join(named)}.", ""]
    if report.slimming is not None:
        made = report.slimming
        which = f", without the blocks {', '.join(map(str, made.removed))}" if made.removed else ""
        share = f"{made.parameters_after / made.parameters_before:.1%}".replace("%", " %")
        lines += [f"Made smaller: {made.parameters_after:,} parameters, {share} of the original's{which}.", ""]
        lines += _trimmed(made.trimming)
    if report.factoring is not None:
        factors = report.factoring
        how = (
            "kept as two factors each"
            if format_name == "onnx"
            else "multiplied out again, so that any loader takes them"
        )
        lines += [f"Low rank: {factors.factored} of {factors.linears} linear layers, {how}.", ""]
    if report.training is not None and not _is_base(format_name, report):
        data = report.training.data
        what = "labels" if _labels(report) else "tokens"
        lines += [
            f"Trained on {data.learned_tokens:,} {what} of {data.records:,} records of {data.origin}, in "
            f"{report.training.steps:,} steps, with seed {report.seed}.",
            "",
        ]
    if report.tuning is not None:
        start = report.tuning.divergence_start
        before = "" if start is None else f", from a divergence of {start:.3g} nats a token"
        lines += [f"Then its {report.tuning.trained} learned in {report.tuning.steps:,} steps{before}.", ""]
    if report.damping_escalations:
        lines += [f"{report.damping_escalations} factorisations needed more damping than asked for.", ""]
    return "\n".join(lines)


def _trimmed(cut: Trimming | None) -> list[str]:
    if cut is None:
        return []
    return [
        f"Vocabulary trimmed to {cut.rows_after:,} of {cut.rows_before:,} tokens, among them all that the "
        f"{cut.corpus.texts:,} texts of {cut.corpus.origin} have. Other text is told in smaller tokens.",
        "",
    ]


def _figures(format_name: Format, report: Report) -> str:
    rows: list[tuple[str, str, str]] = []
    trained = None if _is_base(format_name, report) else report.training
    rounded = _is_base(format_name, report) or not _beside_gptq(report)
    quality = report.quality if rounded else None
    for size in report.sizes:
        if size.format == format_name:
            before, after = _megabytes(report.source.bytes), _megabytes(size.weight_bytes)
            smaller = "" if size.ratio is None else f" ({size_text(size.ratio)})"
            rows.append(("Weights", before, after + smaller))
    if report.bits_per_weight is not None and rounded:
        bits = f"{report.bits_per_weight:.2f}"
        rows.append(("Bits a weight of the quantized layers", _bits(report.source.dtype), bits))
    if trained is not None:
        before, after = f"{trained.loss_before:.4f}", f"{trained.loss_after:.4f}"
        each = "label" if _labels(report) else "token"
        rows.append((f"Held-out loss of the training, nats a {each}", before, after))
        rows += _accuracy_rows(trained)
    lines = ["## Figures", ""]
    if quality is not None:
        rows += _quality_rows(quality)
    lines += ["| | original | this model |", "|---|---|---|", *(f"| {a} | {b} | {c} |" for a, b, c in rows), ""]
    if quality is not None:
        lines += [f"Measured on {_text(quality.text)}; {quality.protocol}.", ""]
        if quality.text.generic:
            lines += ["That text is generic: figures on it say little about yours.", ""]
    return "\n".join(lines)


def _accuracy_rows(training: Training) -> list[tuple[str, str, str]]:
    share = training.majority_share
    if training.accuracy_before is None or training.accuracy_after is None or share is None:
        return []
    before, after, always = (
        f"{one:.1%}".replace("%", " %") for one in (training.accuracy_before, training.accuracy_after, share)
    )
    return [(f"Held-out labels that it tells ({always} by always saying the commonest)", before, after)]


def _quality_rows(quality: Quality) -> list[tuple[str, str, str]]:
    rows = []
    if quality.perplexity_before is not None and quality.perplexity_after is not None:
        rows.append(("Perplexity", f"{quality.perplexity_before:.4g}", f"{quality.perplexity_after:.4g}"))
    if quality.divergence_nats is not None:
        rows.append(("Divergence from the original, nats a token", "0", f"{quality.divergence_nats:.3g}"))
    if quality.top1_agreement is not None:
        rows.append(("Same most likely token", "100 %", f"{quality.top1_agreement:.1%}".replace("%", " %")))
    return rows


def _loading(directory: Path, format_name: Format, report: Report) -> str:
    more = ""
    if format_name == "peft" and report.recipe[-1]["method"] == "qlora":
        more = " optimum gptqmodel" if _beside_gptq(report) else " accelerate bitsandbytes"
    lines = ["## Loading", "", *_companion(format_name, report), f"```sh\n{LOADING[format_name]}{more}\n```", ""]
    if format_name != "gguf":
        program = ONNX_LINES if format_name == "onnx" else _transformers_lines(directory, format_name, report)
        lines += ["```python", *program, "```", ""]
    for one in report.certificates:
        if one.format == format_name:
            version = f" {one.version}" if one.version else ""
            lines.append(f"- {one.consumer}{version}: {one.outcome}; {one.detail}")
    if any(
        one.format == format_name and one.consumer == "vllm" and one.outcome == "passed" for one in report.certificates
    ):
        lines += ["", "```sh", "vllm serve <directory>", "```"]
    return "\n".join([*lines, ""])


def _transformers_lines(directory: Path, format_name: Format, report: Report) -> list[str]:
    if format_name == "peft":
        return _peft_lines(report)
    if _labels(report):
        return _classifier_lines(report)
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    dtype = config.get("dtype") or config.get("torch_dtype")
    return [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'directory = "…"  # where this file lies',
        f'model = AutoModelForCausalLM.from_pretrained(directory, dtype="{dtype}")',
        "tokenizer = AutoTokenizer.from_pretrained(directory)",
    ]


def _classifier_lines(report: Report) -> list[str]:
    assert report.training is not None, "it was trained"
    names = ", ".join(json.dumps(name, ensure_ascii=False) for name in _labels(report))
    return [
        "from transformers import pipeline",
        "",
        'directory = "…"  # where this file lies',
        'classify = pipeline("text-classification", model=directory)',
        f'classify(["A text.", "Another."], truncation=True, max_length={report.training.sequence_length - 1})',
        f"# [{{'label': …, 'score': …}}, …]; labels: {names}",
    ]


def _peft_lines(report: Report) -> list[str]:
    step, name = report.recipe[-1], _public_name(report)
    rounded, how, base = [], 'dtype="auto"', json.dumps(name, ensure_ascii=False)
    if _beside_gptq(report):
        rounded, base = ['rounded = "…"  # where the gptq directory of the same job lies'], "rounded"
    elif step["method"] == "qlora":
        assert report.training is not None, "it was trained"
        dtype = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}[report.training.precision]
        settings = QLoRA.model_validate(step).base_settings(dtype) or {}
        told = ", ".join(
            f"{key}={json.dumps(value) if isinstance(value, str) else value}" for key, value in settings.items()
        )
        rounded, how = [f"rounding = BitsAndBytesConfig({told})"], f'dtype="{dtype}", quantization_config=rounding'
    more = ", BitsAndBytesConfig" if rounded and base != "rounded" else ""
    return [
        "from peft import PeftModel",
        f"from transformers import AutoModelForCausalLM, AutoTokenizer{more}",
        "",
        'directory = "…"  # where this file lies',
        *rounded,
        f"base = AutoModelForCausalLM.from_pretrained({base}, {how})",
        "model = PeftModel.from_pretrained(base, directory)",
        "tokenizer = AutoTokenizer.from_pretrained(directory)",
    ]


def _companion(format_name: Format, report: Report) -> list[str]:
    """What goes together of a job that trained an adapter beside weights that it rounded."""
    if format_name == "peft" and _beside_gptq(report):
        return [
            "It was trained beside the `gptq` result of the same job, and goes with that and no other weights.",
            "",
        ]
    if _is_base(format_name, report):
        return ["Nothing of it was trained: it is what the adapter of the same job (`peft`) stands beside.", ""]
    return []


def _beside_gptq(report: Report) -> bool:
    """Whether a job's adapter was trained beside weights that it rounded before, and wrote."""
    last = report.recipe[-1]
    return (last["method"], last.get("base")) == ("qlora", "gptq")


def _is_base(format_name: Format, report: Report) -> bool:
    """Whether a directory holds what an adapter was trained beside."""
    return format_name == "gptq" and _beside_gptq(report)


def _labels(report: Report) -> list[str]:
    """What a classifier tells apart; none of other models."""
    return [] if report.training is None else [*(report.training.data.labels or ())]


def _is_hub_id(name: str) -> bool:
    return "/" in name and not name.startswith("/")


def _public_name(report: Report) -> str:
    """A directory of this machine is told by its last part alone."""
    name = report.source.model
    return _short_name(report) if name.startswith("/") else name


def _short_name(report: Report) -> str:
    return report.source.model.partition("@")[0].rstrip("/").rpartition("/")[2]


def _made_by(format_name: Format, report: Report) -> str:
    return "gptq at 4 bits" if _is_base(format_name, report) else _recipe_in_short(report)


def _recipe_in_short(report: Report) -> str:
    def bits(step: dict[str, Any]) -> str:
        return f"{report.allocation.bits:.3g}" if report.allocation and step["bits"] == "auto" else str(step["bits"])

    return ", then ".join(
        f"{step['method']} at {bits(step)} bits" if "bits" in step else str(step["method"]) for step in report.recipe
    )


def _text(text: Text) -> str:
    return f"{text.sequences} sequences of {text.sequence_length} tokens of {text.origin}"


def _bits(dtype: str) -> str:
    return {"float32": "32"}.get(dtype, "16")


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"
