"""fp8.py: how exact its products are, what it refuses, and that nothing else changes with it."""
import copy
import shutil

import pytest
import torch
import torch.distributed as dist
from test_train import bit_equal, flags, quick_bach, refused, rows, train, weights
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode

import eval_bach
import fp8
import model
import sharding

V2 = model.ViTConfig(14, 32, 2, 2, "mlp", 64, 4, pos_grid=4, layerscale=1.0, drop_path=0.25)
V2_SWIGLU = model.replace(V2, ffn="swiglu")
V3 = model.ViTConfig(16, 32, 2, 2, "swiglu", 64, 4, "rope", mask_k_bias=True, layerscale=1.0, drop_path=0.25)
FAMILIES = pytest.mark.parametrize("arch", [V2, V2_SWIGLU, V3], ids=["v2_mlp", "v2_swiglu", "v3_swiglu"])


def sqnr(got, want, dim=(0, 1)):
    """Signal to quantisation noise in dB of a matrix; of each row with dim = 1."""
    want, error = want.double(), got.double() - want.double()
    return 10 * torch.log10(want.square().sum(dim) / error.square().sum(dim))


def hard_data(M, K, N, device="cpu"):
    """Activations, weights, gradients. A hundredth of the channels is 20 x as loud, tokens are e^(2 n) x as loud."""
    g = torch.Generator().manual_seed(M)
    x, w, grad = (torch.randn(size, generator=g) for size in ((M, K), (N, K), (M, N)))
    for t in (x, grad):
        t *= (2 * torch.randn(M, 1, generator=g)).exp()
        t[:, ::100] *= 20
    return [t.to(device).requires_grad_() for t in (x, 0.02 * w, 1e-6 * grad)]


def gradients(net, x):
    """Output tokens of net(x), (tokens, D), and gradients of a random function of them. Drop path is seeded."""
    torch.manual_seed(7)
    tokens = torch.cat([t.flatten(0, -2) for t in net(x).values()])
    torch.manual_seed(8)
    (tokens * torch.randn(tokens.shape).to(tokens)).sum().backward()
    found = {k: p.grad for k, p in net.named_parameters() if p.grad is not None}
    for p in net.parameters():
        p.grad = None
    return tokens.detach(), found


def vit(arch, seed=0, plain=False):
    torch.manual_seed(seed)
    net = model.ViT(arch)
    for name, p in net.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(p, std=0.02)
    return net if plain else fp8.to_fp8(net, force=True)


def images(arch, n=4):
    return torch.randn(n, 3, 4 * arch.patch_size, 4 * arch.patch_size, generator=torch.Generator().manual_seed(3))


# ---- accuracy -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("M, K, N", [(65, 384, 192), (33, 1536, 128)])
def test_products_meet_the_gates_on_outlier_channels_and_heavy_tailed_tokens(M, K, N, device="cpu"):
    x, w, grad = hard_data(M, K, N, device)
    y = fp8.Fp8Product.apply(x.bfloat16(), w.bfloat16())
    y.backward(grad.bfloat16())
    for got, want in ((y, x.double() @ w.double().t()), (x.grad, grad.double() @ w.double())):
        mean, worst = sqnr(got, want).item(), sqnr(got, want, 1).min().item()
        print(f"{mean:.1f} dB, worst token {worst:.1f}")
        assert mean >= 27 and worst >= 24, (mean, worst)
    in_bf16 = sqnr(w.grad, grad.double().t() @ x.double()).item()
    print(f"weight gradient {in_bf16:.1f} dB")
    assert in_bf16 >= 45 and torch.equal(w.grad.bfloat16(), grad.bfloat16().t() @ x.bfloat16())


@pytest.mark.parametrize("loud", ["rows", "columns"])
def test_quiet_channels_of_a_weight_are_not_drowned(loud):
    """The gate for channels. With one scale for all of W, DINOv3's choice in the backward, the least is 0 dB."""
    g = torch.Generator().manual_seed(0)
    x, w, grad = (torch.randn(size, generator=g) for size in ((129, 192), (128, 192), (129, 128)))
    w *= (2 * torch.randn((128, 1) if loud == "rows" else (1, 192), generator=g)).exp()
    x, w = x.requires_grad_(), w.requires_grad_()
    y = fp8.Fp8Product.apply(x.bfloat16(), w.bfloat16())
    y.backward(grad.bfloat16())
    for got, want in ((y, x.double() @ w.double().t()), (x.grad, grad.double() @ w.double())):
        assert sqnr(got, want, 0).min() >= 24


