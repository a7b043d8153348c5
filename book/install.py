"""Make `.venv` and install the project into it, saying which step failed and what to do about it.

Runs on a bare Python: standard library only. `make` calls it when pyproject.toml or constraints.txt has changed.
"""

import pathlib
import subprocess
import sys
import venv

ROOT = pathlib.Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
NEEDED = (3, 11)


def main() -> int:
    """Run the steps; return the exit status."""
    if sys.version_info < NEEDED:
        return failed(
            f"this is Python {sys.version.split()[0]}; the book is built with {NEEDED[0]}.{NEEDED[1]} or later",
            f"install one and name it: make PYTHON=python{NEEDED[0]}.{NEEDED[1]} ...",
        )
    python = VENV / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    if not python.exists():
        print("install: making .venv", flush=True)
        try:
            venv.create(VENV, with_pip=True)
        except (OSError, subprocess.CalledProcessError) as error:
            return failed(f".venv could not be made ({error})", "on Debian and Ubuntu: apt-get install python3-venv")
    print("install: installing gradprune and its tools into .venv (minutes, the first time)", flush=True)
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    done = subprocess.run([*pip, "-c", "constraints.txt", "-e", ".[book,test]"], cwd=ROOT, check=False)
    if done.returncode:
        return failed(
            "pip could not install what constraints.txt names; its message is above",
            "no network? it needs one this once. A half-made .venv? `make clean-all`, then again",
        )
    (VENV / ".installed").touch()
    return 0


def failed(what: str, remedy: str) -> int:
    """Say which step failed and what to do."""
    print(f"\ninstall failed: {what}.\nWhat to do: {remedy}.", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
