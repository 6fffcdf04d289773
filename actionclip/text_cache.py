"""Text embeddings kept on disk: the same model and labels are not encoded a second time.

Sits between `classifier`, which asks, and `prompt_encoding`, which computes. What is found
depends on what the weights are, never on where they came from, so that a model that was changed
in memory meets no embeddings of its former self. The cache only saves time: where its folder
cannot be written or a file in it is damaged, the prompts are encoded as if there were none.
"""

import contextlib
import hashlib
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from actionclip.download import cache_directory
from actionclip.errors import OutputError, WeightsError
from actionclip.models.base import VideoTextModel
from actionclip.models.clip import CLIP
from actionclip.prompt_encoding import count_beginnings, encode_tokens
from actionclip.tensor_files import read_file, write_safetensors
from actionclip.tokenizer import tokenize

# Hashing the weights takes as long as encoding 300 distinct beginnings in fp32 on a CPU without
# bf16 instructions (measured), and by estimate 1,200 with them: half the bytes, eight times the
# arithmetic. A first call pays for both. Ten labels in 16 sentences have 600, 400 labels 20,000.
LEAST_BEGINNINGS = 1000
# Eighty times Kinetics-400 in 16 sentences, in fp32 and 512 dimensions.
MAX_BYTES = 2**30
# Part of every key: another number forgets what earlier arithmetic left.
_ARITHMETIC = 1
# Ours, and what a killed writer left of them.
_NAME = re.compile(r"[0-9a-f]{64}\.safetensors(\.\w+\.part)?")


@torch.inference_mode()
def cached_embeddings(
    model: VideoTextModel, prompts: Sequence[str], folder: str | None = None
) -> Tensor:
    """Return what `encode_prompts` does, from the disk if it was computed before.

    Few prompts are encoded each time, and on a GPU any number, because that takes less time than
    hashing the weights.

    Args:
        model: its text encoder is used.
        prompts: P sentences.
        folder: of the cached files. None is `texts` in the folder of downloaded files.

    Returns:
        (P, D) on the model's device, not L2-normalised, in the order given.

    Raises:
        InputError: if a prompt has more tokens than the model takes; it is named.
    """
    tokens = tokenize(prompts, context_length=model.config.clip.context_length)
    if model.device.type != "cpu" or count_beginnings(tokens) < LEAST_BEGINNINGS:
        return encode_tokens(model.clip, tokens)
    if folder is None:
        # The only place of this module that reads the environment.
        folder = os.path.join(cache_directory(os.environ), "texts")
    key = _key(model.clip, tokens)
    path = os.path.join(folder, f"{key}.safetensors")
    known = _read(path, key)
    if known is not None:
        return known.to(model.device)
    embeddings = encode_tokens(model.clip, tokens)
    _write(path, key, embeddings)
    return embeddings


def _key(clip: CLIP, tokens: Tensor) -> str:
    """Hash all that the embeddings of `tokens` depend on."""
    length = int(tokens.argmax(dim=1).max()) + 1
    tower = [
        tokens,
        clip.token_embedding.weight[tokens.unique().to(clip.token_embedding.weight.device)],
        clip.positional_embedding[:length],
        clip.text_projection,
        *clip.ln_final.parameters(),
        *clip.transformer.parameters(),
    ]
    device = clip.text_projection.device.type
    precision = (
        torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device),
        torch.get_float32_matmul_precision(),
    )
    # The text of the modules has the activation and the epsilon of the norms.
    settings = (_ARITHMETIC, clip.config, clip.ln_final, clip.transformer, precision)
    digest = hashlib.blake2b(repr(settings).encode(), digest_size=32)
    with ThreadPoolExecutor(torch.get_num_threads()) as threads:
        for part in threads.map(_digest, tower):
            digest.update(part)
    return digest.hexdigest()


def _digest(tensor: Tensor) -> bytes:
    """Hash a tensor's type, shape and content."""
    digest = hashlib.blake2b(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    content = tensor.detach().cpu().contiguous().reshape(-1)
    digest.update(content.view(torch.uint8).numpy().data)  # lets other threads run
    return digest.digest()


def _read(path: str, key: str) -> Tensor | None:
    """Return what `_write` wrote, or None if the file is missing, damaged or another's."""
    try:
        file = read_file(path)
    except WeightsError:
        return None
    embeddings = file.content.get("embeddings")
    if not isinstance(embeddings, Tensor) or file.metadata.get("seal") != _seal(key, embeddings):
        return None
    with contextlib.suppress(OSError):
        os.utime(path)  # used last, removed last
    return embeddings


def _write(path: str, key: str, embeddings: Tensor) -> None:
    """Keep the embeddings, if the disk lets us, and remove the oldest beyond the limit."""
    folder = os.path.dirname(path)
    with contextlib.suppress(OSError, OutputError):
        os.makedirs(folder, exist_ok=True)
        write_safetensors(path, {"embeddings": embeddings}, {"seal": _seal(key, embeddings)})
        _remove_oldest(folder)


def _remove_oldest(folder: str) -> None:
    """Remove what was used longest ago, until the rest has at most `MAX_BYTES`."""
    files = []
    for entry in os.scandir(folder):
        if _NAME.fullmatch(entry.name):
            with contextlib.suppress(FileNotFoundError):  # another process removes some too
                status = entry.stat()
                files.append((status.st_mtime_ns, entry.path, status.st_size))
    kept = 0
    for _, path, size in sorted(files, reverse=True):
        kept += size
        if kept > MAX_BYTES:
            with contextlib.suppress(FileNotFoundError):
                os.remove(path)


def _seal(key: str, embeddings: Tensor) -> str:
    """Tie a file's content to its name."""
    return hashlib.blake2b(key.encode() + _digest(embeddings), digest_size=32).hexdigest()
