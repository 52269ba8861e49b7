"""The gates of tests/test_fp8.py on a GPU, and what only a GPU shows. Skipped unless there is one with fp8."""
import pytest
import test_fp8
import torch

import fp8
import model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9),
                                reason="needs a GPU with fp8: Ada, Hopper or newer")


@pytest.mark.parametrize("M, K, N", [(257, 384, 1152), (301, 1536, 512), (129, 1024, 1024), (4097, 1536, 4608)])
def test_the_gates_hold(M, K, N):
    test_fp8.test_products_meet_the_gates_on_outlier_channels_and_heavy_tailed_tokens(M, K, N, device="cuda")


def test_numbers_stay_numbers():
    test_fp8.test_the_largest_of_a_row_is_cast_to_448_whatever_it_is(device="cuda")
    test_fp8.test_no_finite_number_turns_into_another_kind_of_number(device="cuda")
    for poison in (float("nan"), float("inf"), -float("inf")):
        test_fp8.test_a_poisoned_number_stays_visible_in_its_row_and_only_there(poison, device="cuda")


@pytest.mark.parametrize("M", [0, 1, 7, 33])
def test_any_number_of_tokens(M):
    test_fp8.test_any_number_of_tokens_and_any_leading_shape(M, device="cuda")


def test_cpu_and_gpu_quantise_to_the_same_bits_and_multiply_alike():
    x, w, _ = (t.detach().bfloat16() for t in test_fp8.hard_data(301, 1536, 512))
    for t in (x, w, w.t()):
        (a, scale_a), (b, scale_b) = fp8.quantize(t), fp8.quantize(t.cuda())
        assert torch.equal(a.view(torch.uint8), b.cpu().view(torch.uint8)) and torch.equal(scale_a, scale_b.cpu())
    assert test_fp8.sqnr(fp8.product(x.cuda(), w.cuda()).cpu(), fp8.product(x, w)) > 40  # sums in another order


@pytest.mark.parametrize("name", ["dinov2_vitl14_reg", "dinov3_vith16plus", "dinov3_vit7b16"])
def test_a_compiled_block_is_finite_and_near_the_eager_one(name):
    """Compilers sometimes wrote NaN where a transposed fp8 tensor is stored (triton issue 11111)."""
    arch = model.replace(model.ARCHS[name], depth=1, layerscale=1.0)
    torch.manual_seed(0)
    with torch.device("cuda"):
        vit = fp8.to_fp8(model.ViT(arch).bfloat16(), force=True)
        x = torch.randn(9 * 201, arch.embed_dim).bfloat16()
    block, rope = vit.blocks[0], None
    if arch.pos == "rope":
        rope = vit.rope_embed(14, 14)  # a Rope of its own has no periods yet
    runs = []
    for compiled in (False, True, True, True):
        block.zero_grad(set_to_none=True)
        if compiled and len(runs) == 1:
            block.compile(fullgraph=True)
        x.grad = None
        x.requires_grad_()
        y = block(x, [(9, 201)], [rope])
        y.backward(torch.ones_like(y) * 1e-6)
        runs.append([y.detach(), x.grad, *(p.grad for p in block.parameters())])
        assert all(torch.isfinite(t).all() for t in runs[-1])
    for again in runs[1:]:
        assert test_fp8.sqnr(again[0], runs[0][0]) > 20 and test_fp8.sqnr(again[1], runs[0][1]) > 15
