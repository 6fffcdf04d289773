"""Small videos, rendered once per test run, and a cache of its own."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from video_files import write_video

# A shell lets what it starts in the background ignore Ctrl-C, and so would all that tests start.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep what tests leave in the package's cache out of the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACTIONCLIP_HOME", str(tmp_path_factory.mktemp("home")))
        yield


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Let torch use one thread, with which a run is the same in any process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def h264_video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 frames of 96 x 64 in H.264, a key frame every 12, two B-frames in a row."""
    return write_video(tmp_path_factory.mktemp("videos") / "h264.mp4", 60)


@pytest.fixture(scope="session")
def webm_video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 frames of 96 x 64 in VP9, a key frame every 12."""
    options = {"cpu-used": "8", "deadline": "realtime"}
    path = tmp_path_factory.mktemp("videos") / "vp9.webm"
    return write_video(path, 60, codec="libvpx-vp9", bframes=0, options=options)
