"""The network, the losses, the schedules and the weight files against numbers of the reference implementations."""
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import model
from bench import budget
from model import ARCHS, DINOHead, ViT, ViTConfig
from prepare.stats import train_keys

GOLDEN = Path(__file__).parent / "golden"
VITS = [f"vit_dinov{name}" for name in ("2_reg4_swiglu", "2_noreg_mlp", "3_hplus_like", "3_s_like", "3_7b_like")]


def golden(name):
    z = np.load(GOLDEN / f"{name}.npz")
    arrays = {k: torch.from_numpy(z[k]) for k in z.files if z[k].dtype.kind != "U"}
    return json.loads(str(z["meta"])) if "meta" in z.files else {}, arrays


def subset(arrays, prefix):
    return {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}


def pixels(x):
    return x.float() / 127.5 - 1


def build(name, **changes):
    meta, z = golden(name)
    meta.pop("input")
    vit = ViT(ViTConfig(**{**meta, **changes}))
    vit.load_state_dict(subset(z, "sd/"), strict=True)
    return vit.eval(), z


def close(a, b, atol=1e-5, rtol=1e-5):
    torch.testing.assert_close(a, b, atol=atol, rtol=rtol)


# ---- the network ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", VITS)
def test_outputs_equal_the_reference_without_and_with_masks_square_and_not(name):
    vit, z = build(name)
    for i in (0, 1):
        for key, mask in ((f"out{i}/", None), (f"out{i}_masked/", z[f"in{i}/mask"])):
            out = vit(pixels(z[f"in{i}/x_uint8"]), mask)
            assert set(out) == {"cls", "registers", "patches"}
            for k, v in subset(z, key).items():
                close(out[k], v)


@pytest.mark.parametrize("name", VITS)
def test_gradients_equal_the_reference(name):
    vit, z = build(name)
    out = vit(pixels(z["in0/x_uint8"]), z["in0/mask"])
    scalar = (out["cls"] * z["grad/w_cls"]).sum() + (out["patches"] * z["grad/w_patches"]).sum()
    close(scalar, z["grad/scalar"], atol=1e-4)
    scalar.backward()
    for k, p in vit.named_parameters():
        if f"grad/{k}" in z:  # the file has the tokens and a few matrices
            close(p.grad, z[f"grad/{k}"], atol=1e-4, rtol=1e-4)
    names = set(subset(z, "grad/")) - {"w_cls", "w_patches", "scalar"}
    assert names <= set(dict(vit.named_parameters())) and len(names) >= 5, names


@pytest.mark.parametrize("name", VITS)
def test_two_resolutions_in_one_call_equal_two_calls(name):
    vit, z = build(name)
    x, mask = [pixels(z[f"in{i}/x_uint8"]) for i in (0, 1)], z["in0/mask"]
    for out, alone in zip(vit(x, [mask, None]), (vit(x[0], mask), vit(x[1]))):
        for k in out:
            close(out[k], alone[k])


def test_local_crops_use_their_own_norm_in_training_only():
    vit, _ = build("vit_dinov3_7b_like")
    _, z = golden("vit_dinov3_7b_like_multicrop_train")
    x = [pixels(z["x_global_uint8"]), pixels(z["x_local_uint8"])]
    out = vit.train()(x, [None, None])
    close(out[0]["cls"], z["cls_global"])
    close(out[1]["cls"], z["cls_local"])
    close(out[1]["patches"], z["patches_local"])
    assert (vit.eval()(x)[1]["cls"] - z["cls_local"]).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["vit_dinov2_reg4_swiglu", "vit_dinov3_hplus_like"])
