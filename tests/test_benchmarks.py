"""The benchmarks' own machinery: what is measured again, what the table says, what a run leaves."""

import importlib
import itertools
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parent.parent
# As scripts see each other, and as `python -m benchmarks` sees the table.
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
import measure  # noqa: E402

from benchmarks import __main__ as suite  # noqa: E402
from benchmarks import table  # noqa: E402
from benchmarks.table import Goal, Question  # noqa: E402


@pytest.mark.parametrize(
    ("foreign", "kept", "disturbed"),
    [
        ([0.0], 1, False),
        ([9.0, 0.0], 2, False),
        ([9.0, 5.0, 7.0], 2, True),  # none was quiet: the quietest is kept
        ([9.0, 5.0, 7.0, 0.0], 2, True),  # and no fourth is tried
    ],
)
def test_a_disturbed_sample_is_taken_again(
    foreign: list[float], kept: int, disturbed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`foreign` are the seconds that other programs use while each sample is taken."""
    readings = [reading for seconds in foreign for reading in (100.0, 100.0 + seconds)]
    monkeypatch.setattr(measure, "_foreign_seconds", iter(readings).__next__)
    monkeypatch.setattr(measure.time, "perf_counter", itertools.count().__next__)
    samples = iter(range(1, 9))
    assert measure.undisturbed(samples.__next__, retries=2) == (kept, disturbed)


def test_rounds_count_those_that_stayed_disturbed(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 1000, 5))
    monkeypatch.setattr(measure, "_foreign_seconds", clock.__next__)
    calls = []
    rounds = measure.interleave({"ours": lambda: calls.append(1)}, 4, retries=1)
    assert len(calls) == 1 + 4 * 2
    summary = measure.compare(rounds, "ours")["ours"]
    assert (summary["rounds"], summary["disturbed"]) == (4, 4)


SPIN = """
import sys, time
while time.process_time() < {seconds}: pass
print(flush=True)
sys.stdin.read()
"""


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="the system has no /proc/stat")
def test_processes_that_we_start_are_ours() -> None:
    before = measure._cpu_seconds()
    code = [sys.executable, "-c", SPIN.format(seconds=0.3)]
    with subprocess.Popen(code, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        assert measure._living_seconds() >= 0.25
        assert measure._foreign_seconds() > 0
        assert measure._cpu_seconds() - before < 0.25
    assert measure._cpu_seconds() - before >= 0.25


def test_where_nothing_is_known_of_others_each_sample_counts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def absent(path: Path) -> str:
        raise FileNotFoundError(path)

    monkeypatch.setattr(measure.Path, "read_text", absent)
    calls = iter(range(1, 9))
    assert measure.undisturbed(calls.__next__) == (1, False)


def test_a_row_names_the_best_peer() -> None:
    rounds = {
        "ours fp32": measure.Rounds([1.0, 2.0, 4.0]),
        "ours bf16": measure.Rounds([0.1, 0.1, 0.1]),
        "slow": measure.Rounds([3.0, 8.0, 8.0]),
        "fast": measure.Rounds([2.0, 2.0, 2.0]),
    }
    ratios = measure.ratios(rounds, "ours fp32")
    assert ratios == {"slow": [3.0, 4.0, 2.0], "fast": [2.0, 1.0, 0.5]}
    assert measure.row("what", ratios) == {
        "row": "what",
        "kind": "time",
        "against": "fast",
        "peers": {
            "slow": {"ratio": 3.0, "range": [2.0, 4.0]},
            "fast": {"ratio": 1.0, "range": [0.5, 2.0]},
        },
    }
    assert list(measure.ratios(rounds, "ours fp32", ["ours bf16"])) == ["ours bf16"]
    assert measure.row("what", {})["against"] is None


def document(*rows: dict[str, Any]) -> dict[str, Any]:
    machine = {
        "date": "2030-01-02",
        "command": "python benchmarks/bench_x.py --n 3 --json x.json",
        "cpu": "A processor",
        "cores": 2,
        "threads": 2,
        "gpu": None,
        "python": "3.12.0",
        "versions": {"torch": "2.13.0"},
    }
    return {"machine": machine, "results": {"rows": list(rows)}}


QUESTIONS = (
    Question("speed", "x", (Goal("old", 3.0, 4.0), Goal("absent", 2.0))),
    Question("floor", "x", (Goal(None, 0.8),)),
    Question("alone", "x"),
    Question("later", "x", (Goal(None, 1.5),)),
    Question("elsewhere", "y", (), "a card"),
)


def test_the_table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(table, "ROWS", QUESTIONS)
    monkeypatch.setattr(table, "REASONS", {"speed": "it is in C"})
    answers = document(
        measure.row("speed", {"old": [3.5, 3.6], "new": [0.9, 0.7]}),
        measure.row("floor", {"import torch": [0.85]}, "limit"),
        measure.row("alone", {}),
    )
    (tmp_path / "x.json").write_text(json.dumps(answers))
    readme = tmp_path / "README.md"
    readme.write_text(f"above\n{table.START}\nold\n{table.END}\nbelow\n")
    table.rewrite(readme, tmp_path)
    table.rewrite(readme, tmp_path)
    origin = "`python benchmarks/bench_x.py --n 3`, 2030-01-02"
    assert readme.read_text().splitlines() == [
        "above",
        table.START,
        "",
        "| question | ours is better by | range | best peer | goal (stretch): reached | why not "
        "more | command, date |",
        "|---|---|---|---|---|---|---|",
        f"| speed | **0.80** | 0.70 to 0.90 | new | 3 (4) over old: 3.55 | it is in C | {origin} |",
        f"| floor | 85% of the limit | 85% to 85% | import torch | 80%: 85% |  | {origin} |",
        "| alone | no peer could run |  |  |  |  |  |",
        "| later | not measured yet |  |  | 1.5 |  |  |",
        "| elsewhere | not measured: needs a card |  |  |  |  |  |",
        "",
        "- Measured on A processor, 2 cores, 2 threads, Python 3.12.0, torch 2.13.0.",
        "",
        table.END,
        "below",
    ]


@pytest.mark.parametrize(
    ("kind", "ratios", "goals", "expected"),
    [
        ("time", {"old": [0.99]}, (), True),
        ("time", {"old": [1.0]}, (), False),
        ("limit", {"floor": [0.5]}, (), False),
        ("limit", {"floor": [0.5]}, (Goal(None, 0.6),), True),
        ("time", {"old": [3.5], "new": [1.1]}, (Goal("old", 3.0, 4.0),), True),
        ("time", {"old": [3.5], "new": [1.1]}, (Goal("old", 3.0),), False),
        ("time", {"new": [1.1]}, (Goal("old", 3.0),), False),
        ("time", {}, (Goal("old", 3.0),), False),
    ],
)
def test_what_needs_a_reason(
    kind: Any, ratios: dict[str, list[float]], goals: tuple[Goal, ...], expected: bool
) -> None:
    row = measure.row("what", ratios, kind)
    assert table.needs_reason(Question("what", "x", goals), row) == expected


def test_stored_results_answer_questions_and_miss_no_reason() -> None:
    documents = table.read_results(table.RESULTS)
    questions = {question.row: question for question in table.ROWS}
    assert len(questions) == len(table.ROWS)
    for file, stored in documents.items():
        for row in stored["results"]["rows"]:
            assert questions[row["row"]].file == file
    wanting = {
        name
        for name, question in questions.items()
        if (row := table.find_row(question, documents)) and table.needs_reason(question, row)
    }
    assert set(table.REASONS) == wanting


def test_the_stored_table_is_that_of_the_stored_results() -> None:
    text = table.README.read_text()
    assert table.render(table.read_results(table.RESULTS)) in text


SUCCEEDS = """
import argparse, json, subprocess, sys
parser = argparse.ArgumentParser()
parser.add_argument("--repeats")
parser.add_argument("--json")
args = parser.parse_args()
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
with open(args.json, "w") as file:
    json.dump({"repeats": args.repeats, "child": child.pid}, file)
"""
FAILS = SUCCEEDS + "sys.exit(3)\n"


def test_a_run_keeps_what_succeeds_and_names_what_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    folder, results = tmp_path / "benchmarks", tmp_path / "benchmarks" / "results"
    results.mkdir(parents=True)
    (folder / "bench_bad.py").write_text(FAILS)
    (folder / "bench_good.py").write_text(SUCCEEDS)
    (results / "bad.json").write_text('"old"')
    monkeypatch.setattr(table, "HERE", folder)
    monkeypatch.setattr(table, "RESULTS", results)
    written = []
    monkeypatch.setattr(table, "rewrite", lambda: written.append(sorted(os.listdir(results))))
    monkeypatch.setattr(suite, "SUITE", {"bad": (), "good": ("--repeats", "3"), "other": ()})
    monkeypatch.setattr(sys, "argv", ["benchmarks", "bad", "good"])
    assert suite.main() == 1
    assert written == [["bad.json", "good.json"]]
    assert capfd.readouterr().err == "failed, their old rows stay: bad\n"
    assert json.loads((results / "bad.json").read_text()) == "old"
    good = json.loads((results / "good.json").read_text())
    assert good["repeats"] == "3"
    assert ended(good["child"])

    monkeypatch.setattr(sys, "argv", ["benchmarks", "--table"])
    assert suite.main() == 0
    assert len(written) == 2


def test_real_videos_are_decoded_beside_the_rendered_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = []
    monkeypatch.setattr(suite, "call", lambda command: commands.append(command) or 1)
    (tmp_path / "b.mp4").touch()
    (tmp_path / "a.mp4").touch()
    assert not suite.run("video", tmp_path)
    assert not suite.run("text", tmp_path)
    rendered = commands[0].index("--rendered")
    paths = [str(tmp_path / f"{x}.mp4") for x in "ab"]
    assert commands[0][rendered + 1 : rendered + 4] == [*paths, "--json"]
    assert commands[1][2] == "--json"


def ended(process: int) -> bool:
    """Tell whether a process that is not our child ends within some seconds."""
    for _ in range(100):
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


def test_an_unknown_benchmark_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmarks", "vidoe"])
    with pytest.raises(SystemExit, match="2"):
        suite.main()
    assert "unknown: vidoe; choose from encode, text, video" in capsys.readouterr().err


def test_the_suite_has_a_script_and_questions_for_each_name() -> None:
    assert {q.file for q in table.ROWS} - {"gpu"} == set(suite.SUITE)
    for name in suite.SUITE:
        assert (table.HERE / f"bench_{name}.py").exists()


def run_gpu_suite(*sections: str) -> Any:
    """Run sections with small sizes on the CPU; their rows must be those of the table."""
    gpu_suite = importlib.import_module("gpu_suite")
    found = gpu_suite.Suite(torch.device("cpu"), gpu_suite.SMALL, deadline=math.inf)
    for section in sections:
        gpu_suite.SECTIONS[section](found)
    questions = {question.row for question in table.ROWS if question.file == "gpu"}
    rows = {row["row"].replace("N = 64", "N = 4096") for row in found.rows}
    assert rows
    assert rows <= questions
    return found


def test_the_gpu_suite_runs_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(model: object) -> None:
        raise ImportError

    monkeypatch.setattr(importlib.import_module("gpu_suite"), "transformers_peer", absent)
    # What "longer" does is "encode" with more frames.
    found = run_gpu_suite("peak", "encode", "train", "loss", "text")
    assert found.skipped == ["transformers: not installed"]
    assert len(found.results) == 5
    assert len(found.rows) == 3 + 6 + 2 + 1


@pytest.mark.slow
def test_the_gpu_suite_takes_transformers_along() -> None:
    pytest.importorskip("transformers")
    found = run_gpu_suite("peak", "longer", "text")
    assert found.skipped == []
    assert "transformers bf16" in found.results["image encoder, ViT-B/16, 32 frames"]


def test_a_cpu_answers_no_question_about_a_gpu(tmp_path: Path) -> None:
    file = tmp_path / "gpu.json"
    gpu_suite = importlib.import_module("gpu_suite")
    assert gpu_suite.main(["loss", "--device", "cpu", "--small", "--json", str(file)]) == 0
    found = json.loads(file.read_text())["results"]
    assert list(found) == ["left out", "failed", "rows", "loss, N = 64"]
    assert (found["left out"], found["failed"], found["rows"]) == ([], [], [])


def test_a_section_that_fails_costs_the_others_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gpu_suite = importlib.import_module("gpu_suite")

    def fail(suite: object) -> None:
        raise ValueError("no such kernel")

    monkeypatch.setitem(gpu_suite.SECTIONS, "encode", fail)
    monkeypatch.setattr(gpu_suite, "transformers_peers", lambda *asked: {})
    file = tmp_path / "gpu.json"
    options = ["--device", "cpu", "--small", "--json", str(file)]
    assert gpu_suite.main(["encode", "text", *options]) == 1
    found = json.loads(file.read_text())["results"]
    assert found["failed"] == ["encode"]
    assert "text classifier, 16 prompts" in found
    error = capsys.readouterr().err
    assert "ValueError: no such kernel" in error
    assert error.endswith("\nfailed: encode\n")


def test_the_gpu_suite_leaves_out_what_does_not_fit_in(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gpu_suite = importlib.import_module("gpu_suite")
    file = tmp_path / "gpu.json"
    options = ["--device", "cpu", "--small", "--seconds", "50", "--json", str(file)]
    assert gpu_suite.main(["train", "text", *options]) == 0
    found = json.loads(file.read_text())["results"]
    assert list(found) == ["left out", "failed", "rows"]
    left_out = [line.partition(":")[0] for line in found["left out"]]
    assert left_out == ["training step", "text classifier"]
    assert "left out: training step: needs about 90 s, " in capsys.readouterr().out


def test_nothing_is_timed_when_the_gpu_tests_fail(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gpu_suite = importlib.import_module("gpu_suite")
    monkeypatch.setattr(gpu_suite, "run_tests", lambda device, seconds: False)
    assert gpu_suite.main(["--device", "cpu", "--small"]) == 1
    assert capsys.readouterr() == ("", "the tests failed, so nothing is timed\n")
