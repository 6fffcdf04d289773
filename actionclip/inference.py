"""A faster form of a model, for scoring only: the same weights, the same results to rounding.

`pack` makes it from a model of this package; the classifier calls it between loading and the
first video. What it saves: the last block is computed for the class token alone, which is all
that is read of it; the activation is one pass in place, its factor folded into the matrix
products around it; residuals are added in place; patches are cut out by reshaping instead of a
convolution; on a CPU weights are laid out for its matrix instructions once. It cannot be trained.
"""

import copy
from collections.abc import Callable, Iterable
from typing import NoReturn, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from actionclip.errors import InputError
from actionclip.models.base import VideoTextModel
from actionclip.models.clip import VisionTransformer
from actionclip.models.layers import MLP, QuickGELU, ResidualAttentionBlock, Transformer
from actionclip.models.xclip import CrossFrameVisionTransformer

# The hidden layer of an MLP takes this much at most on a CPU: memory blocks above 32 MiB are mapped
# anew at each call, and smaller ones stay in the cache.
LARGEST_BYTES = 24 * 2**20

# x * sigmoid(1.702 x) = silu(1.702 x) / 1.702
QUICK_GELU_FACTOR = 1.702


def pack(model: VideoTextModel, *, compile: bool = False) -> VideoTextModel:
    """Make the form of a model that scores videos fastest.

    It shares the model's weights, but on a CPU comes to hold a copy of those of the image encoder
    in the order of the matrix instructions; make it again after they change or move.

    Args:
        model: any model of this package, on the device where it will run; stays as it is.
        compile: also compile the image encoder with `torch.compile`, on a GPU with CUDA graphs.
            The first video of each batch size then takes up to a minute, and a CPU needs a C++
            compiler. Call it from one thread.

    Returns:
        A model that gives the same results under `torch.inference_mode()`. Its text encoder is the
        model's. It cannot be saved, cast or packed again.

    Raises:
        InputError: if the model is packed already; from the first call, if `compile` finds no
            compiler that works.
    """
    if "state_dict" in vars(model):
        raise InputError("the model is packed already; pass the one that it was made from")
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    packed = copy.deepcopy(model, shared)
    visual = packed.clip.visual
    if isinstance(visual, VisionTransformer):
        visual.add_module("conv1", PatchProjection(visual.conv1))
        if isinstance(visual, CrossFrameVisionTransformer):
            # Later parts of X-CLIP read all tokens of the last block.
            for block in _blocks(visual.transformer):
                block.add_module("mlp", PackedMLP(block.mlp))
        else:
            transformer = PackedTransformer(visual.transformer, model.num_frames)
            visual.add_module("transformer", transformer)
    if compile:
        packed.video_features = _compiled(packed)  # type: ignore[method-assign, assignment]
    packed.state_dict = _refuse_to_save  # type: ignore[method-assign]
    return packed.eval()


def _refuse_to_save(*_: object, **__: object) -> NoReturn:
    raise InputError("a packed model cannot be saved; save the one that it was made from")


def _compiled(model: VideoTextModel) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """Compile what makes features of videos, at the first call."""
    from torch._dynamo.exc import TorchDynamoException  # imports half of PyTorch

    on_gpu = model.device.type == "cuda"
    compiled = torch.compile(model.video_features, mode="reduce-overhead" if on_gpu else None)

    def video_features(videos: Tensor) -> tuple[Tensor, ...]:
        try:
            features = compiled(videos)
        except TorchDynamoException as error:
            reason = str(getattr(error, "inner_exception", error)).splitlines()[0]
            raise InputError(
                f"the image encoder cannot be compiled here ({reason}); install one, or "
                "leave out compile (--compile)"
            ) from error
        # The next call writes into the same memory.
        return tuple(feature.clone() for feature in features) if on_gpu else features

    return video_features


def _blocks(transformer: Transformer) -> Iterable[ResidualAttentionBlock]:
    return cast(Iterable[ResidualAttentionBlock], transformer.resblocks)


