"""Write benchmarks/results/reliability.md: every bar with its figures and the command."""

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "results" / "reliability"
PAGE = RESULTS.parent / "reliability.md"

# What each bar asks; the figures below them say how far it was put to the test.
BARS = {
    "B1": "No weight file runs code or writes a file; a damaged one is one clear error.",
    "B2": "OpenAI's archives are read as PyTorch itself reads them, in at most twice its time.",
    "B3": "Any file called a video gives frames, damage that is counted, or one clear error: "
    "no traceback, no hang, no socket, no other file read, bounded memory.",
    "B4": "Bulk scoring loses nothing and doubles nothing, whatever is killed.",
    "B5": "Training that is killed goes on, and ends bit for bit as if it had not been.",
    "B6": "A signal saves the state and ends the run, in every phase.",
    "B7": "A number that is not finite on any process stops all before the weights change.",
    "B8": "Many processes make one download; a torn one never becomes a weight file.",
    "B9": "Offline: no connection with a warm cache, one clear line with a cold one.",
    "B10": "Few dependencies without known holes; the same wheel from every build.",
    "text": "No label, prompt or list of videos breaks the text side.",
}

HEAD = """\
# Under fire

What the package was put through, and what came of it. `python -m benchmarks.reliability` measures
all of it again, the commands below a part each; the tests run a small part every time.
"""


def rewrite() -> None:
    """Write the page from the last results of every module."""
    PAGE.write_text(text(load()))


def load() -> dict[str, Any]:
    """Return the last results of every module."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))}


def text(modules: dict[str, Any]) -> str:
    """Return the page on the results of modules."""
    rows = [(name, figure) for name, module in modules.items() for figure in module["figures"]]
    parts = [HEAD]
    assert {figure["bar"] for _, figure in rows} <= {*BARS, "-"}
    for bar, question in {**BARS, "-": "Modules that broke off."}.items():
        of_bar = [(name, figure) for name, figure in rows if figure["bar"] == bar]
        if of_bar:
            parts.append(_section(bar, question, of_bar))
    parts.append(_machines(modules))
    return "\n".join(parts)


def _section(bar: str, question: str, rows: list[tuple[str, dict[str, Any]]]) -> str:
    names = " ".join(dict.fromkeys(name for name, _ in rows))
    lines = [f"## {bar}", "", f"{question} `python -m benchmarks.reliability {names}`", ""]
    lines += ["| | measured | |", "|---|---|---|"]
    for _, figure in rows:
        mark = "holds" if figure["holds"] else "**does not hold**"
        cells = (figure["question"], figure["answer"], mark)
        lines.append(f"| {' | '.join(_cell(cell) for cell in cells)} |")
    notes = [f"* {f['question']}: {' '.join(f['note'].split())}" for _, f in rows if f["note"]]
    return "\n".join([*lines, *([""] if notes else []), *notes, ""])


def _machines(modules: dict[str, Any]) -> str:
    lines = ["## When and where", "", "| NAME | date | took | with |", "|---|---|---|---|"]
    for name, module in modules.items():
        machine = module["machine"]
        versions = machine["versions"]
        where = (
            f"{machine['cores']} cores, Python {machine['python']}, torch {versions['torch']}, "
            f"av {versions['av']}"
        )
        minutes = max(1, round(module["seconds"] / 60))
        lines.append(f"| `{name}` | {machine['date']} | {minutes} min | {where} |")
    return "\n".join([*lines, ""])


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
