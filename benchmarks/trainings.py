"""Every method that trains, through the service: what it learned, what it took, and whether its result loads.

    python benchmarks/trainings.py                       every case that has no row yet, then the page
    python benchmarks/trainings.py --only lora full      cases of these methods again
    python benchmarks/trainings.py --page                the page alone, from the rows there are

Starts the service on a data directory of its own, uploads a text that the bundled model does not know (the English of
Python's own manual, a record a paragraph), posts one job a case, and keeps a row of each report in
`benchmarks/results/trainings.jsonl`, from which it writes `benchmarks/results/trainings.md`.
"""

import argparse
import json
import json.decoder
import json.encoder
import sys
import tempfile
from collections.abc import Iterable
from inspect import getsource as source_of
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.methods import cell, key, loads_of, mega, serving, settings  # noqa: E402
from squeeze import Client  # noqa: E402
from squeeze.errors import SqueezeError  # noqa: E402
from squeeze.reports.report import Report  # noqa: E402

MODEL = ROOT / "models/bundled"
ROWS = ROOT / "benchmarks/results/trainings.jsonl"
PAGE = ROOT / "benchmarks/results/trainings.md"
LENGTH, STEPS, BATCH = 256, 60, 8
PROMPTED = {"new_tokens": 64, "prompt_tokens": 16}
STUDENT = {"student": {"layers": 3}, "learning_rate": 1e-3}
LEAST_RECORD = 200  # characters; shorter paragraphs are headings and single lines
Step = dict[str, Any]


def cases() -> list[Step]:
    tuned: tuple[Step, ...] = (
        {"method": "lora", "learning_rate": 1e-3},
        {"method": "lora", "learning_rate": 1e-3, "merge": True},
        {"method": "lora", "learning_rate": 1e-3, "rank": 64, "rslora": True},
        {"method": "lora", "learning_rate": 1e-3, "dora": True},
        {"method": "lora", "learning_rate": 1e-3, "init": "pissa"},
        {"method": "qlora", "learning_rate": 1e-3, "base": "nf4"},
        {"method": "qlora", "learning_rate": 1e-3, "base": "nf4", "init": "loftq"},
        {"method": "qlora", "learning_rate": 1e-3, "base": "int8"},
        {"method": "qlora", "learning_rate": 1e-3, "base": "gptq"},
        {"method": "qlora", "learning_rate": 1e-3, "base": "gptq"},
        {"method": "ia3"},
        {"method": "prompt"},
        {"method": "prefix"},
        {"method": "full", "learning_rate": 3e-4},
        {"method": "full", "learning_rate": 3e-4, "optimizer": "adamw8bit"},
        {"method": "full", "learning_rate": 3e-3, "optimizer": "galore"},
        {"method": "full", "learning_rate": 3e-4, "optimizer": "badam", "block_steps": 10},
        {"method": "full", "learning_rate": 3e-4, "ema": 0.9},
        {"method": "last_layers", "learning_rate": 5e-4},
        {"method": "head"},
        {"method": "head", "layers": 2, "learning_rate": 3e-4},
    )
    taught: tuple[Step, ...] = (
        {"method": "logits", **STUDENT},
        {"method": "logits", **STUDENT, "objective": "reverse_kl", "top_k": "all"},
        {"method": "hidden", **STUDENT},
        {"method": "sequence", **STUDENT, **PROMPTED, "temperature": 0.7},
        {"method": "on_policy", **STUDENT, **PROMPTED},
    )
    rounded: tuple[Step, ...] = ({"method": "qat", "bits": 4}, {"method": "qat", "bits": 2})
    length = {"steps": STEPS, "batch_size": BATCH}
    return [
        *({"kind": "finetune", **step, **length} for step in tuned),
        *({"kind": "distill", **step, **length} for step in taught),
        *({"kind": "quantize", **step, **length} for step in rounded),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], help="methods to run again")
    parser.add_argument("--page", action="store_true", help="write the page from the rows that there are")
    options = parser.parse_args()
    order = [key("", step) for step in cases()]
    rows = [json.loads(line) for line in ROWS.read_text(encoding="utf-8").splitlines()] if ROWS.is_file() else []
    kept = {key("", row["step"]): row for row in rows if key("", row["step"]) in order}
    wanted = [
        step
        for step in cases()
        if (step["method"] in options.only if options.only else key("", step) not in kept) and not options.page
    ]
    if wanted:
        with tempfile.TemporaryDirectory() as folder, serving(Path(folder)) as client:
            sources = {
                name: client.files.upload(write(Path(folder)), "training").id
                for name, write in (("text", text), ("labels", labelled))
            }
            for number, step in enumerate(wanted, start=1):
                print(f"{number}/{len(wanted)} {json.dumps(step)}", flush=True)
                try:
                    found = one_job(client, step, sources["labels" if step["method"] == "head" else "text"])
                except SqueezeError as error:
                    found = {"refused": error.message}
                print("   ", json.dumps(found)[:300], flush=True)
                kept[key("", step)] = {"step": step} | found
                rows = [kept[name] for name in order if name in kept]
                ROWS.write_text("".join(json.dumps(one, ensure_ascii=False) + "\n" for one in rows), encoding="utf-8")
    PAGE.write_text(page([kept[name] for name in order if name in kept]), encoding="utf-8")
    print(PAGE.read_text(encoding="utf-8"))


