"""The page on reliability: made from the results, complete, and honest about what fails."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.reliability import __main__ as runner  # noqa: E402
from benchmarks.reliability import page  # noqa: E402


def test_the_page_is_that_of_the_results() -> None:
    assert page.text(page.load()) == page.PAGE.read_text(), (
        "python -m benchmarks.reliability --page"
    )


def test_every_bar_has_figures_and_every_failure_a_reason() -> None:
    modules = page.load()
    assert set(modules) == set(runner.NAMES)
    figures = [figure for module in modules.values() for figure in module["figures"]]
    assert {figure["bar"] for figure in figures} == set(page.BARS)
    for figure in figures:
        assert figure["holds"] or figure["note"], figure


def test_a_figure_that_does_not_hold_stands_out() -> None:
    figure = {"bar": "B1", "question": "a|b", "answer": "1 of 2", "holds": False, "note": "why"}
    machine = {
        "date": "2026-01-01",
        "cores": 2,
        "python": "3.12",
        "versions": {"torch": 1, "av": 2},
    }
    module = {"seconds": 100, "machine": machine, "figures": [figure]}
    text = page.text({"weights": module})
    assert "| a\\|b | 1 of 2 | **does not hold** |" in text
    assert "`python -m benchmarks.reliability weights`" in text
    assert "* a|b: why" in text
    assert "| `weights` | 2026-01-01 | 2 min |" in text


def test_a_module_that_breaks_off_is_a_figure(monkeypatch, capsys) -> None:
    """And what it found before stays."""

    def measure(folder: Path, small: bool):
        yield page_figure
        raise OSError("no disk")

    page_figure = runner.Figure("B1", "something", "1 of 1", True)
    module = type(sys)("benchmarks.reliability.broken")
    module.measure = measure
    monkeypatch.setitem(sys.modules, module.__name__, module)
    first, second = runner.run("broken", small=True)
    assert first is page_figure
    assert (second.holds, second.answer, second.note) == (False, "OSError", "no disk")
    assert "B1 holds: something: 1 of 1" in capsys.readouterr().out


def test_what_is_not_known_is_refused(monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["reliability", "vidoes"])
    with pytest.raises(SystemExit) as caught:
        runner.main()
    assert caught.value.code == 2
    assert "unknown: vidoes; choose from videos, weights" in capsys.readouterr().err
