"""What the contract shows: one job's whole life, as requests and answers."""

from typing import Any

from fastapi.openapi.models import Example

JOB_ID = "job-01kakq3v5e8f9z2m4x6c7b1n0p"
FILE_ID = "file-01kakq2t7w3r5y8u1i4q6a9s0d"
SHA256 = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"

SPECS: dict[str, Example] = {
    "smallest": {
        "summary": "The least that can be asked",
        "value": {"model": "HuggingFaceTB/SmolLM2-135M", "steps": [{"kind": "quantize", "method": "rtn", "bits": 8}]},
    },
    "gptq": {
        "summary": "GPTQ at 4 bits on text of your own, in two formats",
        "value": {
            "model": "HuggingFaceTB/SmolLM2-135M@main",
            "steps": [{"kind": "quantize", "method": "gptq", "bits": 4, "group_size": 128}],
            "data": {"source": FILE_ID, "samples": 256, "sequence_length": 2048},
            "evaluation": {"perplexity": True, "divergence": True},
            "formats": ["compressed-tensors", "gptq"],
            "limits": {"max_runtime_seconds": 86400, "gpus": 1},
            "metadata": {"team": "search"},
        },
    },
}

JOB: dict[str, Any] = {
    "id": JOB_ID,
    "object": "job",
    "status": "queued",
    "stage": None,
    "progress": {"fraction": 0.0, "done": None, "total": None, "unit": None, "eta_seconds": None},
    "attempt": 0,
    "created_at": "2026-11-21T09:30:00.120000Z",
    "started_at": None,
    "finished_at": None,
    "model": "HuggingFaceTB/SmolLM2-135M",
    "model_revision": None,
    "steps": [
        {
            "kind": "quantize",
            "bits": 4,
            "group_size": 128,
            "symmetric": True,
            "ignore": [],
            "method": "gptq",
            "activation_order": True,
            "damping": 0.01,
        }
    ],
    "data": {"source": None, "samples": 128, "sequence_length": 2048},
    "evaluation": {"perplexity": True, "divergence": True, "source": None, "samples": 32, "stride": None},
    "formats": ["compressed-tensors"],
    "limits": {"max_runtime_seconds": 86400, "gpus": 0},
    "seed": 0,
    "priority": 0,
    "metadata": {"team": "search"},
    "error": None,
    "result": None,
    "usage": None,
}

JOB_DONE: dict[str, Any] = {
    **JOB,
    "status": "succeeded",
    "stage": "uploading",
    "progress": {"fraction": 1.0, "done": None, "total": None, "unit": None, "eta_seconds": None},
    "attempt": 1,
    "started_at": "2026-11-21T09:30:00.190000Z",
    "finished_at": "2026-11-21T09:38:12.480000Z",
    "model_revision": "93efa2f097d58c2a74874c7e644dbc9b0cee75a2",
    "result": {
        "source_bytes": 269060552,
        "result_bytes": {"compressed-tensors": 115343360},
        "compression_ratio": 2.33,
        "bits_per_weight": 4.16,
        "perplexity_before": 17.42,
        "perplexity_after": 18.31,
        "divergence_nats": 0.052,
        "top1_agreement": 0.901,
        "certified": {"compressed-tensors": {"transformers": "passed", "vllm": "not checked"}},
    },
    "usage": {
        "gpu_seconds": 470.2,
        "cpu_seconds": 512.9,
        "peak_gpu_bytes": 2147483648,
        "peak_host_bytes": 1610612736,
        "energy_wh": None,
    },
}

JOBS: dict[str, Any] = {
    "object": "list",
    "data": [JOB],
    "has_more": False,
    "first_id": JOB_ID,
    "last_id": JOB_ID,
}

EVENTS: dict[str, Any] = {
    "object": "list",
    "data": [
        {
            "id": 1,
            "object": "event",
            "job_id": JOB_ID,
            "attempt": 0,
            "created_at": "2026-11-21T09:30:00.120000Z",
            "type": "status",
            "message": "queued",
            "data": {"status": "queued"},
        }
    ],
    "has_more": True,
    "first_id": "1",
    "last_id": "1",
}

EVENT_STREAM = """id: 1
event: status
data: {"id":1,"object":"event","type":"status","message":"queued","data":{"status":"queued"}}

: keep-alive

id: 2
event: status
data: {"id":2,"object":"event","type":"status","message":"attempt 1 started","data":{"status":"running"}}

"""

ARTIFACT: dict[str, Any] = {
    "object": "artifact",
    "filename": "compressed-tensors/model.safetensors",
    "bytes": 115343360,
    "sha256": SHA256,
    "format": "compressed-tensors",
    "download_url": f"/v1/jobs/{JOB_ID}/artifacts/compressed-tensors/model.safetensors",
}

ARTIFACTS: dict[str, Any] = {
    "object": "list",
    "data": [ARTIFACT],
    "has_more": False,
    "first_id": "compressed-tensors/model.safetensors",
    "last_id": "compressed-tensors/model.safetensors",
}

FILE: dict[str, Any] = {
    "id": FILE_ID,
    "object": "file",
    "filename": "support-tickets.jsonl",
    "bytes": 1843200,
    "sha256": SHA256,
    "purpose": "calibration",
    "created_at": "2026-11-21T09:28:10.010000Z",
}

FILES: dict[str, Any] = {
    "object": "list",
    "data": [FILE],
    "has_more": False,
    "first_id": FILE_ID,
    "last_id": FILE_ID,
}

PLAN: dict[str, Any] = {
    "object": "plan",
    "feasible": False,
    "obstacles": [
        {
            "code": "group_size_indivisible",
            "message": "group_size=128 does not divide the 576 inputs of model.layers.0.self_attn.q_proj.",
            "param": "steps.0.group_size",
        }
    ],
    "model_revision": "93efa2f097d58c2a74874c7e644dbc9b0cee75a2",
    "parameters": 134515008,
    "source_bytes": 269060552,
    "result_bytes": {"compressed-tensors": 113000000},
    "host_bytes": 1490000000,
    "least_host_bytes": 980000000,
    "seconds": {
        "low": 61.2,
        "likely": 80.4,
        "high": 112.9,
        "fixed": 21.9,
        "per_block": 1.95,
        "stages": {"loading": 2.1, "compressing": 57.1, "evaluating": 9.2, "exporting": 0.9, "certifying": 11.1},
        "basis": "from 12 jobs of gptq on this service's NVIDIA H200",
    },
    "disk_bytes": 500000000,
}