def text(folder: Path) -> Path:
    """The manual's paragraphs as records, in its own order."""
    return records(folder / "manual.jsonl", ({"text": part} for part in paragraphs()))


def labelled(folder: Path) -> Path:
    """As many of the manual's paragraphs as there are parts of a few modules, and which of the two each is."""
    code = [part for module in (argparse, json.decoder, json.encoder, tempfile) for part in parts_of(source_of(module))]
    rows = [{"text": part, "label": "code"} for part in code]
    rows += [{"text": part, "label": "prose"} for part in paragraphs()[: len(code)]]
    return records(folder / "labelled.jsonl", rows)


def paragraphs() -> list[str]:
    return [part for topic in sorted(topics) for part in parts_of(topics[topic])]


def parts_of(whole: str) -> list[str]:
    return [part.strip() for part in whole.split("\n\n") if len(part.strip()) >= LEAST_RECORD]


def records(path: Path, rows: Iterable[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def one_job(client: Client, step: Step, source: str) -> dict[str, Any]:
    generic = {"samples": 64, "sequence_length": 512}
    asked = {
        "model": str(MODEL),
        "steps": [step],
        "data": generic if step["kind"] == "quantize" else {"source": source, "sequence_length": LENGTH},
        "evaluation": {"samples": 32},
    }
    done = client.jobs.wait(client.jobs.create(asked).id)
    if done.error is not None:
        return {"refused": done.error.message}
    report = client.jobs.report(done.id)
    return learned(report) | {
        "seconds": sum(report.spent.seconds.values()),
        "peak_host_bytes": report.spent.peak_host_bytes,
        "loads": loads_of(report),
    }


def learned(report: Report) -> dict[str, Any]:
    """Losses in nats a token: of a training on the held-out records, of `qat` the divergence on the held-out text."""
    if report.tuning is not None:
        assert report.quality is not None
        return {
            "before": report.tuning.divergence_start,
            "after": report.quality.divergence_nats,
            "trainable_parameters": report.tuning.trainable_parameters,
            "tokens_per_second": report.tuning.tokens_per_second,
        }
    training = report.training
    assert training is not None
    taught = training.distillation
    return {
        "before": training.loss_before,
        "after": training.loss_after,
        "trainable_parameters": training.trainable_parameters,
        "tokens_per_second": training.tokens_per_second,
        "teacher": None if taught is None else taught.loss_teacher,
        "accuracy": [training.accuracy_before, training.accuracy_after],
        "divergence": None if taught is None else [taught.divergence_before, taught.divergence_after],
    }


def page(rows: list[dict[str, Any]]) -> str:
    lines = [
        "# Every method that trains",
        "",
        "Written by `make table-trainings`: each row is a job that ran through the service on the bundled model",
        f"(5 M parameters, five blocks, trained on source code), {STEPS} steps of {BATCH} × {LENGTH} tokens of the",
        "English of Python's manual, a tenth of whose paragraphs are held out. Losses are means over these, in",
        "nats a token. Students are three of the five blocks; their losses before and after are their own, and",
        "the teacher's stands beside them. Those of `head` are of a label for each text, a paragraph of the manual",
        "or a part of one of Python's modules, with the share told right in brackets. The last rows, of `qat`,",
        "learn from the generic text, and their losses are the divergence from the original: what GPTQ's codes",
        "began with, and what was left of it. Memory is the largest resident size of the job's process, some",
        "450 MB of it libraries. The last column is a fresh process: peft or transformers loads what was written",
        "and scores the same held-out text; in brackets how far its perplexity is off. The machine did other",
        "things too: tokens a second are good for orders of magnitude.",
        "",
        "| method | settings | loss before | after | trainable | tokens/s | peak memory | loads |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        step = {
            name: value
            for name, value in row["step"].items()
            if name not in ("kind", "steps", "batch_size", "student", "new_tokens", "prompt_tokens")
        }
        begins = f"| {row['step']['kind']} {step['method']} | {settings(step)} |"
        if "refused" in row:
            lines.append(f"{begins} refused: {cell(row['refused'])} | | | | | |")
            continue
        before, after = row.get("accuracy") or (None, None)
        right = f" (right {before:.0%} → {after:.0%})" if before is not None and after is not None else ""
        teacher = f" (teacher {row['teacher']:.4f})" if row.get("teacher") else ""
        lines.append(
            f"{begins} {row['before']:.4g} | {row['after']:.4g}{teacher}{right} | {row['trainable_parameters']:,} "
            f"| {row['tokens_per_second']:,.0f} | {mega(row['peak_host_bytes'])} "
            f"| {'; '.join(map(loading, row['loads']))} |"
        )
    return "\n".join([*lines, ""])


def loading(one: dict[str, Any]) -> str:
    said = f"{one['consumer']} {one['version'] or ''} {one['outcome']}"
    return f"{said} ({one['perplexity'] / one['expected'] - 1:+.3%})" if one["perplexity"] and one["expected"] else said


if __name__ == "__main__":
    main()
