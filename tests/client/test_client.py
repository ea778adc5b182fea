"""`squeeze.Client` against the real API."""

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from jobs import keys
from squeeze import Client, errors
from squeeze.objects import Stage, Status
from squeeze.specs.job_spec import JobSpec
from squeeze.steps.quantization import GPTQ
from tests.client.faults import Cut, Lose, Proxy, Refuse, proxy
from tests.client.service import Service

MODEL = "squeeze/bundled"
GPTQ_4 = {"kind": "quantize", "method": "gptq", "bits": 4}


def test_a_job_can_be_described_by_keywords_by_a_mapping_and_by_a_spec(client: Client) -> None:
    step = GPTQ(method="gptq", bits=3)
    spec = JobSpec(model=MODEL, steps=(step,), metadata={"team": "search"})
    by_spec = client.jobs.create(spec)
    by_keywords = client.jobs.create(model=MODEL, steps=[step], metadata={"team": "search"})
    by_mapping = client.jobs.create({"model": MODEL}, steps=[step], metadata={"team": "search"})
    assert by_spec.steps == by_keywords.steps == by_mapping.steps == (step,)
    assert by_spec.metadata == by_mapping.metadata == {"team": "search"}
    assert len({by_spec.id, by_keywords.id, by_mapping.id}) == 3
    assert client.jobs.get(by_spec.id) == by_spec