def test_drop_path_computes_only_the_kept_crops_and_keeps_the_expectation(name):
    vit, z = build(name, drop_path=0.4)
    x = [pixels(torch.cat([z["in0/x_uint8"]] * 6)[:11]), pixels(torch.cat([z["in1/x_uint8"]] * 6))]
    close(vit(x)[0]["cls"], vit(x[0])["cls"])  # off in eval
    rows = []
    hook = vit.blocks[0].mlp.register_forward_pre_hook(lambda m, args: rows.append(len(args[0])))
    torch.manual_seed(0)
    vit.train()(x)
    tokens = [vit.embed(i, None, (i.shape[2] // vit.arch.patch_size, i.shape[3] // vit.arch.patch_size)) for i in x]
    assert rows == [6 * tokens[0].shape[1] + 7 * tokens[1].shape[1]]  # int(11 * 0.6) and int(12 * 0.6) crops
    hook.remove()
    flat, shapes = torch.cat([t.flatten(0, 1) for t in tokens]), [t.shape[:2] for t in tokens]
    mean = torch.stack([model.residual(flat, shapes, model.draw_kept(shapes, 0.4, "cpu"), lambda x, s: x)
                        for _ in range(800)]).mean(0)
    assert ((mean - 2 * flat).abs().mean() / flat.abs().mean()) < 0.05
    close(model.residual(flat, shapes, None, lambda x, s: x), 2 * flat)
    assert vit.blocks[0](flat, shapes, [None, None]).shape == flat.shape


def test_drop_path_keeps_no_copy_of_the_branch_and_equals_adding_in_place():
    """The bug: index_add_ keeps its source, 8 % of a step's activations."""
    shapes, kept, results = [(11, 17), (12, 5)], [], []  # weights 11/6 and 12/7
    start, w = torch.randn(247, 32), torch.randn(247, 32)

    def in_place(x, branch):
        torch.manual_seed(1)
        out, first = x.clone(), 0
        crops = [torch.randperm(B)[:int(B * 0.6)] for B, _ in shapes]
        for (B, N), c in zip(shapes, crops):
            rows = (first + c[:, None] * N + torch.arange(N)).flatten()
            out, first = out.index_add(0, rows, branch(x[rows], None), alpha=B / len(c)), first + B * N
        return out

    def ours(x, branch):
        torch.manual_seed(1)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            return model.residual(x, shapes, model.draw_kept(shapes, 0.4, "cpu"), branch)

    for residual in (ours, in_place):
        x = start.clone().requires_grad_()
        out = residual(x, lambda x, _: x * w[0])  # saves w only
        (out.sin() * w).sum().backward()
        results.append((out.detach(), x.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results))
    assert kept and not [t.shape for t in kept if t.is_floating_point() and t.numel() > 32]  # w[0] apart


def test_rope_rescaling_is_drawn_in_training_only():
    vit, z = build("vit_dinov3_s_like", rope_rescale=2.0)
    x = pixels(z["in0/x_uint8"])
    close(vit(x)["cls"], z["out0/cls"])
    torch.manual_seed(0)
    a, b = vit.train()(x)["cls"], vit(x)["cls"]
    assert (a - b).abs().max() > 1e-4
    vit.rope_embed.periods.fill_(2 * torch.pi)
    r = torch.stack([vit.rope_embed(1, 2, 2.0)[0][1, 4].asin() / 0.5 for _ in range(400)])  # the factor at x = 0.5
    assert 0.5 <= r.min() < 0.55 and 1.9 < r.max() <= 2.001 and abs(r.log().mean()) < 0.1


def test_position_table_resampling():
    _, z = golden("pos_embed")
    for side in (16, 7, 28):
        close(model.resample_pos_embed(z["pos_embed_37"], side), z[f"pos_embed_{side}"])
    assert model.resample_pos_embed(z["pos_embed_37"], (5, 9)).shape == (1, 46, 8)


@pytest.mark.parametrize("arch, px, keys, params", [  # H+'s (zero) qkv bias is a parameter in the released count too
    ("dinov2_vitg14_reg", 518, 568, 1_136_486_912), ("dinov3_vith16plus", 224, 552, 840_633_600),
    ("dinov3_vit7b16", 224, 610, 6_716_043_264), ("dinov3_vitl16", 224, 368, None), ("dinov3_vits16", 224, 188, None),
    # as timm 1.0.31 builds them, and a mask token each, UNI2-h's class position, and not Virchow2's of registers
    ("uni", 224, 343, 303_350_784 + 1024), ("uni2_h", 224, 344, 681_394_176 + 2 * 1536),
    ("virchow", 224, 455, 631_229_184 + 1280), ("virchow2", 224, 456, 631_239_424 + 1280 - 4 * 1280),
    ("gigapath", 224, 567, 1_134_953_984 + 1536)])
def test_counts_of_keys_and_parameters_are_those_of_the_released_files(arch, px, keys, params):
    with torch.device("meta"):
        vit = ViT(replace(ARCHS[arch], pos_grid=px // ARCHS[arch].patch_size))
    assert len(vit.state_dict()) == keys and params in (None, sum(p.numel() for p in vit.parameters()))


def test_rotary_keys_are_refused_for_learned_positions_and_the_other_way_round():
    for arch, key, value in (("dinov2_vits14", "rope_rescale", 2.0), ("dinov3_vits16", "pos_interp", "offset")):
        config = train_keys() | {"arch": arch, "local_px": 112, key: value}
        with pytest.raises(ValueError, match=f"{key}.* positions; {arch}'s are"):
            model.run_arch(config)


def test_step_cost_agrees_with_the_published_accounting():
    config, B = train_keys(), 48
    cost = budget.tflop(config, model.run_arch(config))
    assert abs(sum(cost.values()) - 248.8) < 0.3, cost
    assert abs(cost["student"] / 3 / B - 1.313) < 0.001 and abs(cost["teacher"] / B - 1.217) < 0.001


# ---- heads, targets, losses -----------------------------------------------------------------------------------------

def test_head_equals_the_reference():
    meta, z = golden("losses")
    h = meta["head"]
    head = DINOHead(meta["embed_dim"], meta["K"], h["hidden"], h["bottleneck"], h["nlayers"])
    head.load_state_dict(subset(z, "head_sd/"), strict=True)
    close(head(z["head/x"]), z["head/y"])
    assert set(DINOHead(8, 16, 8, 4, weight_norm=False).state_dict()) >= {"last_layer.weight", "mlp.4.bias"}
    with torch.no_grad():
        for p in head.mlp[4].parameters():
            p.mul_(1e-4)
    close(head(z["head/x"]), z["head/y"], atol=1e-4)  # only the direction of the bottleneck counts


def test_initial_tokens_and_weights():
    for config, std in ((ViTConfig(depth=1, registers=4), 1e-6), (replace(ARCHS["dinov3_vits16"], depth=1), 0.02)):
        torch.manual_seed(0)
        vit = ViT(config)
        tokens = getattr(vit, vit.registers_name)
        assert 0.7 * std < tokens.std() < 1.3 * std and vit.mask_token.abs().max() == 0
        assert 0.018 < vit.blocks[0].attn.qkv.weight.std() < 0.022 and vit.blocks[0].mlp.fc1.bias.abs().max() == 0
        assert vit.blocks[0].ls1.gamma.unique().tolist() == [pytest.approx(1e-5)]


def test_dino_loss_targets_and_gradients():
    meta, z = golden("losses")
    targets = model.sinkhorn(z["dino/teacher_logits"], meta["teacher_temp"])
    close(targets.roll(meta["B"], 0), z["dino/sinkhorn_targets_swapped"])
    on_global, on_local = (z[f"dino/student_{k}_logits"].clone().requires_grad_() for k in ("global", "local"))
    loss_global, loss_local = model.dino_loss(on_global, on_local, targets)
    close(loss_global, z["dino/loss_global"])
    close(loss_local, z["dino/loss_local"])
    (loss_global + loss_local).backward()
    close(on_global.grad, z["dino/grad_student_global"], atol=1e-6, rtol=1e-4)
    close(on_local.grad, z["dino/grad_student_local"], atol=1e-6, rtol=1e-4)


def test_sinkhorn_survives_large_logits_and_small_temperatures():
    _, z = golden("losses")
    x = z["dino/teacher_logits"]
    close(model.sinkhorn(x + 50.0, 0.05), model.sinkhorn(x, 0.05), atol=1e-4, rtol=1e-3)
    close(model.sinkhorn(x, 0.05).sum(1), torch.ones(len(x)))
    far = x.clone()
    far[:, 3] -= 20  # a dead prototype
    far[5] += 20  # a row beyond all others: exp of the rest underflows
    assert torch.isfinite(model.sinkhorn(far, 0.04)).all()


def test_sinkhorn_in_many_chunks_equals_the_algorithm_as_printed():
    x = torch.nn.functional.normalize(torch.randn(700, 8), dim=1) @ torch.randn(8, 4096) / 8  # three chunks
    for logits in (x, x.bfloat16()):
        q = (logits.double() / 0.06).exp()
        for _ in range(3):
            q /= q.sum(0)
            q /= q.sum(1, keepdim=True)
        got = model.sinkhorn(logits, 0.06)
        assert got.dtype == torch.float32
        close(got, q.float(), atol=1e-9, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cross_entropy_in_many_chunks_equals_autograd_and_keeps_nothing_but_the_gradient(dtype):
    targets, weights = torch.rand(500, 4096).softmax(1), torch.rand(3, 500)
    start, kept, found = (3 * torch.randn(3, 500, 4096)).to(dtype), [], []

    def ours(x):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.detach()) or t, lambda t: t):
            return model.cross_entropy(x, targets, 0.1)

    def plain(x):
        return -(targets * (x.float() / 0.1).log_softmax(-1)).sum(-1)

    for form in (ours, plain):
        x = start.clone().requires_grad_()
        loss = form(x)
        (loss * weights).sum().backward()
        found.append((loss.detach(), x.grad))
    close(found[0][0], found[1][0], rtol=1e-5)
    assert found[0][1].dtype == dtype
    exact = dtype == torch.float32
    close(found[0][1], found[1][1], atol=1e-6 if exact else 1e-4, rtol=1e-5 if exact else 2**-7)
    assert [(t.dtype, t.shape) for t in kept] == [(dtype, start.shape)]
    assert model.cross_entropy(start[:, :0], targets[:0], 0.1).shape == (3, 0)


def test_a_second_backward_of_the_cross_entropy_is_refused_rather_than_wrong():
    x = torch.randn(4, 8, requires_grad=True)
    loss = model.cross_entropy(x, torch.rand(4, 8).softmax(1), 0.1).sum() * 2
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_softmax_centering_over_three_batches():
    meta, z = golden("losses")
    center = torch.zeros(1, meta["K"])
    for i in range(3):
        logits = z[f"center/teacher_logits{i}"]
        close(model.softmax_center(logits, center, meta["teacher_temp"]), z[f"center/targets{i}"])
        center = model.update_center(center, logits)
    close(center, z["center/center_after"])


def test_ibot_loss_and_gradients():
    meta, z = golden("losses")
    masks, logits = z["ibot/masks"], z["ibot/student_logits"].clone().requires_grad_()
    targets = model.sinkhorn(z["ibot/teacher_logits"], meta["teacher_temp"])
    close(targets, z["ibot/sinkhorn_targets"])
    weights = (1 / masks.sum(1).clamp(min=1))[:, None].expand_as(masks)[masks]
    loss = model.ibot_loss(logits, targets, weights, len(masks))
    close(loss, z["ibot/loss_forward_masked"])
    loss.backward()
    close(logits.grad, z["ibot/grad_student"], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("loss, key", [("koleo_loss", "koleo"), ("kde_loss_openmidnight", "kde_openmidnight_kappa5")])
def test_spreading_terms_equal_the_reference(loss, key):
    _, z = golden("losses")
    x = z["reg/x"].clone().requires_grad_()
    value = getattr(model, loss)(x)
    close(value, z[f"reg/{key}"])
    value.backward()
    close(x.grad, z[f"reg/{key.removesuffix('_kappa5')}_grad"], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("loss, sign", [(model.kde_loss, 1), (model.koleo_loss, 1), (model.kde_loss_openmidnight, -1)])
def test_the_regulariser_falls_when_points_spread_unless_it_is_the_released_one(loss, sign):
    torch.manual_seed(0)
    center, spread = torch.randn(1, 32), torch.randn(24, 32)
    close_together, apart = loss(center + 0.1 * spread), loss(spread)
    assert sign * (close_together - apart) > 0.1
    x = (center + 0.5 * spread).requires_grad_()
    loss(x).backward()
    moved = x - 10 * x.grad
    cos = [torch.nn.functional.cosine_similarity(y[:, None], y[None], dim=-1).mean() for y in (x, moved)]
    assert sign * (cos[0] - cos[1]) > 0, "descending the loss must spread (the released form: gather) the points"


def test_kde_is_the_mean_log_density_without_the_point_itself():
    x = torch.randn(7, 5)
    z = torch.nn.functional.normalize(x, dim=1)
    direct = np.mean([np.log(np.mean([np.exp(5 * float(z[i] @ z[j])) for j in range(7) if j != i])) for i in range(7)])
    assert abs(model.kde_loss(x).item() - direct) < 1e-5
    assert abs(model.kde_loss(torch.ones(4, 3)).item() - 5) < 1e-5  # collapsed: log exp(kappa)


# ---- teacher average, groups, schedules -----------------------------------------------------------------------------

def student(arch=None):
    c = arch or ViTConfig(14, 32, 3, 2, "mlp", 64, registers=4, pos_grid=4)
    return torch.nn.ModuleDict({"backbone": ViT(c), "dino_head": DINOHead(c.embed_dim, 16, 8, 4),
                                "ibot_head": DINOHead(c.embed_dim, 16, 8, 4)})


def test_parameter_groups_of_the_dinov2_recipe():
    with torch.device("meta"):
        backbone = ViT(ARCHS["dinov2_vitg14_reg"])
    groups = model.param_groups(torch.nn.ModuleDict({"backbone": backbone}))
    count = {(g["lr_scale"], g["wd_scale"]): len(g["params"]) for g in groups}
    assert count == {(1.0, 0.0): 402, (1.0, 1.0): 164, (0.2, 1.0): 1, (0.2, 0.0): 1}


def test_every_trainable_parameter_is_in_exactly_one_group_with_its_multipliers():
    s = student()
    s["backbone"].cls_token.requires_grad_(False)
    groups = model.param_groups(s, layer_decay=0.5)
    ids = [id(p) for g in groups for p in g["params"]]
    assert len(ids) == len(set(ids)) == sum(p.requires_grad for p in s.parameters())
    where = {id(p): g for g in groups for p in g["params"]}
    b = s["backbone"]
    for p, lr, wd, last in [(b.patch_embed.proj.weight, 0.2 * 0.5**4, 1, 0), (b.pos_embed, 0.5**4, 1, 0),
                            (b.register_tokens, 0.5**4, 1, 0), (b.mask_token, 0.5**4, 1, 0),
                            (b.blocks[0].attn.qkv.weight, 0.5**3, 1, 0), (b.blocks[2].ls1.gamma, 0.5, 0, 0),
                            (b.blocks[2].norm1.weight, 0.5, 0, 0), (b.norm.weight, 1, 0, 0),
                            (s["dino_head"].mlp[0].weight, 1, 1, 0), (s["dino_head"].mlp[0].bias, 1, 0, 0),
                            (s["ibot_head"].last_layer.weight_v, 1, 1, 1),
                            (s["ibot_head"].last_layer.weight_g, 1, 1, 1)]:
        g = where[id(p)]
        assert (g["lr_scale"], g["wd_scale"], g["last_layer"]) == (lr, wd, last)


def test_schedule_end_points_and_monotonicity():
    lr = [model.cosine_schedule(s, 1.0, 0.1, 100, 20) for s in range(120)]
    assert lr[0] == 0 and lr[19] == 1.0 == max(lr) and lr[100:] == [0.1] * 20
    assert all(a < b for a, b in zip(lr[:19], lr[1:20])) and all(a > b for a, b in zip(lr[20:99], lr[21:100]))
    assert model.cosine_schedule(0, 1.0, 0.1, 100) == 1.0  # no warm-up: no step with learning rate 0
    assert model.cosine_schedule(0, 1.0, 0.1, 100, 1, 0.5) == 0.5


# ---- weight files ---------------------------------------------------------------------------------------------------

def test_a_518_px_table_gives_the_reference_features_at_224_px(tmp_path):
    """The bug to catch: positions assigned to the wrong object, so that training starts from random ones."""
    vit, _ = build("vit_dinov2_reg4_swiglu")
    torch.save(vit.state_dict(), tmp_path / "w.pth")
    at_16, x = ViT(replace(vit.arch, pos_grid=16)), torch.randn(2, 3, 224, 224)
    at_16.load_state_dict(at_16.state_dict() | model.first_weights(tmp_path / "w.pth", at_16.arch))
    assert at_16.pos_embed.shape == (1, 257, 64)
    close(at_16.eval()(x)["cls"], vit(x)["cls"])
    assert "pos_embed" not in model.first_weights(tmp_path / "w.pth", at_16.arch, "random"), "it stays as drawn"