def test_all_the_noise_is_that_of_the_two_casts():
    """Scales that are 1 % off would hide in it. To the product of the casts only two bf16 roundings remain, 53 dB."""
    x, w, _ = (t.detach().bfloat16() for t in hard_data(33, 384, 192))
    a, b = (copied.double() * scale for copied, scale in (fp8.quantize(x), fp8.quantize(w)))
    assert sqnr(fp8.product(x, w), a @ b.t(), 1).min() > 50


def test_two_of_three_products_are_in_fp8_as_cuda_takes_them():
    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            calls.append(op)
            out = op(*args, **(kwargs or {}))
            if op is fast:
                a, b, scale_a, scale_b = args[:4]
                assert a.dtype == b.dtype == fp8.E4M3 and not a.shape[1] % 16 and not b.shape[1] % 16
                assert a.stride() == (a.shape[1], 1) and b.stride() == (1, b.shape[0]), (a.stride(), b.stride())
                assert scale_a.numel() == scale_b.numel() == 1 and out.dtype == torch.bfloat16
            return out

    fast, slow = torch.ops.aten._scaled_mm.default, torch.ops.aten.mm.default
    calls, (x, w, grad) = [], hard_data(16, 32, 48)
    with Count():
        fp8.Fp8Product.apply(x.bfloat16(), w.bfloat16()).backward(grad.bfloat16())
    assert calls.count(fast) == 2 and calls.count(slow) == 1
    with Count():  # a frozen weight, as in a probe: its gradient is not computed
        fp8.Fp8Product.apply(x.bfloat16(), w.detach().bfloat16()).backward(grad.bfloat16())
    assert calls.count(fast) == 4 and calls.count(slow) == 1


