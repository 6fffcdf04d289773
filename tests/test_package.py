"""What a release holds: the package and nothing else, the same bytes whoever builds it."""

import ast
import hashlib
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import package_files
import pytest

from actionclip import __version__, published

if sys.version_info >= (3, 11):
    import tomllib


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    return package_files.build(tmp_path_factory.mktemp("wheel"), "wheel")


def test_the_wheel_holds_the_package_alone(wheel):
    assert package_files.unexpected_in_wheel(wheel) == set()
    sizes = package_files.sizes(wheel)
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
    assert package_files.unexpected_in_sdist(sdist) == set()


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
    listed = project["project"]["dependencies"]
    assert len(listed) <= 6
    assert [f"{name}>={bound}" for name, bound in package_files.dependencies().items()] == listed


@pytest.mark.parametrize("line", ["odd", "odd<2", "odd>=1,<2", "odd>=1; python_version<'3.11'"])
def test_a_dependency_without_a_mere_lower_bound_is_seen(tmp_path, monkeypatch, line):
    text = f'dependencies = [\n  "av>=14.0",\n  "{line}",\n]\n'
    (tmp_path / "pyproject.toml").write_text(text)
    monkeypatch.setattr(package_files, "CHECKOUT", tmp_path)
    assert package_files.dependencies() == {"av": "14.0", line: None}


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
