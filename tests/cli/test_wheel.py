"""What `pip install squeeze-llm` brings."""

import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_wheel_holds_the_squeeze_package_alone_and_runs_on_its_four_dependencies(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = next(archive.read(name).decode() for name in names if name.endswith("METADATA"))
        archive.extractall(tmp_path / "site")
    assert {name.split("/")[0] for name in names} == {"squeeze", "squeeze_llm-0.1.0.dist-info"}
    assert {name.removeprefix("squeeze/") for name in names} >= {"client.py", "cli/main.py", "py.typed"}
    needed = {line.split()[1].split(">")[0] for line in metadata.splitlines() if _is_needed_always(line)}
    assert needed == {"pydantic", "httpx", "click", "rich"}
    program = (
        "import sys; sys.path.insert(0, sys.argv[1]); import squeeze.cli, squeeze.client\n"
        "assert squeeze.cli.__file__.startswith(sys.argv[1])\n"
        "foreign = {'torch', 'fastapi', 'sqlalchemy', 'celery', 'api', 'jobs', 'models', 'storage', 'workers'}\n"
        "assert not foreign & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "site")], cwd=tmp_path, check=True)


def _is_needed_always(line: str) -> bool:
    return line.startswith("Requires-Dist:") and "extra ==" not in line
