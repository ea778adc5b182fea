"""Every error that Squeeze knows, one class per stable code.

    SqueezeError
    ├── RequestRefused            the request as sent can't be served
    │   ├── SpecInvalid           a field is missing, unknown or out of range
    │   ├── FormatUnfit           a format can't hold what the steps make
    │   ├── BodyInvalid           the body is not JSON, or not the form that the route takes
    │   ├── BodyTooLarge
    │   ├── CursorInvalid
    │   ├── RangeUnsatisfiable
    │   ├── IdempotencyMismatch   the same key came with another body
    │   ├── Unauthenticated
    │   ├── RateExceeded
    │   ├── NotFound
    │   │   ├── JobNotFound
    │   │   ├── FileNotFound
    │   │   ├── ArtifactNotFound
    │   │   ├── ReportNotReady
    │   │   └── RouteNotFound
    │   ├── MethodNotAllowed
    │   └── Conflict
    │       ├── JobFinal          the job has ended, nothing is left to cancel
    │       ├── JobNotFinal       the job still runs
    │       ├── JobNotRetryable   a job that succeeded can't be tried again
    │       ├── FileInUse
    │       └── MoveIllegal       a change of status that the life of a job does not know
    ├── ServiceFault              the service can't answer now
    │   ├── ServiceUnavailable
    │   ├── StorageUnavailable
    │   ├── ConnectionFailed      (client) no answer came at all
    │   ├── DownloadCorrupt       (client) what arrived is not what the service announced
    │   └── InternalError
    └── JobFailure                what can end a job; stands in the job's `error`
        ├── ModelNotFound
        ├── ModelGated
        ├── ModelUnsafe           pickled weights, code of its own
        ├── ModelMalformed        config, weights or tokenizer missing or broken
        ├── ModelAlreadyCompressed
        ├── ModelDirectoryForbidden
        ├── HubUnavailable
        ├── ArchitectureUnsupported
        ├── GroupSizeIndivisible
        ├── DataUnusable          calibration or evaluation text missing, empty or too short
        ├── NotFinite             NaN or infinity in weights or activations
        ├── FactorisationFailed
        ├── DiskFull
        ├── OutOfMemoryHost
        ├── OutOfMemoryGPU
        ├── ProcessKilled
        ├── RuntimeExceeded
        ├── WorkerLost
        ├── CertificationFailed
        ├── UploadFailed
        ├── AttemptStale          another attempt owns the job now
        └── CompressionBug        an error that we did not foresee

`retryable` says whether the same job may well succeed when it is tried again unchanged. The message says what was
wrong and what to do next; `param` names the field of the request, in dots (`steps.0.bits`).
"""

from collections.abc import Iterator
from typing import ClassVar


class SqueezeError(Exception):
    """Base of all; carries what `application/problem+json` and a job's `error` show."""

    code: ClassVar[str] = "error"
    title: ClassVar[str] = "Something went wrong"
    retryable: ClassVar[bool] = False

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param

    def __reduce__(self) -> tuple[object, ...]:
        return (rebuild, (self.code, self.message, self.param))


class RequestRefused(SqueezeError):
    code = "request_refused"
    title = "The request can't be served"


class SpecInvalid(RequestRefused):
    code = "spec_invalid"
    title = "The job description is not valid"


class FormatUnfit(RequestRefused):
    code = "format_unfit"
    title = "The format can't hold what the steps make"


class BodyInvalid(RequestRefused):
    code = "body_invalid"
    title = "The request body can't be read"


class BodyTooLarge(RequestRefused):
    code = "body_too_large"
    title = "The request body is too large"


class CursorInvalid(RequestRefused):
    code = "cursor_invalid"
    title = "The cursor is not one of this list"


class RangeUnsatisfiable(RequestRefused):
    code = "range_unsatisfiable"
    title = "The range lies outside the file"


class IdempotencyMismatch(RequestRefused):
    code = "idempotency_mismatch"
    title = "This Idempotency-Key was used with another body"


class Unauthenticated(RequestRefused):
    code = "unauthenticated"
    title = "A valid API key is needed"


class RateExceeded(RequestRefused):
    code = "rate_exceeded"
    title = "Too many requests"
    retryable = True


class NotFound(RequestRefused):
    code = "not_found"
    title = "Not found"


class JobNotFound(NotFound):
    code = "job_not_found"
    title = "No such job"


class FileNotFound(NotFound):
    code = "file_not_found"
    title = "No such file"


class ArtifactNotFound(NotFound):
    code = "artifact_not_found"
    title = "No such artifact"


class ReportNotReady(NotFound):
    code = "report_not_ready"
    title = "The job has no report yet"


