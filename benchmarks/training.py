"""LoRA side by side with peft + transformers' Trainer: the loss curve, and tokens a second, packed and not.

    python benchmarks/training.py [--model DIR] [--steps 50] [--length 128] [--rounds 3]

The trainings take turns for some rounds, so that what the machine does besides falls on all of them; each round's
speeds are told as ratios. Both see the same short examples in the same order, in float32, with the same seed and
settings. Speed is learned from what stands in the examples: tokens that only fill a sequence up don't count.
"""

import argparse
import json
import random
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from peft import LoraConfig, get_peft_model
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import SequentialSampler
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from models.job import Inputs
from models.progress import Silent
from models.train.checkpoints import Checkpoints, Story
from models.train.loop import train
from models.train.prepare import Prepared, begun, prepare
from models.train.task import Task, accelerator_of
from squeeze.specs.job_spec import JobSpec
from squeeze.steps.finetuning import LoRA

BUNDLED = Path(__file__).resolve().parents[1] / "models" / "bundled"
RANK, ALPHA, RATE, SEED, BATCH, MICRO = 8, 16.0, 1e-3, 3, 8, 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=BUNDLED)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--length", type=int, default=128, help="tokens of a sequence, where they are packed")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    speeds: dict[str, list[float]] = {}
    for number in range(options.rounds):
        with tempfile.TemporaryDirectory() as room:
            prepared, task, story, seconds = ours(options, Path(room) / "alone", packing=False)
            curve, their_seconds = theirs(options.model, prepared, task, Path(room))
            packed, packed_seconds = ours(options, Path(room) / "packed", packing=True)[2:]
        if number == 0:
            worst = max(abs(one.loss - loss) for one, loss in zip(story.curve, curve, strict=True))
            print(f"{options.steps} steps of {BATCH} examples; losses {curve[0]:.4f} … {curve[-1]:.4f}")
            print(f"worst difference of the two curves: {worst:.2g}")
        rows = [("Trainer", story, their_seconds), ("not packed", story, seconds), ("packed", packed, packed_seconds)]
        for name, told, spent in rows:
            speeds.setdefault(name, []).append(sum(one.tokens for one in told.curve) / spent)
    print("| | tokens/s, each round | against Trainer, each round | median |\n|---|---|---|---|")
    for name, each in speeds.items():
        ratios = [one / other for one, other in zip(each, speeds["Trainer"], strict=True)]
        cells = [", ".join(f"{one:,.0f}" for one in each), ", ".join(f"{one:.2f}" for one in ratios)]
        print(f"| {name} | {cells[0]} | {cells[1]} | {median(ratios):.2f} |")


def ours(options: Any, room: Path, *, packing: bool) -> tuple[Prepared, Task, Story, float]:
    """The training, and the seconds that its steps took."""
    room.mkdir()
    step = {"kind": "finetune", "method": "lora", "steps": options.steps, "learning_rate": RATE, "packing": packing}
    step |= {"batch_size": BATCH, "micro_batch_size": MICRO, "warmup": 0.1, "rank": RANK, "alpha": ALPHA}
    data = {"source": "file-abcdefgh", "sequence_length": options.length}
    spec = JobSpec.model_validate({"model": "org/model", "steps": [step], "data": data, "seed": SEED})
    inputs = Inputs(
        spec=spec,
        model=options.model.resolve(),
        model_name="model",
        revision="0",
        calibration_text=_examples(room / "rows.jsonl"),
        work=room,
        out=room / "out",
        device="cpu",
        job_id="job",
    )
    lora = spec.steps[0]
    assert isinstance(lora, LoRA)
    prepared = prepare(inputs, lora)
    task = begun(prepared)[0]
    accelerator = accelerator_of(prepared.precision, prepared.device)
    story = train(task, accelerator, Checkpoints(room / "train", prepared.mark), Silent(), 1e9)
    return prepared, task, story, sum(one.seconds for one in story.curve)


def theirs(model: Path, prepared: Prepared, task: Task, room: Path) -> tuple[list[float], float]:
    """(loss of each step, seconds of all steps)."""
    source = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    torch.manual_seed(SEED)
    targets = sorted({site.name.rpartition(".")[2] for site in prepared.sites})
    learner = get_peft_model(
        source, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets, task_type="CAUSAL_LM")
    )
    steps, examples = task.plan.steps, prepared.split.train
    order = [number for step in range(steps) for row in task.plan.batch(step) for number in row]
    arguments = TrainingArguments(
        output_dir=str(room / "trainer"),
        max_steps=steps,
        per_device_train_batch_size=MICRO,
        gradient_accumulation_steps=BATCH // MICRO,
        learning_rate=RATE,
        lr_scheduler_type="cosine",
        warmup_steps=-(-steps // 10),
        max_grad_norm=1.0,
        logging_steps=1,
        report_to=[],
        remove_unused_columns=False,
        use_cpu=True,
        seed=SEED,
        save_strategy="no",
        disable_tqdm=True,
    )
    rows = [{"ids": ids.long(), "scored": scored} for ids, scored in map(examples.one, order)]
    trainer = _InOrder(learner, arguments, train_dataset=rows, data_collator=_collated)
    began = time.monotonic()
    trainer.train()
    return [one["loss"] for one in trainer.state.log_history if "loss" in one], time.monotonic() - began


class _InOrder(Trainer):
    def _get_train_sampler(self, *_: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)


def _collated(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    labels = [torch.where(row["scored"], row["ids"], -100) for row in rows]
    return {
        "input_ids": pad_sequence([row["ids"] for row in rows], batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(row["ids"]) for row in rows], batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=-100),
    }


def _examples(path: Path) -> Path:
    """Questions and answers of very different lengths, as users have them."""
    dice = random.Random(0)
    rows = []
    for _ in range(600):
        numbers = [dice.randrange(100) for _ in range(dice.choice((2, 2, 2, 3, 3, 5, 12)))]
        question = " plus ".join(map(str, numbers))
        rows.append({"prompt": f"What is {question}? ", "completion": f"It is {sum(numbers)}."})
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


if __name__ == "__main__":
    main()
