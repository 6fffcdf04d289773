"""Build the package as a release is built, and list what is in it."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

CHECKOUT = Path(__file__).parent.parent
# Any date; the two archives of a release carry that of its commit.
EPOCH = "1700000000"


def build(target: Path, kind: str) -> Path:
    """Build a "wheel" or "sdist" of a copy of the checkout below `target`; return its path."""
    source = target / "checkout"
    for folder in ("actionclip", "tests"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(CHECKOUT / folder, source / folder, ignore=ignored)
    for path in CHECKOUT.iterdir():
        if path.is_file():
            shutil.copy2(path, source)
    code = f"import setuptools.build_meta as b; b.build_{kind}({str(target)!r})"
    subprocess.run(
        [sys.executable, "-c", code],
        cwd=source,
        env={**os.environ, "SOURCE_DATE_EPOCH": EPOCH},
        check=True,
        capture_output=True,
        timeout=120,
    )
    (path,) = (path for path in target.iterdir() if path.is_file())
    return path


def sizes(archive: Path) -> dict[str, int]:
    """Return the files of a wheel or sdist with their sizes, without the folder of an sdist."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            return {entry.filename: entry.file_size for entry in wheel.infolist()}
    with tarfile.open(archive) as sdist:
        return {m.name.partition("/")[2]: m.size for m in sdist.getmembers() if m.isfile()}


def package_files() -> set[str]:
    """Return the files of the package in the checkout: its modules and its three data files."""
    package = CHECKOUT / "actionclip"
    modules = {path.relative_to(CHECKOUT).as_posix() for path in package.rglob("*.py")}
    data = ("py.typed", "bpe_merges.txt.gz", "tiny.safetensors")
    return modules | {f"actionclip/{name}" for name in data}
