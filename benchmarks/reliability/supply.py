"""Whether a release is what it should be, and what it stands on is sound."""

import datetime
import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import package_files

from benchmarks.reliability.figures import Figure

# Tests of all that touches a dependency.
TESTS = "tokenizer labels prompts annotations fuzz_text video classifier zeroshot weights check"


def measure(folder: Path, small: bool) -> Iterator[Figure]:
    wheels = [package_files.build(folder / name, "wheel") for name in ("first", "second")]
    digests = [hashlib.sha256(wheel.read_bytes()).hexdigest() for wheel in wheels]
    question = "two builds of the wheel have one sha256"
    yield Figure("B10", question, digests[0][:16], digests[0] == digests[1])
    yield contents(wheels[0])
    yield source_contents(package_files.build(folder / "sdist", "sdist"))
    yield installed(wheels[0], folder / "installed")
    listed = package_files.dependencies()
    requirements = {name: bound for name, bound in listed.items() if bound is not None}
    odd = [name for name in listed if name not in requirements]
    yield Figure(
        "B10",
        "run-time dependencies, at most 6, each with a lower bound alone",
        str(len(listed)),
        len(listed) <= 6 and not odd,
        f"not so: {', '.join(odd)}" if odd else "",
    )
    lowest = [f"{name}=={version}" for name, version in requirements.items()]
    newest = [f"{name}=={_public(importlib.metadata.version(name))}" for name in requirements]
    yield audit("lowest", lowest, folder)
    yield audit("installed", newest, folder)
    yield tests_on_lowest(requirements, folder / "lowest", "labels" if small else TESTS)


def contents(wheel: Path) -> Figure:
    sizes, odd = package_files.sizes(wheel), package_files.unexpected_in_wheel(wheel)
    model = sizes.get("actionclip/tiny.safetensors", 0)
    total = sum(sizes.values())
    return Figure(
        "B10",
        "the wheel holds the package alone, under 2 MB without `tiny`",
        f"{len(sizes)} files, {wheel.stat().st_size / 1e6:.2f} MB; unpacked "
        f"{(total - model) / 1e6:.2f} MB and {model / 1e6:.2f} MB of `tiny`",
        not odd and total - model < 2e6,
        f"not as expected: {sorted(odd)[:5]}" if odd else "",
    )


def source_contents(sdist: Path) -> Figure:
    odd = package_files.unexpected_in_sdist(sdist)
    return Figure(
        "B10",
        "the sdist holds the package alone, byte for byte",
        f"{len(package_files.sizes(sdist))} files, {sdist.stat().st_size / 1e6:.2f} MB",
        not odd,
        f"not as expected: {sorted(odd)[:5]}"
        if odd
        else "its sha256 differs from build to build, because setuptools writes the time into it",
    )


def installed(wheel: Path, target: Path) -> Figure:
    question = "the wheel alone, installed, scores with `tiny`"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    code = (
        f"import sys; sys.path.insert(0, {str(target)!r}); import actionclip, torch;"
        f"assert actionclip.__file__.startswith({str(target)!r});"
        "classify = actionclip.VideoClassifier(actionclip.load('tiny'), ['a red circle growing']);"
        "print(classify(torch.zeros(8, 3, 48, 48, dtype=torch.uint8)).top(1)[0][1])"
    )
    use = [sys.executable, "-I", "-c", code]
    for command in ([*install, "--target", str(target), str(wheel)], use):
        result = subprocess.run(command, capture_output=True, text=True, timeout=300)
        if result.returncode:
            return Figure("B10", question, "no", False, result.stderr.strip()[-300:])
    return Figure("B10", question, "yes", float(result.stdout) == 1.0)


def _public(version: str) -> str:
    return version.partition("+")[0]


def audit(which: str, requirements: list[str], folder: Path) -> Figure:
    question = f"known vulnerabilities of the {which} versions, without those SECURITY.md accepts"
    program = shutil.which("pip-audit")
    if program is None:
        return _not_audited(question, "pip-audit is not installed")
    path = folder / f"{which}.txt"
    path.write_text("\n".join(requirements))
    command = [program, "-r", str(path), "--no-deps", "--disable-pip", "-f", "json"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    try:
        answers = json.loads(result.stdout)["dependencies"]
    except ValueError:
        return _not_audited(question, result.stderr.strip()[-200:])
    for answer in answers:
        if "skip_reason" in answer:
            return _not_audited(question, answer["skip_reason"])
    accepted = accepted_until(datetime.date.today())
    found = [
        f"{answer['name']} {answer['version']}: {problem['id']}"
        for answer in answers
        for problem in answer["vulns"]
        if accepted.isdisjoint([problem["id"], *problem["aliases"]])
    ]
    return Figure("B10", question, str(len(found)), not found, "; ".join(found))


def _not_audited(question: str, reason: str) -> Figure:
    note = f"{reason}; SECURITY.md has what was looked up by hand, and when"
    return Figure("B10", question, "not audited", False, note)


def accepted_until(today: datetime.date) -> set[str]:
    """Return the vulnerabilities that SECURITY.md accepts, those whose date is past left out."""
    text = (package_files.CHECKOUT / "SECURITY.md").read_text("utf-8")
    rows = re.findall(r"^\| (CVE-\S+).*\| (\d{4}-\d\d-\d\d) \|$", text, re.MULTILINE)
    return {name for name, until in rows if today <= datetime.date.fromisoformat(until)}


def tests_on_lowest(bounds: dict[str, str], target: Path, tests: str) -> Figure:
    """Run tests with all dependencies but PyTorch at their lowest version, put before the others.

    PyTorch's lowest version comes for few platforms without gigabytes for CUDA.
    """
    others = [f"{name}=={version}" for name, version in bounds.items() if name != "torch"]
    torch = importlib.metadata.version("torch")
    question = f"tests pass with {', '.join(others)} and torch {torch}"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--only-binary=:all:"]
    command = [*pip, "--target", str(target), *others]
    install = subprocess.run(command, capture_output=True, text=True, timeout=600)
    if install.returncode:
        return Figure("B10", question, "not run", False, install.stderr.strip()[-300:])
    files = [f"tests/test_{name}.py" for name in tests.split()]
    # The peer has lower bounds of its own.
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    pytest += ["-k", "not transformers"]
    result = subprocess.run(
        [*pytest, *files],
        capture_output=True,
        text=True,
        timeout=1200,
        cwd=package_files.CHECKOUT,
        env={**os.environ, "PYTHONPATH": str(target), "OMP_NUM_THREADS": "1"},
    )
    lines = result.stdout.strip().splitlines()
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    summary = lines[-1] if lines else result.stderr[-300:]
    return Figure("B10", question, summary, result.returncode == 0, "; ".join(failed)[:300])
