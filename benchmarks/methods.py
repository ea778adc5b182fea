"""Every method through the service: what it costs, what it loses, and who loads the result.

    python benchmarks/methods.py                      every case that has no row yet, then the page
    python benchmarks/methods.py --only kquant gptq   cases of these methods again
    python benchmarks/methods.py --page               the page alone, from the rows there are

Starts the service on a data directory of its own, posts one job a case, and keeps a row of each report in
`benchmarks/results/methods.jsonl`. From these it writes `docs/loads.md` and `squeeze/loads.json`, which `GET
/v1/methods` answers with. Set SQUEEZE_VLLM_PYTHON and SQUEEZE_LLAMACPP_PYTHON, or what they load is "not checked".
"""

import argparse
import contextlib
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from scripts.quickstart import running, service_environment, wait_until_ready  # noqa: E402
from scripts.serve import address  # noqa: E402
from squeeze import Client  # noqa: E402
from squeeze.errors import FormatUnfit, SqueezeError  # noqa: E402
from squeeze.names import Format  # noqa: E402
from squeeze.reports.report import Report  # noqa: E402
from squeeze.shapes.architectures import HELD_BY  # noqa: E402
from squeeze.specs.formats import CAPACITIES, refuse_unfit  # noqa: E402
from squeeze.specs.job_spec import JobSpec  # noqa: E402
from tests.models.tiny import FAMILIES  # noqa: E402

ROWS = ROOT / "benchmarks/results/methods.jsonl"
PAGE = ROOT / "docs/loads.md"
TABLE = ROOT / "squeeze/loads.json"
BUNDLED = "bundled"
SHAPES = ("llama", "qwen2", "gpt2", "opt", "mixtral")
DATA = {"samples": 64, "sequence_length": 512}
TINY_DATA = {"samples": 64, "sequence_length": 64}
EVALUATION = {"samples": 32}
Step = dict[str, Any]


def cases() -> Iterator[tuple[str, Step]]:
    """(model, step): the bundled model at every width that matters, and every method once on each shape."""
    grouped: tuple[tuple[str, tuple[int, ...]], ...] = (
        ("rtn", (8, 4, 3, 2)),
        ("gptq", (8, 4, 3, 2)),
        ("awq", (4, 3, 2)),
        ("autoround", (4, 3, 2)),
        ("hqq", (4, 3, 2)),
    )
    for method, widths in grouped:
        for bits in widths:
            yield BUNDLED, {"method": method, "bits": bits, "group_size": 128}
    for method in ("rtn", "gptq"):
        for bits in (8, 4):
            yield BUNDLED, {"method": method, "bits": bits, "group_size": 32}
    yield BUNDLED, {"method": "gptq", "bits": 4, "group_size": 128, "symmetric": False}
    yield BUNDLED, {"method": "gptq", "bits": "auto", "target_bits": 3.5, "group_size": 128}
    yield BUNDLED, {"method": "gptq", "bits": 4, "group_size": 128, "rotation": "hadamard"}
    yield BUNDLED, {"method": "smoothquant"}
    yield BUNDLED, {"method": "fp8"}
    yield BUNDLED, {"method": "fp8", "activations": "static"}
    yield BUNDLED, {"method": "gptq", "bits": 4, "group_size": 128, "kv_cache": "fp8"}
    for method in ("mxfp4", "nvfp4", "nf4", "int8", "fp16"):
        yield BUNDLED, {"method": method}
    for kind in ("q6_k", "q5_k_m", "q4_k_m", "q3_k_m", "q2_k"):
        yield BUNDLED, {"method": "kquant", "mixture": kind}
    for model in SHAPES:
        for method in ("rtn", "gptq", "awq", "autoround", "hqq"):
            yield model, {"method": method, "bits": 4, "group_size": 32}
        for method in ("smoothquant", "fp8", "mxfp4", "nvfp4", "nf4", "int8", "kquant", "bf16", "fp16"):
            yield model, {"method": method}


