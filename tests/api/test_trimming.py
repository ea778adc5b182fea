"""How small a vocabulary can be is looked at when a job is posted, and planned as far as it can be known by then."""

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from api.pages.report import page
from jobs.settings import Settings
from squeeze.cli import show
from squeeze.objects import Plan
from squeeze.reports.report import Report
from tests.api.planning import LLAMA, llama_shapes, safetensors
from tests.api.serving import report, serve
from tests.hub import FaultyHub

OUTSIDE = 4 * (256 * 256 + 256 * 640 + 256) + 256
MODELS = {
    "org/llama": {**LLAMA, "model.safetensors": safetensors(llama_shapes(4))},
    "org/small": {
        **LLAMA,
        "model.safetensors": safetensors({**llama_shapes(1), "model.embed_tokens.weight": (64, 256)}),
    },
}


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory, _valkey: str) -> Iterator[Callable[..., Any]]:
    data = tmp_path_factory.mktemp("trimming")
    settings = Settings(data, f"sqlite:///{data}/squeeze.db", _valkey, (data / "storage").as_uri())
    with FaultyHub() as hub, pytest.MonkeyPatch.context() as environment:
        for name, files in MODELS.items():
            hub.add_files(name, files, tmp_path_factory.mktemp("hub"))
        environment.setenv("HF_ENDPOINT", hub.url)
        with serve(settings) as running:
            form = {"data": {"purpose": "calibration"}, "files": {"file": ("texts.txt", b"some words\n" * 1000)}}
            texts = {"data": {"source": running.client.post("/v1/files", **form).json()["id"]}}

            def ask(route: str, *steps: dict[str, Any], model: str = "org/llama", **fields: Any) -> Any:
                return running.client.post(f"/v1/{route}", json={"model": model, "steps": steps} | texts | fields)

            yield ask


def trim(**fields: Any) -> dict[str, Any]:
    return {"kind": "prune", "method": "vocabulary"} | fields


@pytest.mark.parametrize(
    ("step", "model", "param", "words"),
    [
        (trim(size=1024), "org/llama", "steps.0.size", "has 1000 tokens, .* at most 960, not 1024"),
        (trim(params_target=0.5), "org/llama", "steps.0.params_target", r"least that params_target can be is 0\.797"),
        (trim(), "org/small", "steps.0.multiple", "no multiple of 64 is less"),
    ],
)
def test_a_size_that_can_t_be_is_refused_at_submit_and_in_the_plan_with_what_can(
    asked: Callable[..., Any], step: dict[str, Any], model: str, param: str, words: str
) -> None:
    (obstacle,) = Plan.model_validate(asked("plan", step, model=model).json()).obstacles
    assert obstacle.param == param and re.search(words, obstacle.message)
    answer = asked("jobs", step, model=model)
    assert answer.status_code == 422 and answer.json()["error"]["param"] == param
    assert re.search(words, answer.json()["error"]["message"])


def test_without_a_text_of_the_user_s_there_is_nothing_to_trim_to(asked: Callable[..., Any]) -> None:
    for data in ({}, {"source": "self"}):
        answer = asked("jobs", trim(), data=data)
        assert answer.status_code == 422 and "name a file" in answer.json()["error"]["message"]


def test_a_size_is_planned_exactly_and_what_hangs_on_the_text_at_most(asked: Callable[..., Any]) -> None:
    plan = Plan.model_validate(asked("plan", trim(size=320)).json())
    assert plan.feasible and plan.result_parameters == OUTSIDE + 320 * 256 and plan.most_result_parameters is None
    assert plan.result_bytes == {"safetensors": 2 * plan.result_parameters}
    assert plan.seconds is not None and plan.host_bytes and plan.disk_bytes
    share = Plan.model_validate(asked("plan", trim(params_target=0.9)).json())
    assert share.result_parameters is not None and share.parameters is not None
    assert 0 <= 0.9 * share.parameters - share.result_parameters < 64 * 256
    least = Plan.model_validate(asked("plan", trim()).json())
    assert least.feasible and least.result_parameters is None
    assert least.most_result_parameters == least.parameters == OUTSIDE + 1000 * 256
    assert asked("jobs", trim(keep=["<|tool|>"])).status_code == 202


def test_it_goes_on_to_be_rounded_trained_or_cut_and_taught_and_not_to_be_taught_itself(
    asked: Callable[..., Any],
) -> None:
    gguf = asked("plan", trim(size=320), {"kind": "quantize", "method": "kquant"}, formats=["gguf"])
    assert Plan.model_validate(gguf.json()).feasible
    taught = {"kind": "distill", "method": "logits"}
    refused = asked("jobs", trim(), taught)
    assert refused.status_code == 422 and "say who learns, either `layers`" in refused.json()["error"]["message"]
    plan = Plan.model_validate(asked("plan", trim(size=320), taught | {"student": {"layers": 2}}).json())
    assert plan.result_parameters == (OUTSIDE - 256) // 2 + 256 + 320 * 256


def test_the_page_and_the_terminal_tell_what_was_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    plain = report()
    speed = {"prompt_tokens": 128, "prompt": 1000.0, "writing": 100.0}
    corpus = {"origin": "<i>file</i>", "texts": 7, "bytes": 5000, "tokens": 1200, "sha256": "0" * 64}
    bits = {"bits_per_byte_before": 1.5, "bits_per_byte_after": 1.25}
    unseen = {"origin": "file-unseen", "bytes": 900, "tokens_before": 200, "tokens_after": 260, "covered": 0.75}
    trimming = {
        **{"rows_before": 32000, "rows_after": 5696, "tokens_before": 32000, "tokens_after": 5696},
        **{"found": 4394, "parts": 985, "always": 257, "filled": 60},
        "corpus": corpus | {"decoded_to_themselves": 6, "new_share": 0.003},
        **{"largest_difference": 0.0, "compared_positions": 100, "left_out_probability": 0.08},
        **bits,
        "unseen": unseen | bits | {"measured_bytes": 900},
        "left_out_files": [],
    }
    sizes = {"parameters_before": 100, "parameters_after": 40, "bytes_before": 200, "bytes_after": 80}
    made = {"method": "vocabulary", "importance": "use", "calibration": plain["calibration"], "trimming": trimming}
    told = Report.model_validate(plain | {"slimming": made | sizes | {"speed_before": speed, "speed_after": speed}})
    html = page("job-1", told)
    for words in ("5,696 of 32,000 tokens stay", "All 7 texts of &lt;i&gt;file", "file-unseen", "75.0"):
        assert words in html
    show.report(told)
    said = capsys.readouterr().out
    assert "32,000 -> 5,696 tokens, of which the text has 4,394" in said and "200 -> 260 tokens of file-unseen" in said
