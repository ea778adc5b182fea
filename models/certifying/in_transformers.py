"""The program of the certifying process: loads a written directory with transformers alone, generates, and scores; of
an adapter, with peft and the model that it goes with.

    python -m models.certifying.in_transformers REQUEST.json ANSWER.json

A fresh process, so that nothing of the one that wrote the directory helps it to load.
"""

import ctypes
import importlib.metadata
import json
import math
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

PR_SET_PDEATHSIG = 1
LOGIT_BYTES = 256 << 20  # of one float32 slice of logits
LABEL_TOLERANCE = 0.02  # by what a label may lose to another, over the largest logit


def main(request_path: str, answer_path: str) -> None:
    request = json.loads(Path(request_path).read_text(encoding="utf-8"))
    die_with(request["parent"])
    began = time.monotonic()
    library = "peft" if request.get("base") else "transformers"
    answer: dict[str, Any] = {"version": importlib.metadata.version(library)}
    try:
        answer |= check(request)
    except Exception as error:  # noqa: BLE001 - whatever a library raises is the finding
        answer["error"] = f"{type(error).__name__}: {error}"
    answer["seconds"] = round(time.monotonic() - began, 3)
    answer["peak_host_bytes"] = peak_host_bytes()
    Path(answer_path).write_text(json.dumps(answer), encoding="utf-8")


def die_with(parent: int) -> None:
    """Has the kernel end this process when its parent ends."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the call
        os._exit(1)


def check(request: dict[str, Any]) -> dict[str, Any]:
    """Loads, generates greedily, and scores the windows. Returns `sample` and `nll`, a mean for each window.

    A classifier generates nothing, and scores labels.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    directory = request["directory"]
    tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    kind = AutoModelForSequenceClassification if request.get("labels") else AutoModelForCausalLM
    model = kind.from_pretrained(
        request.get("base") or directory,
        dtype=getattr(torch, request["dtype"]),
        trust_remote_code=False,
        **rounding_of(request),
        **placement(request),
    ).eval()
    if request["offload"] and request["format"] == "compressed-tensors":
        round_inputs(model, Path(directory))
    if request.get("base"):
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, directory).eval()
    # What accelerate keeps on disk is on no device; its hooks move the inputs.
    device = torch.device(request["device"])
    with torch.inference_mode():
        if request.get("labels"):
            return classify(model, tokenizer, request["ids"], device)
        nll = [
            score(model, torch.tensor(ids, device=device), first, learned)
            for ids, first, learned in zip(
                request["ids"],
                request["first_scored"],
                request.get("learned") or [None] * len(request["ids"]),
                strict=True,
            )
        ]
        sample = generate(model, tokenizer, request, device)
    return {"nll": nll, "sample": sample}


def classify(model: Any, tokenizer: Any, examples: list[list[int]], device: Any) -> dict[str, Any]:
    """Scores texts whose last id is the number of their label: `nll`, of each label, `sample`, what the first one got,
    and `batched`, whether the tokenizer can fill texts up for a batch. Raises ValueError where that changes a label.
    """
    import torch

    texts = [ids[:-1] for ids in examples]
    alone = torch.cat([model(input_ids=torch.tensor([ids], device=device)).logits.float().cpu() for ids in texts])
    labels = torch.tensor([ids[-1] for ids in examples])
    nll = torch.nn.functional.cross_entropy(alone, labels, reduction="none").tolist()
    if not all(map(math.isfinite, nll)):
        raise ValueError("the logits are not finite")
    batched = tokenizer.pad_token_id is not None and model.config.pad_token_id is not None
    if batched:
        filled = tokenizer.pad({"input_ids": texts}, return_tensors="pt")
        given = {"input_ids": filled["input_ids"], "attention_mask": filled["attention_mask"]}
        together = model(**{name: one.to(device) for name, one in given.items()}).logits.float().cpu()
        lost = alone.max(dim=-1).values - alone.gather(-1, together.argmax(dim=-1, keepdim=True))[:, 0]
        # Sums in another order may turn what was as good as even.
        if bool((lost > LABEL_TOLERANCE * alone.abs().max()).any()):
            raise ValueError("texts of a batch that are filled up get other labels than alone")
    return {"nll": nll, "sample": model.config.id2label[int(alone[0].argmax())], "batched": batched}


def rounding_of(request: dict[str, Any]) -> dict[str, Any]:
    """How the model that an adapter goes with is rounded while it is loaded, where it is."""
    if not request.get("base_settings"):
        return {}
    from transformers import BitsAndBytesConfig

    return {"quantization_config": BitsAndBytesConfig(**request["base_settings"])}


