"""`squeeze …` against the real API: what it prints and how it ends."""

import json
import os
import pty
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from squeeze import Client
from squeeze.cli import main, show
from squeeze.objects import Duration, Plan, Stage, Status
from tests.cli.conftest import Squeeze
from tests.client.service import REPORT, Service

MODEL = "squeeze/bundled"
GPTQ_4 = {"kind": "quantize", "method": "gptq", "bits": 4}
QUANTIZE = ("quantize", MODEL, "--method", "gptq", "--bits", "4")
FILES = {"gptq/config.json": b"{}", "report.json": b"[]"}
PATIENCE_SECONDS = 30.0


def test_quantize_sends_what_was_typed_and_says_how_to_watch(squeeze: Squeeze, client: Client) -> None:
    words = ("--group-size", "channel", "--no-symmetric", "--format", "gptq", "--format", "compressed-tensors")
    more = ("--ignore", "*.down_proj", "--samples", "16", "--evaluation-stride", "32", "--no-divergence")
    rest = ("--max-runtime-seconds", "60", "--seed", "7", "--priority", "-2", "--metadata", "team=search")
    done = squeeze(*QUANTIZE, *words, *more, *rest)
    assert done.exit_code == 0, done.output
    (job,) = client.jobs.list()
    assert done.stdout.startswith(f"{job.id} is queued; watch it: squeeze --url {client.base_url} wait {job.id}")
    step = job.steps[0]
    assert (step.bits, step.group_size, step.symmetric, step.ignore) == (4, "channel", False, ("*.down_proj",))
    assert (job.formats, job.data.samples) == (("gptq", "compressed-tensors"), 16)
    assert (job.evaluation.stride, job.evaluation.divergence, job.evaluation.perplexity) == (32, False, True)
    assert (job.limits.max_runtime_seconds, job.seed, job.priority) == (60, 7, -2)
    assert job.metadata == {"team": "search"}


