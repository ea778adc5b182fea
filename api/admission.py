"""Which directories of this machine a job may take its model from."""

from pathlib import Path

from squeeze.errors import ModelDirectoryForbidden, ModelNotFound


def directory_of(model: str, roots: tuple[Path, ...], param: str = "model", *, adapter: bool = False) -> Path | None:
    """The directory that `model` names, links followed; None where it names something else.

    adapter: whether it may be an adapter's. Raises ModelDirectoryForbidden for whatever lies outside of the allowed
    roots, whether it exists or not.
    """
    if not model.startswith("/"):
        return None
    directory = Path(model).resolve()
    if not any(directory.is_relative_to(root.resolve()) for root in roots):
        allowed = ", ".join(str(root) for root in roots) or "none; the operator sets SQUEEZE_MODEL_ROOTS"
        raise ModelDirectoryForbidden(f"{model} is not under an allowed root (allowed: {allowed}).", param=param)
    names = ("config.json", "adapter_config.json") if adapter else ("config.json",)
    if not any((directory / name).is_file() for name in names):
        raise ModelNotFound(f"{model} is no model directory: it holds no config.json.", param=param)
    return directory