def main() -> None:
    options = arguments()
    rows = read_rows()
    if not options.page:
        wanted = [
            (model, step)
            for model, step in cases()
            if model in options.models
            and (step["method"] in options.only or not options.only)
            and (options.only or key(model, step) not in {key(row["model"], row["step"]) for row in rows})
        ]
        with tempfile.TemporaryDirectory() as folder:
            for row in run(wanted, Path(folder)):
                rows = [one for one in rows if key(one["model"], one["step"]) != key(row["model"], row["step"])] + [row]
                order = [key(model, step) for model, step in cases()]
                rows.sort(key=lambda one: order.index(key(one["model"], one["step"])))
                ROWS.write_text("".join(json.dumps(one, ensure_ascii=False) + "\n" for one in rows), encoding="utf-8")
    TABLE.write_text(json.dumps(loads(rows), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    PAGE.write_text(page(rows), encoding="utf-8")
    print(f"{PAGE.relative_to(ROOT)}, {TABLE.relative_to(ROOT)}: {len(rows)} rows")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], help="methods to run again")
    parser.add_argument("--models", nargs="+", default=[BUNDLED, *SHAPES], help="only cases of these")
    parser.add_argument("--page", action="store_true", help="write the page from the rows that there are")
    return parser.parse_args()


def key(model: str, step: Step) -> str:
    return json.dumps([model, step], sort_keys=True)


def read_rows() -> list[dict[str, Any]]:
    if not ROWS.is_file():
        return []
    known = {key(model, step) for model, step in cases()}
    rows = [json.loads(line) for line in ROWS.read_text(encoding="utf-8").splitlines()]
    return [row for row in rows if key(row["model"], row["step"]) in known]


def run(wanted: list[tuple[str, Step]], folder: Path) -> Iterator[dict[str, Any]]:
    """Posts one job after another; a row for each that ended."""
    models = {BUNDLED: ROOT / "models/bundled"}
    for model in {model for model, _ in wanted} - {BUNDLED}:
        dtype = torch.float16 if model == "opt" else torch.bfloat16
        models[model] = FAMILIES[model](folder / "models" / model, dtype=dtype)
    with serving(folder) as client:
        for number, (model, step) in enumerate(wanted, start=1):
            print(f"{number}/{len(wanted)} {model} {json.dumps(step)}", flush=True)
            try:
                row = one_job(client, models[model], model, step)
            except SqueezeError as error:
                row = {"refused": error.message}
            print("   ", json.dumps(row)[:400], flush=True)
            yield {"model": model, "step": step} | row


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[Client]:
    """The service, whose data and whose models beside the bundled one lie in a folder."""
    environment = service_environment(folder / "data", "http://127.0.0.1:9")  # no Hub is asked
    environment["SQUEEZE_MODEL_ROOTS"] = f"{folder / 'models'}:{ROOT / 'models'}"
    with running(["scripts/serve.py"], environment, folder / "service.log") as service:
        url = address("127.0.0.1", int(environment["SQUEEZE_PORT"]))
        wait_until_ready(url, service, folder / "service.log")
        with Client(url) as client:
            yield client


def one_job(client: Client, directory: Path, model: str, step: Step) -> dict[str, Any]:
    asked = {
        "model": str(directory),
        "steps": [{"kind": "quantize", **step}],
        "data": DATA if model == BUNDLED else TINY_DATA,
        "evaluation": EVALUATION,
    }
    spec = JobSpec.model_validate(asked)
    family = "llama" if model == BUNDLED else model
    able = [name for name in CAPACITIES if name in HELD_BY[family] and fits(spec, name)]
    asked["formats"] = able if model == BUNDLED else able[:1]
    if not able:
        return {"refused": f"no format holds what it makes of a {family} model"}
    left_out: dict[str, str] = {}
    while asked["formats"]:
        done = client.jobs.wait(client.jobs.create(asked).id)
        if done.error is None:
            break
        # A format that can't hold this model's layers says so by its name; the others go on without it.
        refused = next((name for name in asked["formats"] if name in done.error.message), None)
        if refused is None or len(asked["formats"]) == 1:
            return {"refused": done.error.message}
        left_out[refused] = done.error.message
        asked["formats"] = [name for name in asked["formats"] if name != refused]
    report = client.jobs.report(done.id)
    quality = report.quality
    assert quality is not None
    return {
        "bits_per_weight": report.bits_per_weight,
        "perplexity_before": quality.perplexity_before,
        "perplexity_after": quality.perplexity_after,
        "divergence_nats": quality.divergence_nats,
        "seconds": report.spent.seconds["compressing"],
        "peak_host_bytes": report.spent.peak_host_bytes,
        "source_bytes": report.source.bytes,
        "bytes": {size.format: size.weight_bytes for size in report.sizes},
        "left_out": left_out,
        "loads": loads_of(report),
        "device": report.device,
    }


def loads_of(report: Report) -> list[dict[str, Any]]:
    """What each consumer said of each result."""
    fields = {"format", "consumer", "version", "outcome", "perplexity", "detail"}
    return [
        one.model_dump(mode="json", include=fields) | {"expected": one.expected_perplexity}
        for one in report.certificates
    ]


