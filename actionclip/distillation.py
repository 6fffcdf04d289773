"""The teacher of a distillation: what a model saw in a video before it was trained.

Normalised videos go in, embeddings that the trained model should stay near come out, beside
the model itself. `losses.cosine_distance` compares the two; the training loop weighs that.

Source: FROSTER (arXiv:2402.03241), which keeps features near those of the frozen CLIP, so that
they still suit classes that the training has not. It compares them through a residual network
that learns; here they are compared as they are.
"""

import copy

import torch
from torch import Tensor, nn

from actionclip.errors import InputError
from actionclip.models.actionclip import ActionCLIP, ActionCLIPConfig
from actionclip.models.base import VideoTextModel
from actionclip.models.xclip import is_added


class Teacher(nn.Module):
    """A frozen copy of how a model encodes videos; shares no weights with it.

    Where the visual prompt has yet to be trained, it is the model without: the image encoder,
    frame by frame, and the mean over the frames.

    Args:
        model: as it is before the training, with `untrained` telling what no file has filled.

    Raises:
        InputError: if one of the encoders has untrained weights.
    """

    def __init__(self, model: VideoTextModel) -> None:
        super().__init__()
        prompt = [name for name in model.untrained if _is_visual_prompt(name)]
        clip = [name for name in model.untrained if name.startswith("clip.")]
        if unknown := [name for name in clip if name not in prompt]:
            raise InputError(
                f"distillation needs a model that knows something, and {unknown[0]} is untrained; "
                "start from trained encoders, or do without"
            )
        encoder: VideoTextModel
        if prompt:
            encoder = ActionCLIP(ActionCLIPConfig(model.config.clip, temporal="meanp"))
            state = model.state_dict()
            encoder.load_state_dict({key: state[key] for key in encoder.state_dict()})
        else:
            encoder = copy.deepcopy(model)
        # It reads no sentences, and these are the largest tables.
        del encoder.clip.transformer, encoder.clip.token_embedding
        self.encoder = encoder.to(model.device)
        self.requires_grad_(False).eval()

    @torch.no_grad()
    def forward(self, videos: Tensor) -> Tensor:
        """Encode videos.

        Args:
            videos: (B, T, 3, H, W) float, normalised pixels.

        Returns:
            (B, D) embeddings, not L2-normalised, without a gradient.
        """
        return self.encoder.encode_video(videos)


def _is_visual_prompt(name: str) -> bool:
    """Return whether a weight is what ActionCLIP or X-CLIP adds to CLIP's encoders."""
    is_prompt = name == "clip.visual.time_embedding" or name.startswith("temporal.")
    return is_prompt or is_added(name)