def placement(request: dict[str, Any]) -> dict[str, Any]:
    """Where `from_pretrained` is to put the weights: on the device, or as far as they don't fit, on disk."""
    if not request["offload"]:
        return {} if request["device"] == "cpu" else {"device_map": {"": request["device"]}}
    arguments: dict[str, Any] = {
        "device_map": "auto",
        "offload_folder": request["scratch"],
        # None in host memory: the packed files are mapped beside them, and reading costs less than loading did.
        "max_memory": {"cpu": 1},
    }
    if request["device"] != "cpu":
        arguments["max_memory"][0] = request["device_weight_bytes"]
    if request["format"] == "compressed-tensors":
        from transformers import CompressedTensorsConfig

        # Unpacked at the first forward pass, as is the default, the weights would all be in memory at once.
        arguments["quantization_config"] = CompressedTensorsConfig(dequantize=True)
    return arguments


def round_inputs(model: Any, directory: Path) -> None:
    """Has linears round what they read, as the config says; transformers forgets it when it unpacks while loading."""
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp
    from compressed_tensors.utils import match_named_modules
    from safetensors import safe_open

    quantization = json.loads((directory / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    config = QuantizationConfig.model_validate({k: v for k, v in quantization.items() if k != "dequantize"})
    (group,) = config.config_groups.values()
    arguments = group.input_activations
    if arguments is None:
        return
    scales: dict[str, Any] = {}
    for file in directory.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            scales |= {key: tensors.get_tensor(key) for key in tensors.keys() if key.endswith(".input_scale")}  # noqa: SIM118

    def rounding(name: str) -> Any:
        def hook(module: Any, given: tuple[Any, ...]) -> tuple[Any, ...]:
            scale, zero = scales.get(f"{name}.input_scale"), None
            if arguments.dynamic:
                scale, zero = compute_dynamic_scales_and_zp(given[0], arguments, module)
            return (fake_quantize(given[0], scale, zero, arguments), *given[1:])

        return hook

    for name, module in match_named_modules(model, group.targets, config.ignore):
        module.register_forward_pre_hook(rounding(name))


def score(model: Any, ids: Any, first: int, learned: list[bool] | None = None) -> float:
    """Mean negative log-likelihood in nats of ids[first:]. ids: (T,) int64. learned: of which tokens alone; None: all.

    The window goes through the model in pieces, with its cache, so that the logits of one piece bound the memory.
    """
    import torch

    length, vocabulary = len(ids), model.config.get_text_config().vocab_size
    rows = max(16, LOGIT_BYTES // (4 * vocabulary))
    cache, total = None, 0.0
    scored = ids if learned is None else torch.where(torch.tensor(learned, device=ids.device), ids, -100)
    # What an adapter puts before the first piece is in the cache that the next ones go on from.
    going_on = model.get_base_model() if hasattr(model, "get_base_model") else model
    for start in range(0, length - 1, rows):
        stop = min(start + rows, length - 1)
        piece, program = ids[None, start:stop], going_on if start else model
        out = program(input_ids=piece, past_key_values=cache, use_cache=rows < length - 1)
        cache = out.past_key_values
        skipped = max(first - 1 - start, 0)  # the logits at position t predict token t + 1
        logits = out.logits[0, -piece.shape[1] :][skipped:].float()
        targets = scored[start + 1 + skipped : stop + 1].to(logits.device)
        total += float(torch.nn.functional.cross_entropy(logits, targets, reduction="sum")) if len(targets) else 0.0
    mean = total / (length - first if learned is None else sum(learned))
    if not math.isfinite(mean):
        raise ValueError("the logits are not finite")
    return mean


def generate(model: Any, tokenizer: Any, request: dict[str, Any], device: Any) -> str:
    """What the model continues the first window's opening with, greedily."""
    import torch

    prompt = request["ids"][0][: request["prompt_tokens"]] if request["ids"] else tokenizer("The")["input_ids"] or [0]
    ids = torch.tensor([prompt], device=device)
    made = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=request["new_tokens"],
        min_new_tokens=1,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
    )
    return str(tokenizer.decode(made[0, len(prompt) :], skip_special_tokens=True))


def peak_host_bytes() -> int:
    """The largest resident size of this program; getrusage would count that of the one that started it too."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmHWM"].split()[0]) * 1024


if __name__ == "__main__":
    main(*sys.argv[1:])