@FAMILIES
def test_six_blocks_meet_the_gates(arch):
    """
    Layer-scale is 1, and weights keep 0.56 of a variance as a trained network's do, because small branches hide their
    noise: first weights keep 0.15. At 1.0, blocks with SwiGLU would have 15.6-18.9 dB.
    """
    big = model.replace(arch, embed_dim=128, depth=6, ffn_hidden=352, drop_path=0.0)
    plain, noisy = vit(big, plain=True), vit(big)
    with torch.no_grad():
        for p in (p for net in (plain, noisy) for p in net.blocks.parameters() if p.dim() == 2):
            p *= 0.75 / 0.02 / p.shape[1] ** 0.5
    (want, exact), (got, found) = gradients(plain, images(big, 1)), gradients(noisy, images(big, 1))
    db = {k: sqnr(found[k].flatten(), v.flatten(), 0).item() for k, v in exact.items() if v.abs().max() > 0}
    low, median = min(db, key=db.get), sorted(db.values())[len(db) // 2]
    print(f"output {sqnr(got, want):.1f} dB; gradients: median {median:.1f}, least {db[low]:.1f} ({low})")
    assert sqnr(got, want) >= 18 and len(db) > 60 and db[low] >= 14, (low, db[low])


def test_the_largest_of_a_row_is_cast_to_448_whatever_it_is(device="cpu"):
    """
    The proof that nothing needs clamping. Above 464 torch 2.11 casts to NaN and 2.13 saturates. No bf16 number or fp32
    mantissa gets there, not even if a compiler finds amax before the rounding to bf16, which moves it by 2^-8.
    """
    mantissas = torch.arange(2**23, dtype=torch.int32).add_(0x3F800000).view(torch.float32)
    every_bf16 = torch.arange(0x7F80, dtype=torch.int16).view(torch.bfloat16)
    for amax in (mantissas, every_bf16[every_bf16 > 1e-30]):
        amax = amax[:, None].to(device)
        copied, scale = fp8.quantize(amax)
        assert (copied.float() == 448).all() and copied.dtype == fp8.E4M3 and scale.dtype == torch.float32
        late = amax.float() * (1 + 2**-8) / scale
        assert late.max() < 464 and (late.to(fp8.E4M3).float() == 448).all()


def test_no_finite_number_turns_into_another_kind_of_number(device="cpu"):
    values = torch.tensor([[0.0, 0.0], [-0.0, 500.0], [1e30, -3e38], [449.0, -1e4], [1e-38, -1e-44], [1e-6, 1.0]])
    for x in (values.repeat(1, 8).to(device), values.repeat(1, 8).to(device).bfloat16()):
        copied, scale = fp8.quantize(x)
        error = (copied.float() * scale - x.float()).abs().amax(1)
        assert (error <= x.float().abs().amax(1) / 16 + 1e-30).all(), error  # below 1e-30 a row is zero
    spread = torch.randn(4096, 64) * 10 ** torch.linspace(-28, 35, 4096)[:, None]
    copied, scale = fp8.quantize(spread.to(device))
    assert torch.isfinite(copied.float()).all() and sqnr(copied.float() * scale, spread.to(device), 1).min() > 25
    zeros = torch.zeros(16, 32, device=device).bfloat16()
    for a in (zeros, zeros + 1):
        assert torch.equal(fp8.product(a, zeros), zeros[:, :16])


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_a_poisoned_number_stays_visible_in_its_row_and_only_there(poison, device="cpu"):
    """The trainer skips a step whose loss or gradient is not finite. A saturating cast would hide that."""
    x, w, grad = (t.detach().bfloat16() for t in hard_data(16, 32, 48, device))
    for which in (x, grad):
        a, g = x.clone().requires_grad_(), grad.clone()
        (a.data if which is x else g)[5, 7] = poison
        y = fp8.Fp8Product.apply(a, w)
        y.backward(g)
        seen = ~torch.isfinite(y if which is x else a.grad)
        assert seen[5].all() and not seen[torch.arange(16) != 5].any()


@pytest.mark.parametrize("M", [0, 1, 7, 33])
def test_any_number_of_tokens_and_any_leading_shape(M, device="cpu"):
    layer = torch.nn.Linear(32, 48, device=device)
    plain, layer.__class__ = copy.deepcopy(layer), fp8.Fp8Linear
    for shape in ((M, 32), (2, M, 32)):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            x = torch.randn(shape, device=device).to(dtype).requires_grad_()
            y = layer(x)
            y.sum().backward()
            assert y.shape == (*shape[:-1], 48) and y.dtype == x.grad.dtype == dtype
            assert not M or sqnr(y.flatten(0, -2), plain(x.float()).flatten(0, -2)) > 24
    assert layer.weight.grad.dtype == torch.float32 and layer.bias.grad.shape == (48,)


# ---- what CUDA would refuse -----------------------------------------------------------------------------------------

def test_what_only_a_cpu_takes_is_refused_on_it_too():
    a, b = torch.zeros(32, 64).to(fp8.E4M3), torch.zeros(48, 64).to(fp8.E4M3)
    assert fp8.e4m3_product(a, b).shape == (32, 48) and fp8.e4m3_product(a, b).dtype == torch.bfloat16
    turned = torch.zeros(64, 48).to(fp8.E4M3).t()  # row-major where CUDA needs column-major, like W^T without a copy
    for x, y in ((a, turned), (turned, b), (a[:, :40], b[:, :40]), (a[:, :24].clone(), b[:, :24].clone()),
                 (a, torch.zeros(24, 64).to(fp8.E4M3)), (a.to(torch.float8_e5m2), b), (a, b.bfloat16()),
                 (a, torch.zeros(48, 32).to(fp8.E4M3))):
        with pytest.raises(AssertionError):
            fp8.e4m3_product(x, y)


def test_backbones_that_are_too_narrow_or_have_odd_widths_are_refused_and_nothing_is_switched():
    net = vit(model.replace(V2, ffn_hidden=200), plain=True)
    with pytest.raises(ValueError, match=r"^blocks\.0\.mlp\.fc1 is 32 -> 200: fp8 needs multiples of 16; .*'off'$"):
        fp8.to_fp8(net, force=True)
    with pytest.raises(ValueError, match="below width 1024 fp8 saves no time, and this backbone's is 32; .*'force'"):
        fp8.to_fp8(net)
    assert not any(isinstance(m, fp8.Fp8Linear) for m in net.modules())
    with torch.device("meta"):
        fp8.to_fp8(model.ViT(model.replace(model.ARCHS["dinov2_vitl14_reg"], depth=1)))  # 1024 is enough


# ---- what must not notice -------------------------------------------------------------------------------------------

@FAMILIES
def test_switching_changes_no_name_no_number_and_no_other_layer(arch):
    net = vit(arch, plain=True)
    before, objects = copy.deepcopy(net.state_dict()), dict(net.named_parameters())
    groups = model.param_groups(torch.nn.ModuleDict({"backbone": net}))
    assert fp8.to_fp8(net, force=True) is net
    bit_equal(before, net.state_dict())
    assert list(before) == list(net.state_dict()) and all(p is objects[k] for k, p in net.named_parameters())
    assert [[id(p) for p in g["params"]] for g in groups] == [
        [id(p) for p in g["params"]] for g in model.param_groups(torch.nn.ModuleDict({"backbone": net}))]
    switched = {k for k, m in net.named_modules() if isinstance(m, fp8.Fp8Linear)}
    assert switched == {k.removesuffix(".weight") for k, v in before.items() if k.startswith("blocks") and v.dim() == 2}
    vit(arch, seed=1, plain=True).load_state_dict(net.state_dict(), strict=True)


@pytest.mark.parametrize("arch, backend", [(V2, None), (V3, None), (V3, "eager")])
def test_a_probe_sees_the_plain_layers_and_training_goes_on_in_fp8(arch, backend):
    """Compiled too: torch 2.11 would use the fp8 layers' graph for plain ones. Nothing may be compiled again."""
    net, plain, x = vit(arch).eval(), vit(arch, plain=True).eval(), images(arch)
    for block in net.blocks if backend else ():
        block.forward = torch.compile(block.forward, backend=backend)
    with torch.no_grad():
        noisy, want = net(x)["cls"], plain(x)["cls"]
        with torch._dynamo.config.patch(error_on_recompile=True):
            with pytest.raises(ZeroDivisionError), fp8.without_fp8(net):
                assert torch.equal(net(x)["cls"], want) and not torch.equal(noisy, want)
                other = images(arch, 3)  # a probe has other shapes
                assert torch.equal(net(other)["cls"], plain(other)["cls"])
                1 / 0
            assert torch.equal(net(x)["cls"], noisy)


def test_the_mask_switches_the_key_s_bias_off_and_leaves_the_type_alone():
    net, D = vit(V3), V3.embed_dim
    x, qkv = images(V3), net.blocks[0].attn.qkv
    want = net.eval()(x)["cls"]
    with torch.no_grad():
        qkv.bias[D : 2 * D] += 100  # the keys'
    assert torch.equal(net(x)["cls"], want)
    with torch.no_grad():
        qkv.bias[2 * D :] += 1  # the values'
    assert not torch.equal(net(x)["cls"], want)
    half = copy.deepcopy(qkv).bfloat16()
    half.bias_mask = half.bias_mask.float()  # FSDP2's mixed precision casts parameters, not buffers
    assert half(torch.randn(5, D).bfloat16()).dtype == torch.bfloat16


def equal(a, b):
    """Two pairs (output, gradients), bit for bit."""
    assert torch.equal(a[0], b[0])
    bit_equal(a[1], b[1])


@FAMILIES
@pytest.mark.parametrize("mode", ["selective", "full"])
def test_activation_checkpointing_gives_the_same_bits(arch, mode):
    net, x = vit(arch), images(arch)
    sharding.checkpoint_activations(net.blocks, mode)
    equal(gradients(vit(arch), x), gradients(net, x))


@pytest.mark.parametrize("mode, products", [("none", 10), ("selective", 10), ("full", 15)])
def test_compiled_checkpointing_gives_the_same_bits_and_keeps_what_it_should(mode, products):
    """A graph break is an error. In torch 2.11, full checkpointing kept the outputs of all five layers too."""
    arch = model.replace(V3, depth=1, drop_path=0.0)
    net, x = vit(arch), images(arch)
    sharding.checkpoint_activations(net.blocks, mode)
    net.blocks[0].forward = torch.compile(net.blocks[0].forward, backend="aot_eager", fullgraph=True)
    equal(gradients(vit(arch), x), gradients(net, x))
    with torch.profiler.profile(acc_events=True) as profile:
        gradients(net, x)
    assert sum(e.count for e in profile.key_averages() if e.key == "aten::_scaled_mm") == products


@pytest.mark.slow
def test_inductor_compiles_it():
    """It is not bit-equal: roundings differ where it fuses, and rounding to e4m3 makes that visible."""
    net, x = vit(model.replace(V3, depth=1, drop_path=0.0)), images(V3)
    want, exact = gradients(net, x)
    sharding.compile_blocks(net.blocks)
    with torch.no_grad():
        net(x)
    got, found = gradients(net, x)
    assert sqnr(got, want) > 20
    assert all(sqnr(found[k].flatten(), v.flatten(), 0) > 15 for k, v in exact.items() if v.abs().max() > 0)


def sharded_equals_a_bf16_copy(arch, mode="none", compiling=False, **group):
    """In train.py's order: checkpointing, compiling, sharding. All ranks see the same images."""
    dist.init_process_group("gloo", **group)
    try:
        net, half, x = vit(arch), vit(arch).bfloat16(), images(arch)
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        if arch.pos == "rope":
            half.rope_embed.periods = half.rope_embed.periods.float()
        want, exact = gradients(half, x.bfloat16())
        names = list(net.state_dict())
        sharding.checkpoint_activations(net.blocks, mode)
        for block in net.blocks if compiling else ():
            block.forward = torch.compile(block.forward, backend="aot_eager", fullgraph=True)
        sharding.shard(torch.nn.ModuleDict({"backbone": net}), mesh, bf16=True, trained=True)
        got, found = gradients(net, x)
        assert list(net.state_dict()) == names
        policies = [m._get_fsdp_state()._mp_policy for m in (net, *net.blocks)]
        assert {(p.param_dtype, p.reduce_dtype) for p in policies} == {(torch.bfloat16, torch.float32)}
        equal((want, {k: v.float() for k, v in exact.items()}), (got, {k: v.full_tensor() for k, v in found.items()}))
    finally:
        dist.destroy_process_group()


@FAMILIES
def test_sharding_with_bf16_parameters_equals_a_bf16_copy(arch):
    sharded_equals_a_bf16_copy(arch, store=dist.HashStore(), rank=0, world_size=1)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["none", "selective", "full"])
