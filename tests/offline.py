"""A user's command where no connection is allowed, with its model in the cache or not."""

import contextlib
import dataclasses
import hashlib
import io
import os
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import mutants
import torch
from video_files import write_video

from actionclip.cli import zeroshot
from actionclip.models.actionclip import ActionCLIPConfig
from actionclip.published import MODELS, PublishedModel

URL = "https://openaipublic.azureedge.net/clip/models/small-quickgelu.pt"


@dataclass(frozen=True)
class Result:
    """What a command did.

    Attributes:
        code: how it ended.
        out: what it wrote to standard output.
        error: what it wrote to standard error.
        path: where its model was looked for.
        sha256: of that model.
        connections: what it did with sockets, those between its own processes aside.
    """

    code: int
    out: str
    error: str
    path: Path
    sha256: str
    connections: list[str]


def run_zeroshot(folder: Path, *, warm: bool, variable: str = "ACTIONCLIP_OFFLINE") -> Result:
    """Run `actionclip-zeroshot` on a video, offline, with a small published model.

    Args:
        folder: empty.
        warm: whether the model is in the cache.
        variable: of the environment, that forbids connections.
    """
    table = torch.zeros(49408, mutants.TOWERS.text_width, dtype=torch.float16)
    state = {**mutants.clip_state(), "token_embedding.weight": table}
    content = mutants.saved(state)
    towers = dataclasses.replace(mutants.TOWERS, vocab_size=49408)
    model = PublishedModel(
        URL,
        "small-quickgelu.pt",
        lambda: ActionCLIPConfig(towers),
        "",
        size=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
    )
    home = folder / "home"
    if warm:
        home.mkdir()
        (home / "small-quickgelu.pt").write_bytes(content)
    video = write_video(folder / "video.mp4", 8)
    environment = {variable: "1", "ACTIONCLIP_HOME": str(home), "HOME": str(folder)}
    out, error = io.StringIO(), io.StringIO()
    with (
        mock.patch.dict(MODELS, {"small": model}),
        mock.patch.dict(os.environ, environment),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(error),
        mutants.watched() as acts,
    ):
        code = zeroshot.main([str(video), "--model", "small", "--labels", "one", "two"])
    connections = [act for act in acts if act.startswith("socket.") and "AF_UNIX" not in act]
    path, sha256 = home / "small-quickgelu.pt", str(model.sha256)
    return Result(code, out.getvalue(), error.getvalue(), path, sha256, connections)
