"""Pages for people: the report and the docs load nothing from elsewhere and run nothing of a user's."""

import hashlib
import re
from base64 import b64encode
from typing import Any

import pytest

from api.pages.report import page as page_of
from squeeze.reports.report import Report
from tests.api.serving import Running, report

BROWSER = {"Accept": "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"}


@pytest.fixture(scope="module")
def page(shared: Running, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """(the report's page, its content security policy)"""
    job_id = shared.submit()
    shared.succeed(job_id, {"gptq/config.json": b"{}"}, tmp_path_factory.mktemp("made"), report())
    answer = shared.client.get(f"/v1/jobs/{job_id}/report", headers=BROWSER)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    return answer.text, answer.headers["content-security-policy"]


def test_the_report_shows_its_figures(page: tuple[str, str]) -> None:
    text, _ = page
    for shown in (
        *(
            "quantize by gptq, bits 4",
            "2.4 MB",
            "3.50 times smaller",
            "2.5 MB with",
            "4.25",
            "10.5",
            "10 before, +5.00 %",
        ),
        *("93.0 %", "passed", "5.23.0", "0.0123", "org/&lt;b&gt;name&lt;/b&gt;"),
    ):
        assert shown in text, shown


def test_a_training_is_shown_with_its_curve() -> None:
    text = _trained()
    for shown in (
        "Held-out loss",
        "3.1 before",
        "1,234",
        '<polyline points="325.0,83.3 590.0,150.0">',
        "file-&lt;i&gt;",
    ):
        assert shown in text, shown
    assert "Bits per weight" not in text and "Error of every block" not in text and "Student and teacher" not in text
    assert text.count("<circle") == 2 and text.count("<polyline") == 1


TAUGHT = {
    **{"student": "blocks 0, 4 of <i>", "student_parameters": 2_621_696, "student_bytes": 5_243_392},
    **{"teacher_parameters": 5_016_320, "vocabulary": 4096, "stored_bytes_per_token": 258, "stored_bytes": 774_000},
    **{"loss_teacher": 0.7923, "divergence_before": 1.2345, "divergence_after": 0.4321},
    **{"agreement_before": 0.251, "agreement_after": 0.503},
}


def test_a_distillation_shows_both_models_and_how_far_they_are_apart() -> None:
    text = _trained(distillation=TAUGHT)
    for scale in ("Objective by step", "Held-out loss by step", '"325.0,10.0 590.0,150.0"', '"60.0,10.0 590.0,150.0"'):
        assert scale in text, "what is learned from is drawn apart from what is measured"
    for shown in (
        *("2,621,696", "5,016,320", "0.7923", "258 bytes were kept", "774 KB in all", "blocks 0, 4 of &lt;i&gt;"),
        *("1.234", "0.4321", "25.1 %", "50.3 %", "4,096 tokens that both know", "nats a token from the teacher; 1.23"),
    ):
        assert shown in text, shown


def test_a_student_of_another_tokenizer_is_not_compared_and_what_was_asked_anew_was_not_kept() -> None:
    names = ("vocabulary", "stored_bytes", "stored_bytes_per_token", "loss_teacher")
    compared = ("divergence_before", "divergence_after", "agreement_before", "agreement_after")
    text = _trained(distillation=TAUGHT | dict.fromkeys((*names, *compared)))
    assert "cut text into other tokens" in text and "2,621,696" in text
    for absent in ("were kept", "Same first choice", "from the teacher;"):
        assert absent not in text, absent


def test_domains_are_shown_with_what_they_weighed_and_lost() -> None:
    prose = {
        **{"name": "prose <i>", "tokens": 12_345, "sequences": 25, "drawn": 40, "measured_tokens": 900},
        **{"weight_before": 0.25, "weight_after": 0.4321, "loss_reference": 2.125, "loss_before": 3.5},
    }
    known = {"domains": {"prose <i>": 77}, "held_out_domains": {"prose <i>": 8}}
    text = _trained(domains=[prose | {"loss_after": 2.5}], data=DATA | known)
    for shown in ("prose &lt;i&gt;", "77", "12,345", "25.0 %", "43.2 %", "40 of 25", "2.125", "3.5", "2.5", "0.375"):
        assert shown in text, shown
    assert "Domains" not in _trained()


DATA = {
    **{"origin": "file-<i>", "held_out_origin": "file-<i>", "records": 90, "held_out_records": 10, "examples": 90},
    **{"held_out_examples": 10, "tokens": 900, "learned_tokens": 800, "sha256": "a", "held_out_sha256": "b"},
}


def test_a_round_that_only_zeroed_or_factored_is_shown_with_what_it_has() -> None:
    parts = dict.fromkeys(("quality", "training", "merging", "slimming", "sparsity"))
    rounds = [{"steps": [0], "parameters": 4_200_000, "weight_bytes": 8_400_000, "seconds": {}} | parts]
    text = page_of("job-1", Report.model_validate(report() | {"rounds": rounds}))
    (row,) = re.findall(r"<tr><td>gptq</td>.*</tr>", text)
    assert row.count("–") == 5 and "4,200,000" in row


def _trained(**more: Any) -> str:
    """The page of a job that trained."""
    steps = [{"step": n, "loss": 3.0 - n, "learning_rate": 0.1, "gradient_norm": 1.0, "tokens": 9, "seconds": 0.1,
              "peak_host_bytes": 1, "peak_gpu_bytes": 0} for n in (1, 2)]  # fmt: skip
    training = {
        **{"method": "lora", "precision": "fp32", "trainable_parameters": 1234, "trained_modules": 3, "data": DATA},
        **{"sequence_length": 64, "packed": True, "sequences": 15, "filled": 0.9, "measured_examples": 10},
        **{"measured_tokens": 80, "steps": 2, "planned_steps": 2, "best_step": 2, "loss_before": 3.1},
        **{"loss_after": 1.0, "curve": steps, "tokens_per_second": 90.0},
        **{"held_out": [{"step": 0, "loss": 3.1}, {"step": 2, "loss": 1.0}]},
    }
    changed = {"training": training | more, "bits_per_weight": None, "blocks": [], "quality": None}
    return page_of("job-1", Report.model_validate(report() | changed))


def test_a_training_of_rounded_weights_says_where_it_began() -> None:
    tuning = {
        **{"trained": "scales", "precision": "fp32", "trainable_parameters": 4321, "sequences": 9, "steps": 5},
        **{"perplexity_start": 9.0, "divergence_start": 0.0294, "curve": [], "tokens_per_second": 90.0},
    }
    text = page_of("job-1", Report.model_validate(report() | {"tuning": tuning}))
    for shown in ("4,321", "scales, 5 steps", "it began at a divergence of 0.0294"):
        assert shown in text, shown


def test_what_users_and_models_wrote_is_escaped(page: tuple[str, str]) -> None:
    text, _ = page
    for raw in ("<script", "<img", "<b>", "<i>"):
        assert raw not in text


def test_the_policy_allows_the_own_style_and_nothing_else(page: tuple[str, str]) -> None:
    text, policy = page
    style = re.search(r"<style>(.*?)</style>", text, re.DOTALL)
    assert style is not None
    digest = b64encode(hashlib.sha256(style[1].encode()).digest()).decode()
    assert f"style-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert not re.search(r"<[^>]*(src|href|style)=", text)


def test_the_docs_load_everything_from_here(shared: Running) -> None:
    answer = shared.client.get("/docs")
    assert answer.status_code == 200
    assert "http" not in answer.text
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    for asset in re.findall(r'(?:src|href)="(docs/[^"]+)"', answer.text):
        packed = shared.client.get(f"/{asset}")
        plain = shared.client.get(f"/{asset}", headers={"Accept-Encoding": "identity"})
        assert packed.status_code == 200
        assert packed.content == plain.content
    assert shared.client.get("/docs/other.js").status_code == 404


def test_the_vendored_assets_are_what_their_notice_says(shared: Running) -> None:
    from api.pages import docs

    notice = (docs._ASSETS / "NOTICE").read_text()
    for digest, name in re.findall(r"^([0-9a-f]{64})  (\S+)$", notice, re.MULTILINE):
        assert hashlib.sha256(shared.client.get(f"/docs/{name}").content).hexdigest() == digest


def test_the_address_of_the_service_leads_a_browser_to_the_docs(shared: Running) -> None:
    answer = shared.client.get("/", follow_redirects=True)
    assert (answer.status_code, answer.url.path) == (200, "/docs")


def test_the_report_shows_where_bits_went_and_what_a_rotation_did() -> None:
    trials = [{"bits": 3, "divergence_nats": 0.0321}, {"bits": 4, "divergence_nats": 0.0082}]
    told = report() | {
        "allocation": {
            "measure": "<i>predicted</i>",
            "bits": 3.5,
            "divergence_nats": 0.0123,
            "layers": [{"name": "model.layers.0.mlp.<b>up</b>", "weights": 196_608, "trials": trials, "bits": 4}],
            "curve": [{"bits": 3.0, "divergence_nats": 0.0456}, {"bits": 4.0, "divergence_nats": 0.0078}],
        },
        "rotation": {
            "kind": "hadamard",
            "hidden_states": "Hadamard of order 256",
            "values": "Hadamard of order 64",
            "untied_bytes": 2_000_000,
            "peak_before": 31.5,
            "peak_after": 8.25,
        },
    }
    html = page_of("job-x", Report.model_validate(told))
    for shown in ("0.032", "0.0082", "0.046", "196,608", "Hadamard of order 256", "31.5", "8.25", "2 MB"):
        assert shown in html
    assert "<b>up</b>" not in html and "<i>predicted</i>" not in html
