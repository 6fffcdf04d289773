"""What training adds to transformer blocks: dropped branches and recomputed activations."""

import pytest
import torch
from torch import Tensor, nn

from actionclip.models.layers import ResidualAttentionBlock, Transformer


def block_of_one_branch(branch: str, drop_path: float) -> ResidualAttentionBlock:
    """A block whose other branch is silent, so that its output tells what became of this one."""
    torch.manual_seed(0)
    block = ResidualAttentionBlock(16, 2, "gelu").double()
    silent = block.mlp.c_proj if branch == "attention" else block.attn.out_proj
    nn.init.zeros_(silent.weight)
    nn.init.zeros_(silent.bias)
    block.drop_path = drop_path
    return block


@pytest.mark.parametrize("branch", ["attention", "mlp"])
def test_whole_branches_are_dropped_in_training(branch: str) -> None:
    block = block_of_one_branch(branch, drop_path=0.25)
    x = torch.randn(2000, 3, 16, dtype=torch.float64)
    with torch.no_grad():
        whole = block.eval()(x) - x
        share = ((block.train()(x) - x) / whole).flatten(1)
    assert whole.abs().min() > 0
    dropped = share[:, 0].abs() < 0.5
    expected = torch.where(dropped, 0.0, 1 / 0.75)[:, None].expand_as(share)
    torch.testing.assert_close(share, expected, rtol=0, atol=1e-6, check_dtype=False)
    # Within four standard deviations, so on average nothing changes.
    assert float(dropped.double().mean()) == pytest.approx(0.25, abs=4 * (0.1875 / 2000) ** 0.5)


def test_nothing_is_dropped_in_evaluation_or_by_default() -> None:
    torch.manual_seed(0)
    block = ResidualAttentionBlock(16, 2, "gelu")
    x = torch.randn(8, 3, 16)
    with torch.no_grad():
        expected = block.train()(x)
        block.drop_path = 0.9
        assert torch.equal(block.eval()(x), expected)
        assert not torch.equal(block.train()(x), expected)


@pytest.mark.parametrize("causal", [False, True])
def test_recomputed_activations_give_the_same_gradients(causal: bool) -> None:
    torch.manual_seed(0)
    transformer = Transformer(16, layers=3, heads=2, causal=causal)
    for block in transformer.resblocks:
        block.drop_path = 0.5  # must be drawn again as it was
    x = torch.randn(8, 5, 16, requires_grad=True)
    calls: list[nn.Module] = []
    transformer.resblocks[0].register_forward_pre_hook(lambda block, _: calls.append(block))

    def run(recompute: bool, shift: float = 0.0) -> list[Tensor]:
        transformer.recompute = recompute
        torch.manual_seed(1)
        calls.clear()
        out = transformer(x, before_block=lambda tokens: tokens + shift)
        return [out, *torch.autograd.grad(out.square().sum(), [x, *transformer.parameters()])]

    kept = run(recompute=False)
    assert len(calls) == 1
    again = run(recompute=True)
    assert len(calls) == 2
    assert all(map(torch.equal, again, kept))
    assert all(map(torch.equal, run(recompute=True, shift=0.5), run(recompute=False, shift=0.5)))
    assert not torch.equal(run(recompute=True, shift=0.5)[0], kept[0])
    transformer.recompute = True
    calls.clear()
    with torch.no_grad():
        transformer(x)
    assert len(calls) == 1
