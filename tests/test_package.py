"""What a release holds: the package and nothing else, the same bytes whoever builds it."""

import ast
import hashlib
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import package_files
import pytest

from actionclip import __version__, published

if sys.version_info >= (3, 11):
    import tomllib

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


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    return package_files.build(tmp_path_factory.mktemp("wheel"), "wheel")


def test_the_wheel_holds_the_package_alone(wheel):
    sizes = package_files.sizes(wheel)
    assert set(sizes) == package_files.package_files() | METADATA
    # Without the demonstration model, the one weight file in it.
    assert sum(sizes.values()) - sizes["actionclip/tiny.safetensors"] < 2_000_000
    assert sizes["actionclip/tiny.safetensors"] < 3_000_000
    assert wheel.stat().st_size < 3_000_000


def test_a_second_wheel_is_equal(wheel, tmp_path):
    again = package_files.build(tmp_path, "wheel")
    assert again.name == wheel.name
    digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in (wheel, again)]
    assert digests[0] == digests[1]


def test_the_sdist_holds_the_package_alone(tmp_path):
    sdist = package_files.build(tmp_path, "sdist")
    files = set(package_files.sizes(sdist))
    extra = {name for name in files if not name.startswith("actionclip.egg-info/")}
    around = {"LICENSE", "NOTICE", "README.md", "MANIFEST.in", "PKG-INFO"}
    assert extra == package_files.package_files() | around | {"pyproject.toml", "setup.cfg"}
    # Times in it are those of the build; its files are those of the checkout.
    with tarfile.open(sdist) as archive:
        for name in package_files.package_files():
            member = archive.extractfile(f"actionclip-{__version__}/{name}")
            assert member is not None
            assert member.read() == (package_files.CHECKOUT / name).read_bytes(), name


def test_the_wheel_works_where_it_is_installed(wheel, tmp_path):
    # A wheel of pure Python is installed by unpacking it.
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    # -I: neither the current folder nor the environment can bring in the checkout.
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r});"
        "from actionclip import __file__, __main__; print(__file__);"
        "sys.exit(__main__.main(['zeroshot', '--version']))"
    )
    command = [sys.executable, "-I", "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    expected = [str(tmp_path / "actionclip" / "__init__.py"), f"actionclip {__version__}"]
    assert result.stdout.splitlines() == expected


def test_every_module_is_python_of_the_oldest_version():
    for path in (package_files.CHECKOUT / "actionclip").rglob("*.py"):
        ast.parse(path.read_text("utf-8"), str(path), feature_version=(3, 10))


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib came with Python 3.11")
def test_six_dependencies_each_with_a_lower_bound_only():
    project = tomllib.loads((package_files.CHECKOUT / "pyproject.toml").read_text("utf-8"))
    dependencies = project["project"]["dependencies"]
    assert len(dependencies) <= 6
    assert all(re.fullmatch(r"[a-z]+>=[\d.]+", text) for text in dependencies)


def test_the_table_of_weights_is_pinned():
    models = list(published.MODELS.values())
    assert len(models) > 20
    for model in models:
        assert model.url.startswith("https://")
        # Hugging Face states the checksums of its files, see published.py.
        if "huggingface.co" not in model.url:
            assert re.fullmatch(r"[0-9a-f]{64}", model.sha256 or ""), model.url
    assert len({model.url for model in models}) == len(models)
    digests = [model.sha256 for model in models if model.sha256]
    assert len(set(digests)) == len(digests)


def test_the_security_policy_names_this_version():
    policy = (package_files.CHECKOUT / "SECURITY.md").read_text("utf-8")
    assert f"{'.'.join(__version__.split('.')[:2])}.x" in policy
