"""Do the programs of chapter 9 do under torchrun, as they are printed, what the page says of them?"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "chapters" / "09_more_than_one_machine.ipynb"
TEXT = "\n".join("".join(cell["source"]) for cell in json.loads(PAGE.read_text(encoding="utf-8"))["cells"])
PROGRAMS = dict(zip(("sharded", "averaged"), re.findall(r"^```python\n(.*?)^```", TEXT, re.M | re.S), strict=True))


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """Both programs at once, as most of their time is that of starting."""
    folder, running = tmp_path_factory.mktemp("programs"), {}
    env = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "default"}
    for name, text in PROGRAMS.items():
        (folder / f"{name}.py").write_text(text, encoding="utf-8")
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", f"{name}.py"]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        running[name] = subprocess.Popen(command, cwd=folder, env=env, **pipes)
    yield running
    for program in running.values():
        program.kill()
        program.wait()


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_keeps_its_zeros_in_two_processes(name, started):
    printed, errors = started[name].communicate(timeout=150)
    assert started[name].returncode == 0, errors
    wanted = round(0.9 * 64 * 256) + round(0.9 * 256 * 10)
    assert re.findall(r"(\d+) weights are zero", printed) == [str(wanted)] * (1 if name == "sharded" else 2)