def test_data_is_uploaded_and_an_id_is_taken_as_it_is(squeeze: Squeeze, client: Client, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("some words to look at\n" * 100)
    first = json.loads(squeeze(*QUANTIZE, "--data", str(text), "--json").stdout)
    (file,) = client.files.list()
    assert first["data"]["source"] == file.id
    second = json.loads(squeeze(*QUANTIZE, "--evaluation-data", file.id, "--json").stdout)
    assert second["evaluation"]["source"] == file.id
    assert len([*client.files.list()]) == 1


def test_a_dataset_and_the_model_s_own_text_need_no_file(squeeze: Squeeze, client: Client) -> None:
    data = ("--data", "hub:org/texts:train", "--data-column", "body", "--evaluation-data", "hub:org/texts:test")
    job = json.loads(squeeze(*QUANTIZE, *data, "--json").stdout)
    assert (job["data"]["source"], job["data"]["column"]) == ("hub:org/texts:train", "body")
    assert job["evaluation"]["source"] == "hub:org/texts:test"
    assert json.loads(squeeze(*QUANTIZE, "--data", "self", "--json").stdout)["data"]["source"] == "self"
    assert [*client.files.list()] == []
    for wrong in (("--data", "hub:org/"), ("--evaluation-data", "self"), ("--data-column", "body")):
        assert squeeze(*QUANTIZE, *wrong).exit_code == 2


def test_a_wrong_spec_uploads_nothing_and_ends_with_2(squeeze: Squeeze, client: Client, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("words\n" * 100)
    done = squeeze("quantize", MODEL, "--method", "rtn", "--damping", "0.1", "--data", str(text))
    assert done.exit_code == 2
    assert done.stderr == "Error: --damping: rtn takes none [steps.0.damping] (spec_invalid)\n"
    assert [*client.files.list()] == []
    assert squeeze(*QUANTIZE, "--data", "no-such-file").exit_code == 2
    assert squeeze(*QUANTIZE, "--bits", "5").exit_code == 2
    assert squeeze(*QUANTIZE, "--damping", "0").exit_code == 2


def test_errors_of_the_service_end_with_2_and_3_and_come_as_json_when_asked(squeeze: Squeeze) -> None:
    gone = squeeze("show", "job-00000000000000000000000000", "--json")
    assert gone.exit_code == 2
    assert json.loads(gone.stderr)["error"]["code"] == "job_not_found"
    away = CliRunner().invoke(main, ["--url", "http://127.0.0.1:1", "jobs"])
    assert away.exit_code == 3
    assert "No answer from http://127.0.0.1:1" in away.stderr
    assert CliRunner().invoke(main, ["--url", "nonsense", "jobs"]).exit_code == 2


def test_a_job_is_shown_listed_cancelled_retried_and_deleted(squeeze: Squeeze, client: Client) -> None:
    job = client.jobs.create(model=MODEL, steps=[GPTQ_4], metadata={"team": "search"})
    assert job.id in squeeze("jobs").stdout
    assert job.id in squeeze("jobs", "--metadata", "team=search", "--status", "queued").stdout
    assert job.id not in squeeze("jobs", "--metadata", "team=other").stdout
    listed = squeeze("jobs", "--json").stdout.splitlines()
    assert [json.loads(line)["id"] for line in listed] == [job.id]
    assert squeeze("jobs", "--metadata", "team").exit_code == 2
    assert "quantize by gptq, bits 4" in squeeze("show", job.id).stdout
    assert json.loads(squeeze("cancel", job.id, "--json").stdout)["status"] == "cancelled"
    assert json.loads(squeeze("retry", job.id, "--json").stdout)["status"] == "queued"
    assert squeeze("delete", job.id).exit_code == 2
    squeeze("cancel", job.id)
    assert squeeze("delete", job.id).exit_code == 0
    assert squeeze("show", job.id).exit_code == 2


def test_the_end_of_a_job_is_shown_with_its_figures_and_downloaded(
    squeeze: Squeeze, client: Client, service: Service, tmp_path: Path
) -> None:
    job = client.jobs.create(model=MODEL, steps=[GPTQ_4])
    service.succeed(job.id, service.start(job.id), FILES, tmp_path)
    waited = squeeze("wait", job.id, "--download", str(tmp_path / "out"))
    assert waited.exit_code == 0, waited.output
    assert "10.000 -> 10.500 (+5.00%)" in waited.stdout and "3.33 times smaller" in waited.stdout
    assert (tmp_path / "out" / "gptq" / "config.json").read_bytes() == b"{}"
    assert squeeze("download", job.id, str(tmp_path / "again"), "--format", "gptq").exit_code == 0
    assert [path.name for path in (tmp_path / "again").rglob("*.json")] == ["config.json"]
    reported = squeeze("report", job.id).stdout
    for told in ("squeeze/bundled", "2.86 times smaller", "20.000 -> 21.000", "0.01230 nats", "passed", "generic text"):
        assert told in reported
    assert json.loads(squeeze("report", job.id, "--json").stdout) == REPORT
    events = squeeze("events", job.id, "--follow", "--json").stdout.splitlines()
    assert [json.loads(line)["data"].get("status") for line in events][-1] == "succeeded"


def test_a_job_that_failed_ends_the_wait_with_1_and_its_reason(
    squeeze: Squeeze, client: Client, service: Service
) -> None:
    job = client.jobs.create(model=MODEL, steps=[GPTQ_4])
    service.warn(job.id, service.start(job.id), "look \x1b[31mhere")
    client.jobs.cancel(job.id)
    with service.database.write() as session:
        from jobs import lifecycle

        lifecycle.cancelled(session, job.id, 1)
    waited = squeeze("wait", job.id)
    assert waited.exit_code == 1
    assert "cancelled" in waited.stdout
    assert "\x1b" not in waited.output and "here" in waited.stderr


def test_plan_methods_and_files_print_tables_and_json(squeeze: Squeeze, tmp_path: Path) -> None:
    assert "gptq" in squeeze("methods").stdout
    assert {json.loads(line)["method"] for line in squeeze("methods", "--json").stdout.splitlines()} >= {"rtn", "gptq"}
    planned = squeeze("plan", str(tmp_path), "--method", "rtn", "--json")
    assert planned.exit_code == 0, planned.output
    assert json.loads(planned.stdout)["feasible"] is False
    assert "no" in squeeze("plan", str(tmp_path), "--method", "rtn").stdout
    text = tmp_path / "text.txt"
    text.write_text("words\n" * 100)
    file_id = squeeze("files", "upload", str(text)).stdout.strip()
    assert "text.txt" in squeeze("files", "list").stdout
    assert squeeze("files", "delete", file_id).exit_code == 0
    assert squeeze("files", "list", "--json").stdout == ""


def test_a_plan_says_how_long_and_on_what_that_rests(capsys: pytest.CaptureFixture[str]) -> None:
    seconds = Duration(
        low=3000, likely=4000, high=8000, fixed=100, per_block=48.75, stages={"compressing": 4000}, basis="from 12 jobs"
    )
    show.plan(Plan(feasible=True, obstacles=[], host_bytes=9 * 10**9, least_host_bytes=2 * 10**9, seconds=seconds))
    told = capsys.readouterr().out
    assert "about 1 h 06 min, between 50 min 00 s and 2 h 13 min" in told
    assert "49 s a block and 1 min 40 s beside" in told and "from 12 jobs" in told
    assert "2.0 GB of memory will do" in told


def test_a_bar_moves_on_a_terminal(service: Service, client: Client, tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "squeeze.cli", "--url", service.url, *QUANTIZE, "--wait"]
    with subprocess.Popen(command, stdout=theirs, stderr=theirs, env={**os.environ, "TERM": "xterm"}) as running:
        os.close(theirs)
        shown = bytearray()
        thread = threading.Thread(target=_read_all, args=(ours, shown))
        thread.start()
        job_id = _first_job(client)
        attempt = service.start(job_id)
        service.progress(job_id, attempt, Stage.compressing, 0.25)
        _until(lambda: b"compressing 1/4 blocks" in shown and b"about 9.0 s left" in shown)
        service.succeed(job_id, attempt, FILES, tmp_path)
        assert running.wait(PATIENCE_SECONDS) == 0
    thread.join(PATIENCE_SECONDS)
    os.close(ours)
    assert b"3.33 times smaller" in shown


def test_an_interrupted_wait_says_how_to_go_on_and_leaves_the_job_running(service: Service, client: Client) -> None:
    command = [sys.executable, "-m", "squeeze.cli", "--url", service.url, *QUANTIZE, "--wait"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        assert running.stderr is not None
        first = running.stderr.readline()  # a plain line: it waits
        job_id = _first_job(client)
        assert first == f"{job_id}  queued\n"
        running.send_signal(signal.SIGINT)
        _, told = running.communicate(timeout=PATIENCE_SECONDS)
    assert running.returncode == 130
    assert f"squeeze --url {service.url} wait {job_id}" in told
    assert f"squeeze --url {service.url} cancel {job_id}" in told
    assert client.jobs.get(job_id).status is Status.queued


def test_no_command_takes_a_key_where_other_users_could_read_it() -> None:
    for command in main.commands.values():
        assert not [one for one in command.params if "key" in str(one.name)]


def test_the_help_states_the_exit_codes() -> None:
    shown = CliRunner().invoke(main, ["--help"]).output
    assert "0 done; 1 the job failed" in shown and "130 interrupted" in shown


def _read_all(descriptor: int, into: bytearray) -> None:
    while True:
        try:
            chunk = os.read(descriptor, 4096)
        except OSError:  # how a pseudo-terminal says that the other side is closed
            return
        if not chunk:
            return
        into += chunk


def _first_job(client: Client) -> str:
    found: list[str] = []
    _until(lambda: bool(found.extend(job.id for job in client.jobs.list()) or found))
    return found[0]


def _until(holds: "object") -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not holds():  # type: ignore[operator]
        if time.monotonic() > deadline:
            pytest.fail("it did not come about in time")
        time.sleep(0.02)
