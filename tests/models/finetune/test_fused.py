"""The LoRA layer with fewer walks over its outputs computes what peft's does, gradients too."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from models.finetune.fused import FusedLinear, fuse


def learner(**settings: Any) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 40), nn.GELU(), nn.Linear(40, 24, bias=False))
    settings = {"r": 4, "lora_alpha": 6.0, "target_modules": ["0", "2"], "init_lora_weights": False} | settings
    return get_peft_model(model, LoraConfig(**settings))


def gradients(model: Any, x: Tensor) -> list[Tensor]:
    """The outputs, and the gradient of everything that learns and of the inputs."""
    inputs = x.clone().requires_grad_()
    outputs = model(inputs)
    outputs.float().square().mean().backward()
    learned = [parameter.grad.clone() for parameter in model.parameters() if parameter.requires_grad]
    for parameter in model.parameters():
        parameter.grad = None
    assert inputs.grad is not None
    return [outputs.detach(), inputs.grad, *learned]


@pytest.mark.parametrize("shape", [(24,), (5, 24), (2, 5, 24)])
def test_outputs_and_gradients_are_those_of_peft(shape: tuple[int, ...]) -> None:
    model, x = learner(), torch.randn(shape, generator=torch.Generator().manual_seed(1))
    expected = gradients(model, x)
    fuse(model)
    assert sum(isinstance(module, FusedLinear) for module in model.modules()) == 2
    for found, wanted in zip(gradients(model, x), expected, strict=True):
        torch.testing.assert_close(found, wanted)


def test_outputs_are_those_of_peft_under_mixed_precision_and_beside_a_base_in_16_bits() -> None:
    x = torch.randn((3, 5, 24), generator=torch.Generator().manual_seed(1))
    mixed = learner()
    narrow = learner()
    for module in narrow.modules():
        if hasattr(module, "base_layer"):
            module.base_layer.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        expected = gradients(mixed, x)
        fuse(mixed)
        for found, wanted in zip(gradients(mixed, x), expected, strict=True):
            torch.testing.assert_close(found, wanted, atol=2e-2, rtol=2e-2)
    expected = gradients(narrow, x.bfloat16())
    fuse(narrow)
    for found, wanted in zip(gradients(narrow, x.bfloat16()), expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=2e-2, rtol=2e-2)


def test_without_its_adapter_the_model_is_the_base() -> None:
    model, x = learner(), torch.randn(3, 24)
    fuse(model)
    with model.disable_adapter():
        torch.testing.assert_close(model(x), model.get_base_model()(x))


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"lora_dropout": 0.1}])
def test_what_peft_computes_in_another_way_is_left_to_it(settings: dict[str, Any]) -> None:
    model = learner(**settings)
    fuse(model)
    assert not any(isinstance(module, FusedLinear) for module in model.modules())