class PatchProjection(nn.Module):
    """A convolution whose stride is its kernel, as one matrix product."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.weight = conv.weight

    def forward(self, images: Tensor) -> Tensor:
        """Project the patches of images (N, 3, H, W) to (N, W, H / patch, W / patch)."""
        patch = self.weight.shape[-1]
        patches = images.unflatten(3, (-1, patch)).unflatten(2, (-1, patch))
        patches = patches.permute(0, 2, 4, 1, 3, 5).flatten(3)
        return F.linear(patches, self.weight.flatten(1)).permute(0, 3, 1, 2)


class PackedTransformer(nn.Module):
    """Run the blocks of a transformer for its first token, the only one that comes out."""

    def __init__(self, transformer: Transformer, num_frames: int) -> None:
        super().__init__()
        self.num_frames = num_frames
        self.resblocks = nn.ModuleList(PackedBlock(block) for block in _blocks(transformer))

    def forward(self, x: Tensor, before_block: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Turn (N, L, C), which is overwritten, into the first tokens (N, 1, C)."""
        if before_block is not None or x.device.type != "cpu":
            return self._run(x, before_block)
        # One video after the other, so that the weights are laid out for one number of rows.
        bytes_per_image = 4 * x[0].numel() * x.element_size()
        at_a_time = max(1, min(self.num_frames, LARGEST_BYTES // bytes_per_image))
        return torch.cat([self._run(some) for some in x.split(at_a_time)])

    def _run(self, x: Tensor, before_block: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        for i, block in enumerate(self.resblocks, 1):
            if before_block is not None:
                x = before_block(x)
            x = block(x, first_token_only=i == len(self.resblocks))
        return x


class PackedBlock(nn.Module):
    """A residual attention block that works in place."""

    def __init__(self, block: ResidualAttentionBlock) -> None:
        super().__init__()
        attn = block.attn
        width = attn.out_proj.in_features
        self.heads = attn.heads
        self.ln_1, self.ln_2 = block.ln_1, block.ln_2
        self.q = Product(attn.in_proj_weight[:width], attn.in_proj_bias[:width])
        self.kv = Product(attn.in_proj_weight[width:], attn.in_proj_bias[width:])
        self.qkv = Product(attn.in_proj_weight, attn.in_proj_bias)
        self.out = Product(attn.out_proj.weight, attn.out_proj.bias)
        self.mlp = PackedMLP(block.mlp)

    def forward(self, x: Tensor, first_token_only: bool) -> Tensor:
        """Turn (N, L, C) into the same, in place, or into (N, 1, C)."""
        n, length, _ = x.shape
        y = layer_norm(x, self.ln_1)
        if first_token_only:
            x = x[:, :1].clone()
            k, v = self.kv(y).view(n, length, 2, self.heads, -1).permute(2, 0, 3, 1, 4)
            q = self.q(y[:, :1]).view(n, 1, self.heads, -1).transpose(1, 2)
        else:
            q, k, v = self.qkv(y).view(n, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x += self.out(mixed)
        x += self.mlp(layer_norm(x, self.ln_2))
        return x


class PackedMLP(nn.Module):
    """An MLP whose activation works in place, QuickGELU as a SiLU of scaled input."""

    def __init__(self, mlp: MLP) -> None:
        super().__init__()
        self.is_quick = isinstance(mlp.activation, QuickGELU)
        factor = QUICK_GELU_FACTOR if self.is_quick else 1.0
        self.c_fc = Product(mlp.c_fc.weight, mlp.c_fc.bias, factor, factor)
        self.c_proj = Product(mlp.c_proj.weight, mlp.c_proj.bias, 1 / factor)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.c_fc(x)
        hidden = F.silu(hidden, inplace=True) if self.is_quick else F.gelu(hidden)
        return self.c_proj(hidden)


class Product(nn.Module):
    """A linear layer with factors: factor * (x @ weight.T) + bias_factor * bias.

    On a CPU the weight is laid out as the matrix instructions take it, which is otherwise done
    in each call. That pays from the second call with the same number of rows on, and needs
    operators that PyTorch's compiler uses; without them the public one does the same.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor, factor: float = 1.0, bias_factor: float = 1.0
    ) -> None:
        super().__init__()
        # Plain attributes, as the weights are the model's.
        self.weight, self.bias = weight.detach(), bias_factor * bias.detach()
        self.factor = factor
        self.last_rows = 0
        # The weight as laid out, and for how many rows; always replaced together.
        self.packed: tuple[int, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Multiply (..., C) into (..., D)."""
        rows = x.numel() // x.shape[-1]
        packed = None
        is_native = x.device.type == "cpu" and x.dtype == self.weight.dtype
        if is_native and not torch.compiler.is_compiling():
            packed = self._pack(rows)
        if packed is None:
            product = torch.addmm(self.bias, x.flatten(0, -2), self.weight.t(), alpha=self.factor)
            return product.unflatten(0, x.shape[:-1])
        if x.dtype == torch.bfloat16:
            return torch.ops.mkldnn._linear_pointwise(x, packed, self.bias, "none", [], "")
        # The weight as it is gives no more than its shape.
        product = torch.ops.mkl._mkl_linear(x, packed, self.weight, None, rows)
        return product.add_(self.bias)

    def _pack(self, rows: int) -> Tensor | None:
        """Return the weight laid out for this number of rows, if it pays."""
        is_repeated, self.last_rows = rows == self.last_rows, rows
        packed = self.packed
        if packed is not None and packed[0] == rows:
            return packed[1]
        lay_out = _layout_operator(self.weight.dtype) if is_repeated else None
        if lay_out is None:
            return None
        weight = lay_out(self.factor * self.weight, rows)
        self.packed = (rows, weight)
        return weight


def _layout_operator(dtype: torch.dtype) -> Callable[[Tensor, int], Tensor] | None:
    """Return what lays out a weight of this type on this CPU, if this PyTorch has it."""
    mkl, mkldnn = torch.ops.mkl, torch.ops.mkldnn
    if dtype == torch.float32 and torch.backends.mkl.is_available() and hasattr(mkl, "_mkl_linear"):
        return mkl._mkl_reorder_linear_weight
    if (
        dtype == torch.bfloat16
        and hasattr(mkldnn, "_linear_pointwise")
        and mkldnn._is_mkldnn_bf16_supported()
    ):
        return mkldnn._reorder_linear_weight
    return None


def layer_norm(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    """Normalise with fp32 statistics; the type of x stays, that of weights may be rounded to it."""
    # On a CPU the kernel takes bf16 and weights in fp32, elsewhere it wants one type.
    dtype = norm.weight.dtype if x.device.type == "cpu" else x.dtype
    weight, bias = norm.weight.to(dtype), norm.bias.to(dtype)
    return F.layer_norm(x, norm.normalized_shape, weight, bias, norm.eps)