def test_jobs_are_listed_over_pages_and_filtered(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    made = [client.jobs.create(model=MODEL, steps=[GPTQ_4], metadata={"n": str(n % 2)}).id for n in range(5)]
    monkeypatch.setattr("squeeze.client.PAGE_ITEMS", 2)
    assert {job.id for job in client.jobs.list()} == set(made)
    assert len([*client.jobs.list(limit=3)]) == 3
    assert {job.id for job in client.jobs.list(metadata={"n": "1"})} == {made[1], made[3]}
    client.jobs.cancel(made[0])
    assert [job.id for job in client.jobs.list(status="cancelled")] == [made[0]]
    assert [*client.jobs.list(status=Status.running)] == []


def test_cancel_retry_and_delete_follow_the_job(client: Client) -> None:
    job = client.jobs.create(model=MODEL, steps=[GPTQ_4])
    with pytest.raises(errors.JobNotFinal):
        client.jobs.delete(job.id)
    assert client.jobs.cancel(job.id).status is Status.cancelled
    assert client.jobs.cancel(job.id).status is Status.cancelled
    assert client.jobs.retry(job.id).status is Status.queued
    client.jobs.cancel(job.id)
    assert client.jobs.delete(job.id).deleted
    with pytest.raises(errors.JobNotFound) as gone:
        client.jobs.get(job.id)
    assert job.id in gone.value.message


def test_an_error_comes_back_as_the_class_that_the_service_raised_with_its_field(client: Client) -> None:
    with pytest.raises(errors.SpecInvalid) as typo:
        client.jobs.create(model=MODEL, steps=[{"kind": "quantize", "method": "gptq", "bit": 4}])
    assert typo.value.param == "steps.0.bit"
    assert "bits" in typo.value.message
    with pytest.raises(errors.ReportNotReady):
        client.jobs.report(client.jobs.create(model=MODEL, steps=[GPTQ_4]).id)


def test_an_id_can_not_lead_to_another_route(client: Client) -> None:
    with pytest.raises(errors.NotFound):
        client.jobs.get("../methods")


def test_files_are_uploaded_listed_and_deleted(client: Client, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("a line of text\n" * 200)
    file = client.files.upload(text, "evaluation")
    assert (file.filename, file.bytes, file.purpose) == ("text.txt", text.stat().st_size, "evaluation")
    assert client.files.get(file.id) == file
    assert [one.id for one in client.files.list()] == [file.id]
    job = client.jobs.create(model=MODEL, steps=[GPTQ_4], evaluation={"source": file.id})
    with pytest.raises(errors.FileInUse):
        client.files.delete(file.id)
    client.jobs.cancel(job.id)
    assert client.files.delete(file.id).deleted
    with pytest.raises(errors.FileNotFound):
        client.files.get(file.id)


def test_methods_come_with_the_schema_of_their_parameters(client: Client) -> None:
    methods = {method.method: method for method in client.methods()}
    assert {"rtn", "gptq"} <= methods.keys()
    assert "damping" in methods["gptq"].parameters["properties"]


def test_wait_returns_the_final_job_and_shows_every_look(client: Client, service: Service, tmp_path: Path) -> None:
    job = client.jobs.create(model=MODEL, steps=[GPTQ_4])
    attempt = service.start(job.id)
    seen: list[Status] = []

    def on_poll(looked: object) -> None:
        seen.append(looked.status)  # type: ignore[attr-defined]
        if len(seen) == 1:
            service.succeed(job.id, attempt, {"gptq/config.json": b"{}"}, tmp_path)

    ended = client.jobs.wait(job.id, on_poll=on_poll)
    assert ended.status is Status.succeeded
    assert seen == [Status.running, Status.succeeded]
    assert ended.result is not None and ended.result.bits_per_weight == 4.25
    assert client.jobs.report(job.id).source.model == "squeeze/bundled"
    with pytest.raises(errors.JobFinal):
        client.jobs.cancel(job.id)
    with pytest.raises(errors.JobNotRetryable):
        client.jobs.retry(job.id)


def test_wait_gives_up_at_its_timeout_and_leaves_the_job_alone(client: Client) -> None:
    job = client.jobs.create(model=MODEL, steps=[GPTQ_4])
    with pytest.raises(TimeoutError, match=job.id):
        client.jobs.wait(job.id, timeout_seconds=0.01)
    assert client.jobs.get(job.id).status is Status.queued


def test_events_follow_a_job_to_its_end(client: Client, service: Service, tmp_path: Path) -> None:
    job = client.jobs.create(model=MODEL, steps=[GPTQ_4])
    followed: list[tuple[int, str]] = []
    first = threading.Event()

    def follow() -> None:
        for event in client.jobs.events(job.id):
            followed.append((event.id, event.type))
            first.set()

    thread = threading.Thread(target=follow)
    thread.start()
    assert first.wait(30)
    attempt = service.start(job.id)
    service.progress(job.id, attempt, Stage.compressing, 0.5)
    service.warn(job.id, attempt, "a line separator \u2028 inside")
    service.succeed(job.id, attempt, {"gptq/config.json": b"{}"}, tmp_path)
    thread.join(30)
    assert not thread.is_alive()
    recorded = [(event.id, event.type) for event in client.jobs.events(job.id, follow=False)]
    assert followed == recorded
    assert "warning" in dict(followed).values()
    later = recorded[1][0]
    assert [event.id for event in client.jobs.events(job.id, after=later)] == [n for n, _ in recorded if n > later]


def test_a_stream_of_events_that_breaks_goes_on_where_it_broke(
    service: Service, faulty: Proxy, unlucky: Client, tmp_path: Path
) -> None:
    job = unlucky.jobs.create(model=MODEL, steps=[GPTQ_4])
    attempt = service.start(job.id)
    for number in range(20):
        service.warn(job.id, attempt, f"warning {number} " + "x" * 100)
    faulty.on = "/events"
    faulty.faults = [Cut(1500), Refuse(503), Cut(1500), Cut(0)]
    ids = []
    for event in unlucky.jobs.events(job.id):
        ids.append(event.id)
        if event.message.startswith("warning 19"):
            service.succeed(job.id, attempt, {"gptq/config.json": b"{}"}, tmp_path)
    assert ids == [event.id for event in unlucky.jobs.events(job.id, follow=False)]
    assert len(ids) == 23
    resumed = [seen.headers["Last-Event-ID"] for seen in faulty.seen if "Last-Event-ID" in seen.headers]
    assert resumed[0] == "0" and int(resumed[2]) > 0


def test_a_submit_whose_answer_was_lost_makes_one_job(faulty: Proxy, unlucky: Client) -> None:
    faulty.faults = [Lose()]
    job = unlucky.jobs.create(model=MODEL, steps=[GPTQ_4])
    assert [one.id for one in unlucky.jobs.list()] == [job.id]
    assert len({seen.headers["Idempotency-Key"] for seen in faulty.seen if seen.method == "POST"}) == 1


def test_an_idempotency_key_of_ones_own_gives_the_same_job_and_refuses_another_body(client: Client) -> None:
    first = client.jobs.create(model=MODEL, steps=[GPTQ_4], idempotency_key="mine")
    assert client.jobs.create(model=MODEL, steps=[GPTQ_4], idempotency_key="mine").id == first.id
    with pytest.raises(errors.IdempotencyMismatch):
        client.jobs.create(model=MODEL, steps=[GPTQ_4], seed=1, idempotency_key="mine")


def test_a_refusal_for_now_is_repeated_and_a_call_that_must_not_happen_twice_is_not(
    faulty: Proxy, unlucky: Client
) -> None:
    job = unlucky.jobs.create(model=MODEL, steps=[GPTQ_4])
    faulty.faults = [Refuse(503), Refuse(429, {"Retry-After": "0"}), Lose()]
    assert unlucky.jobs.get(job.id).id == job.id
    unlucky.jobs.cancel(job.id)
    faulty.faults = [Lose()]
    with pytest.raises(errors.ConnectionFailed):
        unlucky.jobs.retry(job.id)
    assert unlucky.jobs.get(job.id).status is Status.queued


def test_a_service_that_stays_away_is_told_by_name(faulty: Proxy) -> None:
    faulty.faults = [Refuse(503)] * 9
    with Client(faulty.url, retries=1) as client, pytest.raises(errors.ServiceUnavailable):
        client.methods()
    with Client("http://127.0.0.1:1", retries=1) as client, pytest.raises(errors.ConnectionFailed) as away:
        client.methods()
    assert "http://127.0.0.1:1" in away.value.message and "SQUEEZE_URL" in away.value.message


def test_an_answer_that_is_not_of_this_service_is_an_error_of_ours(faulty: Proxy, unlucky: Client) -> None:
    faulty.faults = [Refuse(200)]
    with pytest.raises(errors.InternalError, match="Is it a Squeeze service"):
        unlucky.methods()


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://host", "http://", "file:///etc"])
def test_an_address_that_can_be_none_is_refused_at_once(url: str) -> None:
    with pytest.raises(errors.SpecInvalid, match=r"http://127\.0\.0\.1:8000"):
        Client(url)


def test_address_and_key_come_from_the_environment(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SQUEEZE_URL", service.url)
    with Client() as client:
        assert client.base_url == service.url
        assert client.methods()
    monkeypatch.setenv("SQUEEZE_API_KEY", "sq-wrong")
    with Client() as client, pytest.raises(errors.Unauthenticated):
        client.methods()


def test_a_download_that_is_sent_elsewhere_does_not_take_the_key_along(
    service: Service, faulty: Proxy, tmp_path: Path
) -> None:
    content = {"gptq/config.json": b"{}"}
    with service.database.write() as session:
        _, key = keys.create(session, "default", "test")
    with Client(faulty.url, api_key=key) as client, proxy(service.url) as elsewhere:
        job = client.jobs.create(model=MODEL, steps=[GPTQ_4])
        service.succeed(job.id, service.start(job.id), content, tmp_path)
        faulty.on = "config.json"
        faulty.faults = [Refuse(307, {"Location": f"{elsewhere.url}/signed"})]
        elsewhere.faults = [Refuse(403)]
        with pytest.raises(errors.RequestRefused):
            client.jobs.download(job.id, tmp_path / "out")
        assert [seen.path for seen in elsewhere.seen] == ["/signed"]
        assert "Authorization" not in elsewhere.seen[0].headers
        assert faulty.seen[-1].headers["Authorization"] == f"Bearer {key}"


def test_the_package_loads_no_library_of_the_service_and_the_types_load_no_http() -> None:
    program = (
        "import sys, squeeze.specs.job_spec, squeeze.objects, squeeze.reports.report; early = set(sys.modules)\n"
        "import squeeze; squeeze.Client; import squeeze.cli\n"
        "foreign = {'torch', 'transformers', 'fastapi', 'sqlalchemy', 'celery', 'obstore', 'jobs', 'models'}\n"
        "assert 'httpx' not in early, 'httpx'; assert not foreign & set(sys.modules), foreign & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True)
