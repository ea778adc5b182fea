"""What finished jobs took, as both databases tell it."""

from typing import Any

from sqlalchemy.orm import Session

from jobs import history, lifecycle
from jobs.database import Database
from jobs.records import now
from squeeze.costs.pace import Past
from tests.jobs.making import RESULT, USAGE, claim, expire, submit

SPENT = {"seconds": {"compressing": 12.5, "certifying": 6.0}, "work": {"compressing": 1e12, "certifying": 6e11}}


def _finish(session: Session, method: str, device: str, spent: dict[str, Any], **fields: Any) -> None:
    step = {"kind": "quantize", "method": method}
    record = submit(session, steps=[step], **fields)
    report = {"device": device, "spent": spent, "recipe": [step], "blocks": []}
    attempt = claim(session, record.id).attempt
    assert lifecycle.publish(session, record.id, attempt, artifacts=[], result=RESULT, report=report, usage=USAGE)


def test_the_latest_jobs_of_the_method_come_first_whoever_they_belong_to(database: Database) -> None:
    with database.write() as session:
        _finish(session, "gptq", "CPU, 2 threads", SPENT)
        _finish(session, "rtn", "CPU, 2 threads", SPENT)
        _finish(session, "gptq", "NVIDIA H200", SPENT, project="theirs")
        submit(session)
        found = history.finished(session, "gptq")
        assert [one.device for one in found] == ["NVIDIA H200", "CPU, 2 threads"]
        assert found[0] == Past("gptq", "NVIDIA H200", SPENT["seconds"], SPENT["work"])
        assert [one.device for one in history.finished(session, "gptq", gpu=False)] == ["CPU, 2 threads"]
        assert [one.method for one in history.finished(session, "awq", gpu=False)] == ["rtn", "gptq"]


def test_a_job_of_several_steps_is_one_of_its_last(database: Database) -> None:
    lora = {"kind": "finetune", "method": "lora", "merge": True}
    with database.write() as session:
        for steps in ([lora], [lora, {"kind": "quantize", "method": "gptq"}]):
            record = submit(session, steps=steps, data={"source": "hub:org/texts"})
            report = {"device": "cpu", "spent": SPENT, "recipe": steps}
            attempt = claim(session, record.id).attempt
            assert lifecycle.publish(
                session, record.id, attempt, artifacts=[], result=RESULT, report=report, usage=USAGE
            )
        assert [one.method for one in history.finished(session, "lora")] == ["gptq", "lora"]


def test_reports_without_counted_work_and_resumed_jobs_tell_nothing(database: Database) -> None:
    with database.write() as session:
        _finish(session, "gptq", "cpu", {"seconds": {"compressing": 12.5}})
        record = submit(session, steps=[{"kind": "quantize", "method": "gptq"}])
        claim(session, record.id)
        expire(session, record)
        lifecycle.sweep(session, now=now(), max_attempts=3)
        attempt = claim(session, record.id).attempt
        report = {"device": "cpu", "spent": SPENT, "recipe": [{"kind": "quantize", "method": "gptq"}]}
        lifecycle.publish(session, record.id, attempt, artifacts=[], result=RESULT, report=report, usage=USAGE)
        assert history.finished(session, "gptq") == []
