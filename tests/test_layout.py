"""The shape of the package: which module may know which, and who may print."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "actionclip"

# A module imports only from levels below its own.
LEVELS = [
    ["errors", "packet_index"],
    [
        "ahead",
        "averaging",
        "complexity",
        "distributed",
        "download",
        "fused_loss",
        "isolation",
        "metrics",
        "precision",
        "prompts",
        "randaugment",
        "sampling",
        "similarity",
        "synthetic",
        "tensor_files",
        "tokenizer",
        "torchscript",
        "transforms",
        "video",
        "models.layers",
        "models.resnet",
    ],
    ["augment", "reading", "labels", "losses", "mixing", "models.clip", "models.temporal"],
    ["annotations", "models.base"],
    ["models.actionclip", "models.xclip"],
    ["conversion", "distillation", "inference", "published", "recipe"],
    ["prompt_encoding"],
    ["text_cache"],
    ["classifier", "dataset", "ensembling", "weights"],
    ["evaluate", "runs"],
    ["train"],
    ["cli.command", "cli.console"],
    ["cli.building", "cli.data_options", "cli.options", "cli.plots", "cli.report"],
    ["cli.journal", "cli.watchdog"],
    ["cli.check", "cli.env", "cli.eval", "cli.synthetic", "cli.train", "cli.zeroshot"],
]
# `tensor_files` hands TorchScript archives to their own reader.
WITHIN_A_LEVEL = {("tensor_files", "torchscript")}
LEVEL = {module: level for level, modules in enumerate(LEVELS) for module in modules}
# The package root re-exports, so it may know all; the commands take the version from it.
EVERY = sorted(
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts) for path in PACKAGE.rglob("*.py")
)
MODULES = [name for name in EVERY if not name.endswith(("__init__", "__main__"))]


def parse(module: str) -> ast.Module:
    return ast.parse((PACKAGE / f"{module.replace('.', '/')}.py").read_text())


def imports(module: str) -> list[str]:
    """Return the package's modules that one of them imports, relative to the package."""
    found = []
    for node in ast.walk(parse(module)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found += [n if n.removeprefix("actionclip.") in LEVEL else node.module for n in names]
    return [name.removeprefix("actionclip.") for name in found if name.startswith("actionclip")]


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module: str) -> None:
    assert module in LEVEL, f"give {module} a level"
    for name in imports(module):
        if name == "actionclip" and module.startswith("cli."):
            continue  # __version__
        assert name in LEVEL, f"{module} imports {name}: import the module that defines a name"
        allowed = LEVEL[name] < LEVEL[module] or (module, name) in WITHIN_A_LEVEL
        assert allowed, f"{module} (level {LEVEL[module]}) imports {name} (level {LEVEL[name]})"


def calls(module: str) -> set[str]:
    return {ast.unparse(n.func) for n in ast.walk(parse(module)) if isinstance(n, ast.Call)}


@pytest.mark.parametrize("module", [m for m in MODULES if not m.startswith("cli.")])
def test_only_commands_print(module: str) -> None:
    assert not calls(module) & {"print", "sys.stdout.write", "sys.exit"}


@pytest.mark.parametrize(
    "module",
    [m for m in MODULES if m.startswith("models.")]
    + ["sampling", "similarity", "transforms", "prompts", "conversion"]
    + ["augment", "randaugment", "mixing", "losses", "fused_loss", "metrics"]
    + ["recipe", "distillation", "inference", "prompt_encoding"],
)
def test_modules_that_compute_touch_nothing_else(module: str) -> None:
    names = calls(module)
    assert not names & {"open", "os.getenv", "torch.load", "torch.save", "av.open"}
    assert not any(
        isinstance(node, ast.Attribute) and node.attr in ("environ", "distributed")
        for node in ast.walk(parse(module))
    )


def test_no_weight_file_can_run_code() -> None:
    forbidden = {
        "torch.jit.load",
        "pickle.load",
        "pickle.loads",
        "pickle.Unpickler",
        "eval",
        "exec",
    }
    loads = 0
    for module in MODULES:
        assert not calls(module) & forbidden, module
        for node in ast.walk(parse(module)):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                loads += 1
                options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                assert options.get("weights_only") == "True", module
    assert loads == 1


def test_every_module_says_what_it_is_for() -> None:
    for name in EVERY:
        assert ast.get_docstring(parse(name)), f"{name} has no docstring"