def test_so_it_does_on_two_ranks_checkpointed_and_compiled(mode, on_ranks):
    on_ranks(2, sharded_equals_a_bf16_copy, model.replace(V3, drop_path=0.0), mode, True)


# ---- in train.py ----------------------------------------------------------------------------------------------------

def test_train_refuses_fp8_on_a_narrow_backbone_in_one_line(tiles, monkeypatch, tmp_path):
    message = refused(monkeypatch, flags(tiles=tiles, fp8="on", out_dir=tmp_path))
    assert message.startswith("train.py: fp8 = 'on': below width 1024") and "'force'" in message and "\n" not in message
    assert "known: 'off', 'on', 'force'" in refused(monkeypatch, flags(tiles="/nowhere", fp8="true", out_dir=tmp_path))


def test_a_run_in_fp8_trains_student_and_teacher_and_its_files_are_anyone_s(tiles, tmp_path, monkeypatch):
    """Resuming in fp8 is bit-equal, the export holds the fp32 weights, and a run may resume in bf16."""
    keys = dict(tiles=tiles, fp8="force", save_interval=2, bach_dir="x")
    quick_bach(monkeypatch.setattr)
    straight = train(monkeypatch, flags(**keys, out_dir=tmp_path / "a"))
    for net in ("student", "teacher"):
        switched = [m for m in straight[net].modules() if isinstance(m, fp8.Fp8Linear)]
        assert len(switched) == 2 * 4  # qkv, proj and the MLP's two of each block
    export = torch.load(tmp_path / "a/teacher/4.pth", weights_only=True)["teacher"]
    bit_equal(export, {k: v.full_tensor() for k, v in straight["teacher"]["backbone"].state_dict().items()})
    assert all(v.dtype == torch.float32 for v in export.values())
    loaded, pixels = model.load_backbone(tmp_path / "a/teacher/4.pth"), eval_bach.load_pixels("x")
    row = eval_bach.bach_row(eval_bach.embed(loaded, pixels, *model.NORMS["imagenet"], "cpu"))
    assert row["effective_rank"] == rows(tmp_path / "a", "bach.jsonl")[-1]["effective_rank"]  # the probe is not in fp8
    for other in "bc":  # as after a stop at step 2
        shutil.copytree(tmp_path / "a", tmp_path / other)
        shutil.rmtree(tmp_path / other / "ckpt/4")
    resumed = train(monkeypatch, flags(**keys, out_dir=tmp_path / "b", resume="true"))
    bit_equal(weights(straight), weights(resumed))
    train(monkeypatch, flags(**{**keys, "fp8": "off"}, out_dir=tmp_path / "c", resume="true"))
    a, b = ([row["loss"] for row in rows(tmp_path / k)] for k in "ac")
    assert len(a) == len(b) == 5 and a[:3] == b[:3] and a[4] != b[4] and a[4] == pytest.approx(b[4], rel=0.05)