def fits(spec: JobSpec, name: Format) -> bool:
    """Whether a format can hold what the steps make."""
    try:
        refuse_unfit(spec.steps, [name])
    except FormatUnfit:
        return False
    return True


def loads(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What `GET /v1/methods` says of each method on the bundled model: who loaded what."""
    return [
        {"method": row["step"]["method"], "settings": settings(row["step"]), **{part: one[part] for part in parts}}
        for row in rows
        if row["model"] == BUNDLED
        for one in row.get("loads", [])
        for parts in [("format", "consumer", "version", "outcome")]
    ]


def settings(step: Step) -> str:
    return ", ".join(f"{name} {value}" for name, value in step.items() if name != "method") or "defaults"


def page(rows: list[dict[str, Any]]) -> str:
    lines = [
        "# Every method, and who loads what it makes",
        "",
        "Written by `make table`: each row is a job that ran through the service, each row of the second table a fresh",
        "process of that consumer, which loaded the result and scored the windows that compressing was measured on.",
        f"The bundled model (5 M parameters, trained), {DATA['samples']} calibration sequences of "
        f"{DATA['sequence_length']} tokens of the generic text;",
        "perplexity and divergence on held-out generic text. Seconds and memory are of the job's own process, with its",
        "libraries (about 600 MB). The machine did other things too: seconds are good for orders of magnitude.",
        "",
        "## Cost and loss on the bundled model",
        "",
        "| method | settings | bits a weight | perplexity | divergence, nats | smallest file | seconds | peak memory |",
        "|---|---|---|---|---|---|---|---|",
    ]
    bundled = [row for row in rows if row["model"] == BUNDLED]
    done = [row for row in bundled if "loads" in row]
    if done:
        before = done[0]
        lines.append(f"| none | | 16 | {before['perplexity_before']:.4g} | 0 | {mega(before['source_bytes'])} | | |")
    for row in bundled:
        name = f"| {row['step']['method']} | {settings(row['step'])} |"
        if "refused" in row:
            lines.append(f"{name} refused: {row['refused']} | | | | | |")
            continue
        lines.append(
            f"{name} {row['bits_per_weight']:.3g} | {row['perplexity_after']:.4g} | {row['divergence_nats']:.3g} "
            f"| {mega(min(row['bytes'].values()))} | {row['seconds']:.1f} | {mega(row['peak_host_bytes'])} |"
        )
    lines += ["", "## Who loads it", ""]
    lines += [
        "| method | settings | format | consumer | outcome | perplexity there, measured here |",
        "|---|---|---|---|---|---|",
    ]
    for row in done:
        for one in row["loads"]:
            figures = f"{one['perplexity']:.5g}, {one['expected']:.5g}" if one["perplexity"] else ""
            version = f" {one['version']}" if one["version"] else ""
            outcome = one["outcome"] + (
                "" if one["perplexity"] and one["outcome"] == "passed" else f": {one['detail'][:160]}"
            )
            lines.append(
                f"| {row['step']['method']} | {settings(row['step'])} | {one['format']} | {one['consumer']}{version} "
                f"| {cell(outcome)} | {figures} |"
            )
        for name, why in row["left_out"].items():
            lines.append(
                f"| {row['step']['method']} | {settings(row['step'])} | {name} | | refused: {cell(why[:200])} | |"
            )
    lines += ["", "## Every method on small random models of other families", ""]
    lines += ["Certified by transformers; a dash where a method was refused, with its words below.", ""]
    methods = list(dict.fromkeys(row["step"]["method"] for row in rows if row["model"] != BUNDLED))
    lines += [f"| | {' | '.join(SHAPES)} |", f"|---|{'---|' * len(SHAPES)}"]
    notes: list[str] = []
    for method in methods:
        cells = []
        for model in SHAPES:
            row = next((one for one in rows if one["model"] == model and one["step"]["method"] == method), None)
            cells.append(shape_cell(row))
            if row is not None and "refused" in row:
                notes.append(f"- {method}, {model}: {row['refused']}")
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *notes, ""])


def shape_cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return "not run"
    if "refused" in row:
        return "–"
    formats: dict[str, list[str]] = {}
    for one in row["loads"]:
        formats.setdefault(one["format"], []).append(one["outcome"])
    return ", ".join(name if "passed" in outcomes else f"{name} ({outcomes[0]})" for name, outcomes in formats.items())


def mega(size: float) -> str:
    return f"{size / 1e6:,.1f} MB"


def cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


if __name__ == "__main__":
    main()
