"""The loss curve is that of peft and transformers' Trainer."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset, SequentialSampler
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from models.train.checkpoints import Checkpoints
from models.train.examples import Examples
from models.train.loop import train
from models.train.task import accelerator_of
from tests.models.job_parts import Heard
from tests.models.tiny import FAMILIES
from tests.models.train.parts import begin, inputs_for, spec_of

STEPS = 20
STEP = {"steps": STEPS, "packing": False, "micro_batch_size": 2, "warmup": 0.1, "weight_decay": 0.01, "alpha": 8.0}


class InOrder(Dataset[dict[str, Tensor]]):
    def __init__(self, examples: Examples, order: list[int]) -> None:
        self.examples, self.order = examples, order

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, place: int) -> dict[str, Tensor]:
        ids, scored = self.examples.one(self.order[place])
        return {"input_ids": ids.long(), "labels": torch.where(scored, ids.long(), -100)}


class Peer(Trainer):
    def _get_train_sampler(self, *given: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)


def collated(items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    ids, labels = ([one[name] for one in items] for name in ("input_ids", "labels"))
    return {
        "input_ids": pad_sequence(ids, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(one) for one in ids], batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=-100),
    }


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")
def test_twenty_steps_lose_what_trainer_s_lose(tmp_path: Path) -> None:
    model = FAMILIES["llama"](tmp_path / "model")
    prepared, task = begin(inputs_for(spec_of(STEP, seed=3), model, tmp_path / "ours"))
    checkpoints = Checkpoints(tmp_path / "checkpoints", prepared.mark)
    story = train(task, accelerator_of("fp32", prepared.device), checkpoints, Heard(), 1e9)

    source = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    torch.manual_seed(3)
    targets = sorted({site.name.rpartition(".")[2] for site in prepared.sites})
    peer = get_peft_model(source, LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM"))
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "trainer"),
        max_steps=STEPS,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=0.01,
        lr_scheduler_type="cosine",
        warmup_steps=2,
        weight_decay=0.01,
        max_grad_norm=1.0,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        seed=3,
        save_strategy="no",
        disable_tqdm=True,
    )
    order = [number for step in range(STEPS) for row in task.plan.batch(step) for number in row]
    trainer = Peer(peer, arguments, train_dataset=InOrder(prepared.split.train, order), data_collator=collated)
    trainer.train()
    logged = [one for one in trainer.state.log_history if "loss" in one]
    worst = max(abs(one.loss - theirs["loss"]) for one, theirs in zip(story.curve, logged, strict=True))
    assert worst < 1e-4, f"worst difference {worst:.2g}"
    assert [one.learning_rate for one in story.curve] == [theirs["learning_rate"] for theirs in logged]
    assert story.curve[-1].loss < story.curve[0].loss
