"""Build the package as a release is built, and list what is in it."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

from actionclip import __version__

CHECKOUT = Path(__file__).parent.parent
# Any date; the two archives of a release carry that of its commit.
EPOCH = "1700000000"
# What a wheel has beside the package.
METADATA = {
    f"actionclip-{__version__}.dist-info/{name}"
    for name in (
        "METADATA",
        "RECORD",
        "WHEEL",
        "entry_points.txt",
        "licenses/LICENSE",
        "licenses/NOTICE",
        "top_level.txt",
    )
}


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


def unexpected_in_wheel(wheel: Path) -> set[str]:
    """Return what is missing from a wheel, or too much; `METADATA` is part of it."""
    return set(sizes(wheel)) ^ (package_files() | METADATA)


def unexpected_in_sdist(sdist: Path) -> set[str]:
    """Return what is missing from an sdist, too much, or not as in the checkout.

    Its sha256 tells less, as the times in it are those of the build.
    """
    around = {"LICENSE", "NOTICE", "README.md", "MANIFEST.in", "PKG-INFO", "pyproject.toml"}
    files = {name for name in sizes(sdist) if not name.startswith("actionclip.egg-info/")}
    changed = set()
    with tarfile.open(sdist) as archive:
        for member in archive.getmembers():
            name = member.name.partition("/")[2]
            if name in package_files():
                content = archive.extractfile(member)
                if content is None or content.read() != (CHECKOUT / name).read_bytes():
                    changed.add(name)
    return files ^ (package_files() | around | {"setup.cfg"}) | changed


def dependencies() -> dict[str, str | None]:
    """Return the run-time dependencies with their lower bounds; None for what is not just that."""
    text = (CHECKOUT / "pyproject.toml").read_text("utf-8")
    listed = re.search(r"^dependencies = \[(.*?)^\]", text, re.DOTALL | re.MULTILINE)
    assert listed is not None
    return dict(
        found.groups() if (found := re.fullmatch(r"([\w-]+)>=([\d.]+)", line)) else (line, None)
        for line in re.findall(r'"([^"]*)"', listed[1])
    )


def package_files() -> set[str]:
    """Return the files of the package in the checkout: its modules and its three data files."""
    package = CHECKOUT / "actionclip"
    modules = {path.relative_to(CHECKOUT).as_posix() for path in package.rglob("*.py")}
    data = ("py.typed", "bpe_merges.txt.gz", "tiny.safetensors")
    return modules | {f"actionclip/{name}" for name in data}
