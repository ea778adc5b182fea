"""Which directories of this machine a job may take its model from."""

from pathlib import Path

from squeeze.errors import ModelDirectoryForbidden, ModelNotFound


def directory_of(model: str, roots: tuple[Path, ...], param: str = "model") -> Path | None:
    """The directory that `model` names, links followed; None where it names something else.

    Raises ModelDirectoryForbidden for whatever lies outside of the allowed roots, whether it exists or not.
    """
    if not model.startswith("/"):
        return None
    directory = Path(model).resolve()
    if not any(directory.is_relative_to(root.resolve()) for root in roots):
        allowed = ", ".join(str(root) for root in roots) or "none; the operator sets SQUEEZE_MODEL_ROOTS"
        raise ModelDirectoryForbidden(f"{model} is not under an allowed root (allowed: {allowed}).", param=param)
    if not (directory / "config.json").is_file():
        raise ModelNotFound(f"{model} is no model directory: it holds no config.json.", param=param)
    return directory
