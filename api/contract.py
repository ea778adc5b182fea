"""What the contract says besides the routes: the introduction, the groups, our problem in place of FastAPI's."""

import json
from typing import Any

from api.problems import example
from squeeze.errors import by_code
from squeeze.objects import Problem
from squeeze.specs.job_spec import JobSpec

DESCRIPTION = """\
Squeeze takes a language model from the Hub (or a directory, or an earlier job), makes it smaller, measures what was
lost, proves that the result loads, and hands it out with a report.

**A job from start to end**

1. `POST /v1/jobs` with a model and the steps to take; 202 answers the queued job.
2. Follow it: `GET /v1/jobs/{job_id}` now and then, or `GET /v1/jobs/{job_id}/events` as a stream.
3. When its `status` is `succeeded`: `GET /v1/jobs/{job_id}/report` says what was won and lost,
   `GET /v1/jobs/{job_id}/artifacts` lists the files, `GET /v1/jobs/{job_id}/archive` is all of them in one tar.

```
curl -s localhost:8000/v1/jobs -H 'Content-Type: application/json' -d '{
  "model": "HuggingFaceTB/SmolLM2-135M",
  "steps": [{"kind": "quantize", "method": "gptq", "bits": 4}]}'
curl -N -H 'Accept: text/event-stream' localhost:8000/v1/jobs/job-…/events
curl -s localhost:8000/v1/jobs/job-…/archive | tar x
```

**Keys.** `Authorization: Bearer sq-…`. A key belongs to a project and sees that project's jobs and files alone; what
belongs to another project does not exist for it (404). While no key exists, the service listens on loopback only and
needs none.

**Errors** are `application/problem+json` (RFC 9457). `error.code` is stable, `error.param` names the field in dots
(`steps.0.bits`), `detail` says what to do next. 429 and 503 carry `Retry-After`. Every answer carries `X-Request-Id`,
which the log of the service names too.

**Lists** are newest first: `{object: "list", data, has_more, first_id, last_id}`; ask on with `after` = `last_id`.
"""

TAGS: list[dict[str, Any]] = [
    {"name": "jobs", "description": "Submit work, follow it, stop it."},
    {
        "name": "artifacts",
        "description": "What a job made: files, archive, report. Downloads resume and can be checked.",
    },
    {"name": "files", "description": "Text of your own to calibrate and evaluate on."},
    {"name": "plan", "description": "What a job would need, before it runs."},
    {"name": "methods", "description": "What can be asked for."},
    {"name": "operation", "description": "For operators; no key needed."},
]


def describe(schema: dict[str, Any]) -> dict[str, Any]:
    """FastAPI's contract with our problem in place of its validation error, and the request id on every answer."""
    problem = Problem.model_json_schema(ref_template="#/components/schemas/{model}")
    spec = JobSpec.model_json_schema(ref_template="#/components/schemas/{model}")
    parts = schema["components"]["schemas"]
    for name, model in (("Problem", problem), ("JobSpec", spec)):
        parts.update(model.pop("$defs"))
        parts[name] = model
    for name in ("HTTPValidationError", "ValidationError"):
        parts.pop(name, None)
    shown = json.dumps(schema["paths"])
    schema["components"]["examples"] = {
        code: example(cls) for code, cls in sorted(by_code().items()) if f'"#/components/examples/{code}"' in shown
    }
    return schema
