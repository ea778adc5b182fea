"""The engine on a GPU gives what it gives on the CPU, within float32's noise."""

import pytest
import torch
from transformers import AutoTokenizer

from models.files.checkpoint import open_model
from models.measuring.evaluation import measure
from models.progress import Silent
from models.streaming import engine
from models.streaming.frame import Frame
from models.texts.data import calibration_batches, evaluation_windows
from squeeze.steps.quantization import GPTQ
from tests.models import tiny

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_a_gpu_gives_the_figures_of_the_cpu(tmp_path, family):
    model = tiny.FAMILIES[family](tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = calibration_batches(tokenizer, None, None, 64, 64, seed=0).ids
    windows = evaluation_windows(tokenizer, None, None, True, 8, 64, stride=None)
    figures = {}
    for device in ("cpu", "cuda"):
        frame = Frame(open_model(model), torch.float32, torch.device(device))
        done = engine.quantize(frame, GPTQ(method="gptq", group_size=32), ids, windows, tmp_path / device, "", Silent())
        activations = done.activations
        figures[device] = measure(frame, windows, activations.original, activations.compressed, Silent()).quality
    assert figures["cuda"].perplexity_before == pytest.approx(figures["cpu"].perplexity_before, rel=1e-3)
    assert figures["cuda"].divergence_nats == pytest.approx(figures["cpu"].divergence_nats, rel=0.1)