class RouteNotFound(NotFound):
    code = "route_not_found"
    title = "No such route"


class MethodNotAllowed(RequestRefused):
    code = "method_not_allowed"
    title = "The route does not take this HTTP method"


class Conflict(RequestRefused):
    code = "conflict"
    title = "The request does not fit the present state"


class JobFinal(Conflict):
    code = "job_final"
    title = "The job has already ended"


class JobNotFinal(Conflict):
    code = "job_not_final"
    title = "The job has not ended yet"


class JobNotRetryable(Conflict):
    code = "job_not_retryable"
    title = "The job can't be tried again"


class FileInUse(Conflict):
    code = "file_in_use"
    title = "A job still needs the file"


class MoveIllegal(Conflict):
    code = "move_illegal"
    title = "The job can't move to that status"


class ServiceFault(SqueezeError):
    code = "service_fault"
    title = "The service can't answer"
    retryable = True


class ServiceUnavailable(ServiceFault):
    code = "service_unavailable"
    title = "A part of the service is not reachable"


class StorageUnavailable(ServiceFault):
    code = "storage_unavailable"
    title = "The object storage is not reachable"


class ConnectionFailed(ServiceFault):
    code = "connection_failed"
    title = "The service did not answer"


class DownloadCorrupt(ServiceFault):
    code = "download_corrupt"
    title = "The download is not what was announced"


class InternalError(ServiceFault):
    code = "internal_error"
    title = "The service made an error"


class JobFailure(SqueezeError):
    code = "job_failure"
    title = "The job failed"


class ModelNotFound(JobFailure):
    code = "model_not_found"
    title = "No such model"


class ModelGated(JobFailure):
    code = "model_gated"
    title = "The model is gated"


class ModelUnsafe(JobFailure):
    code = "model_unsafe"
    title = "The model needs code or pickles to load"


class ModelMalformed(JobFailure):
    code = "model_malformed"
    title = "The model's files are broken"


class ModelAlreadyCompressed(JobFailure):
    code = "model_already_compressed"
    title = "The model is already quantized"


class ModelDirectoryForbidden(JobFailure):
    code = "model_directory_forbidden"
    title = "The directory is not under an allowed root"


class HubUnavailable(JobFailure):
    code = "hub_unavailable"
    title = "The Hub did not answer"
    retryable = True


class ArchitectureUnsupported(JobFailure):
    code = "architecture_unsupported"
    title = "The model's architecture is not supported"


class GroupSizeIndivisible(JobFailure):
    code = "group_size_indivisible"
    title = "The group size doesn't divide a layer's inputs"


class DataUnusable(JobFailure):
    code = "data_unusable"
    title = "The text can't be used"


class VocabulariesDiffer(JobFailure):
    code = "vocabularies_differ"
    title = "Teacher and student don't share a vocabulary"


class NotFinite(JobFailure):
    code = "not_finite"
    title = "NaN or infinity in the model"


class FactorisationFailed(JobFailure):
    code = "factorisation_failed"
    title = "A layer's statistics can't be factorised"


class DiskFull(JobFailure):
    code = "disk_full"
    title = "No space left on disk"


class OutOfMemoryHost(JobFailure):
    code = "out_of_memory_host"
    title = "The host ran out of memory"


class OutOfMemoryGPU(JobFailure):
    code = "out_of_memory_gpu"
    title = "The GPU ran out of memory"


class ProcessKilled(JobFailure):
    code = "process_killed"
    title = "The job's process was killed"
    retryable = True


class RuntimeExceeded(JobFailure):
    code = "runtime_exceeded"
    title = "The job ran longer than its limit"


class WorkerLost(JobFailure):
    code = "worker_lost"
    title = "The worker disappeared"
    retryable = True


class CertificationFailed(JobFailure):
    code = "certification_failed"
    title = "The result does not load as measured"


class UploadFailed(JobFailure):
    code = "upload_failed"
    title = "The result could not be stored"
    retryable = True


class AttemptStale(JobFailure):
    code = "attempt_stale"
    title = "Another attempt owns the job"


class CompressionBug(JobFailure):
    code = "compression_bug"
    title = "An unforeseen error in the job"


def _tree(root: type[SqueezeError]) -> Iterator[type[SqueezeError]]:
    yield root
    for child in root.__subclasses__():
        yield from _tree(child)


def by_code() -> dict[str, type[SqueezeError]]:
    """Every class of the tree under its code."""
    return {cls.code: cls for cls in _tree(SqueezeError)}


def rebuild(code: str, message: str, param: str | None = None) -> SqueezeError:
    """The error that a code stands for; an unknown code (a newer server's) becomes the base class."""
    return by_code().get(code, SqueezeError)(message, param=param)
