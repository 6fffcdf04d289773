"""Whether weight files and their downloads do harm: mutants, kills, full disks, no network."""

import concurrent.futures
import faulthandler
import multiprocessing
import os
import random
import statistics
import subprocess
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import download_server
import golden_files
import mutants
import offline
import torch
from download_server import BODY, NAME, SHA256, running_server, serve
from test_layout import EVERY, parse
from torch import Tensor

from actionclip.download import Patience, fetch
from actionclip.errors import DownloadError
from actionclip.torchscript import read_archive
from benchmarks.reliability.figures import Figure

MUTANTS = 6_000
# Above what the process had before, for files of less than 2 MB.
MOST_MIB = 512
MOST_SECONDS_OF_A_FORMAT = 1_800
READS = 7
KILLS = 20
PROCESSES = 16


def measure(folder: Path, small: bool) -> Iterator[Figure]:
    yield source()
    yield from mutated(folder, 20 if small else MUTANTS)
    yield from archive(folder, "tiny" if small else "ViT-B/32")
    yield from downloads(folder, 2 if small else KILLS, 4 if small else PROCESSES)
    yield disk(folder)
    yield from without_network(folder)


# --- B1: what the package calls, and mutants -----------------------------------------


def source() -> Figure:
    found = [
        f"{danger} in {module}"
        for module in EVERY
        for danger in mutants.dangers(module, parse(module))
    ]
    question = "uses of pickle, torch.jit, eval, ... and calls of torch.load but the safe one"
    return Figure(
        "B1", question, f"{len(found)} in {len(EVERY)} modules", not found, "; ".join(found)
    )


def mutated(folder: Path, count: int) -> Iterator[Figure]:
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(2, mp_context=context) as pool:
        tasks = {}
        for number, name in enumerate(mutants.FORMATS):
            place = folder / f"mutants-{number}"
            place.mkdir()
            tasks[name] = pool.submit(fuzz, name, count, place)
        for name, task in tasks.items():
            question = f"mutants of {name}: our own errors in one line, nothing written or run"
            try:
                outcome, mib = task.result()
            except Exception as error:
                yield Figure("B1", question, "stopped", False, f"{type(error).__name__}: {error}")
                continue
            faults = outcome.faults
            if mib > MOST_MIB:
                faults.append(f"took {mib:.0f} MiB, at most {MOST_MIB} expected")
            yield Figure(
                "B1",
                question,
                f"{outcome.refused} refused, {outcome.accepted} read, {len(faults)} faults; "
                f"slowest {outcome.slowest_seconds:.2f} s, at most {mib:.0f} MiB more",
                outcome.accepted + outcome.refused == count and not faults,
                "; ".join(faults[:3]),
            )


def fuzz(name: str, count: int, folder: Path) -> tuple[mutants.Outcome, float]:
    """Read mutants in another process; also returns by how many MiB its memory grew at most."""
    faulthandler.dump_traceback_later(MOST_SECONDS_OF_A_FORMAT, exit=True)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    os.chdir(folder)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins at what is held now
    before = memory_mib("VmRSS")
    outcome = mutants.fuzz(name, count, folder, seed=0)
    faulthandler.cancel_dump_traceback_later()
    return outcome, memory_mib("VmHWM") - before


