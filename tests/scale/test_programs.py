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


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_keeps_its_zeros_in_two_processes(name, tmp_path):
    (tmp_path / f"{name}.py").write_text(PROGRAMS[name], encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", f"{name}.py"]
    env = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "default"}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=150, check=False)
    assert done.returncode == 0, done.stderr
    wanted = round(0.9 * 64 * 256) + round(0.9 * 256 * 10)
    assert re.findall(r"(\d+) weights are zero", done.stdout) == [str(wanted)] * (1 if name == "sharded" else 2)