def memory_mib(kind: str) -> float:
    """Return what this process holds ("VmRSS"), or the most it held ("VmHWM")."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(kind):
            return int(line.split()[1]) / 1024
    raise OSError(f"/proc/self/status has no {kind}")


# --- B2: the reader of archives ------------------------------------------------------


def archive(folder: Path, name: str) -> Iterator[Figure]:
    path = golden_files.write_archive(folder / "archive.pt", name)
    ours, theirs = read_archive(path), by_torch(path)
    differing = [key for key in theirs if key not in ours or not identical(ours[key], theirs[key])]
    extra = [key for key in ours if key not in theirs]
    equal = len(theirs) - len(differing)
    yield Figure(
        "B2",
        f"tensors of a {name}-shaped archive that equal those of torch.jit.load, bit for bit",
        f"{equal} of {len(theirs)}",
        not differing and list(ours) == list(theirs),
        ", ".join((differing + extra)[:5]),
    )
    del ours, theirs
    seconds: dict[str, list[float]] = {"ours": [], "jit": []}
    for _ in range(READS):
        seconds["ours"].append(timed(lambda: used(read_archive(path))))
        seconds["jit"].append(timed(lambda: used(by_torch(path))))
    ours_seconds, jit_seconds = (statistics.median(seconds[key]) for key in ("ours", "jit"))
    yield Figure(
        "B2",
        "time to read it, at most twice that of torch.jit.load (median); each page touched",
        f"{ours_seconds:.2f} s, {ours_seconds / jit_seconds:.2f} times {jit_seconds:.2f} s",
        ours_seconds <= 2 * jit_seconds,
    )
    path.unlink()


def by_torch(path: Path) -> dict[str, Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state: dict[str, Tensor] = torch.jit.load(str(path), map_location="cpu").state_dict()
    return state


def identical(one: Tensor, other: Tensor) -> bool:
    if (one.dtype, one.shape, one.stride()) != (other.dtype, other.shape, other.stride()):
        return False
    first, second = (t.contiguous().reshape(-1).view(torch.uint8) for t in (one, other))
    return torch.equal(first, second)


def used(tensors: Mapping[str, Tensor]) -> None:
    """Touch each page of memory, because of a file that is mapped it is read only then."""
    for tensor in tensors.values():
        tensor.contiguous().reshape(-1).view(torch.uint8)[::4096].sum()


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


# --- B8: downloads -------------------------------------------------------------------

PATIENCE = Patience(
    connect_seconds=10, read_seconds=5, tries=1, total_seconds=60, sleep=lambda _: None
)


def get(url: str, folder: Path) -> bytes:
    path = fetch(
        url,
        sha256=SHA256,
        filename=NAME,
        size=len(BODY),
        cache_dir=str(folder),
        mirror="",
        offline=False,
        allow_http=True,
        patience=PATIENCE,
    )
    return Path(path).read_bytes()


def downloads(folder: Path, kills: int, processes: int) -> Iterator[Figure]:
    with running_server() as server:
        server.answers = [download_server.dripping]
        children = [download_server.child(server, folder / "many") for _ in range(processes)]
        results = [process.communicate(timeout=120) for process in children]
        right = results.count((f"{folder / 'many' / NAME}\n", ""))
        requests = len(server.requests)
    yield Figure(
        "B8",
        f"{processes} processes ask for one missing file",
        f"{requests} GET, {right} right results",
        (requests, right) == (1, processes),
        next((error[-300:] for _, error in results if error), ""),
    )
    (folder / "owner").mkdir()
    faults = download_server.faults_after_dead_owner(folder / "owner", processes)
    yield Figure(
        "B8",
        f"{processes} processes, the one that downloads is killed halfway: the others go on",
        f"{processes - 1 - len(faults)} right results",
        not faults,
        "; ".join(faults[:3]),
    )
    rng = random.Random(8)
    faults = []
    for number in range(kills):
        place = folder / f"kill-{number}"
        place.mkdir()
        if fault := download_server.fault_after_kill(place, rng.randrange(len(BODY))):
            faults.append(f"{number}: {fault}")
    yield Figure(
        "B8",
        "kill -9 at random bytes of a download: never a wrong file, the next call goes on",
        f"{kills - len(faults)} of {kills}",
        not faults,
        "; ".join(faults[:3]),
    )
    faults = []
    for number in range(kills):
        if fault := after_cut(folder / f"cut-{number}", rng.randrange(len(BODY))):
            faults.append(f"{number}: {fault}")
    yield Figure(
        "B8",
        "a server that ends at random bytes: never a wrong file, the next call goes on",
        f"{kills - len(faults)} of {kills}",
        not faults,
        "; ".join(faults[:3]),
    )


def after_cut(folder: Path, cut: int) -> str:
    """Fetch from a server that ends too early, then again; return what was wrong, if any."""
    with running_server() as server:
        server.answers = [serve(cut=cut), serve()]
        try:
            get(server.url, folder)
            return "the first call found nothing wrong"
        except DownloadError as error:
            if not str(error).isprintable():
                return f"more than one line: {error}"
        if (folder / NAME).exists():
            return "a file under the final name"
        if get(server.url, folder) != BODY:
            return "wrong content"
        if cut and server.requests[1][1].get("Range") != f"bytes={cut}-":
            return "the next call did not resume"
    return ""


@contextmanager
def small_disk(folder: Path) -> Iterator[str]:
    """Mount a disk of 300 kB, if that is allowed; gives the reason if not."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(folder)]
    try:
        made = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        yield f"mount: {error.strerror}"
        return
    if made.returncode:
        yield made.stderr.strip()
        return
    try:
        yield ""
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def disk(folder: Path) -> Figure:
    question = "a full and a read-only disk: one line with a remedy, no file under the name"
    lines, faults = [], []
    with small_disk(folder / "disk") as problem, running_server() as server:
        if problem:
            return Figure("B8", question, "not measured", False, f"cannot mount: {problem}")
        for state, place in (("full", "cache"), ("read-only", "other")):
            if state == "read-only":
                remount = ["mount", "-o", "remount,ro", str(folder / "disk")]
                subprocess.run(remount, check=True)
            try:
                get(server.url, folder / "disk" / place)
                faults.append(f"{state}: nothing was refused")
            except DownloadError as error:
                lines.append(str(error))
        for line, reason in zip(lines, ("No space left", "Read-only file system"), strict=False):
            if not line.isprintable() or reason not in line or "ACTIONCLIP_HOME" not in line:
                faults.append(line)
        if (folder / "disk" / "cache" / NAME).exists():
            faults.append("a file under the final name")
    return Figure("B8", question, f"{len(lines)} of 2", not faults, "; ".join(faults))


# --- B9: no network ------------------------------------------------------------------


def without_network(folder: Path) -> Iterator[Figure]:
    (folder / "warm").mkdir()
    warm = offline.run_zeroshot(folder / "warm", warm=True)
    yield Figure(
        "B9",
        "a command offline, its model in the cache: no use of the network",
        f"exit code {warm.code}, {len(warm.connections)} calls",
        warm.code == 0 and not warm.connections,
        "; ".join([*warm.connections, warm.error.strip()][:3]),
    )
    (folder / "cold").mkdir()
    cold = offline.run_zeroshot(folder / "cold", warm=False)
    named = [text for text in (offline.URL, cold.sha256, str(cold.path)) if text in cold.error]
    yield Figure(
        "B9",
        "likewise with an empty cache: one line with the URL, the SHA-256 and the place",
        f"exit code {cold.code}, {cold.error.count(chr(10))} line, {len(named)} of 3 named, "
        f"{len(cold.connections)} calls",
        (cold.code, cold.error.count("\n"), len(named)) == (2, 1, 3) and not cold.connections,
        cold.error.strip().replace(str(folder), "..."),
    )
