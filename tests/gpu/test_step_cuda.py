"""train.py's step on a GPU: bf16 near the CPU's fp32, no wait for a result, what it holds. Skipped without one."""
import shutil
import subprocess
import sys

import pytest
import test_sharding
import torch
from conftest import ROOT
from test_train import flags, rows, train, weights

import data
import model
import sharding
from bench import budget
from prepare.stats import train_config

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def test_losses_are_near_those_of_the_cpu(tiles, tmp_path, monkeypatch):
    """Both resume a checkpoint of the CPU's: each device draws first weights of its own. Crops come from the CPU."""
    keys = dict(arch="toy", tiles=tiles, drop_path=0.0, schedule_steps=5)
    train(monkeypatch, flags(**keys, device="cpu", max_steps=1, out_dir=tmp_path / "cpu"))
    shutil.copytree(tmp_path / "cpu", tmp_path / "cuda")
    losses = []
    for device in ("cpu", "cuda"):
        train(monkeypatch, flags(**keys, device=device, max_steps=5, resume="true", out_dir=tmp_path / device))
        losses.append([row["loss"] for row in rows(tmp_path / device)[2:]])
    assert len(losses[0]) == 4 and losses[0][0] == pytest.approx(losses[1][0], rel=0.02)  # the same weights and crops
    assert losses[0] == pytest.approx(losses[1], rel=0.2)


@pytest.mark.parametrize("keys", [{}, dict(centering="softmax", kde="koleo", hed="openmidnight", clip_grad=0),
                                  dict(activation_checkpointing="selective", fp8="force", compile="true")])
def test_a_step_waits_for_no_result(keys, tiles, tmp_path, monkeypatch):
    """CUDA's alarm is on from the batch of step 3 to its average. Compiling, which waits, is over by then."""
    batch, average = data.Batches.__getitem__, sharding.update_ema

    def made(self, step):
        out = batch(self, step)
        torch.cuda.set_sync_debug_mode("error" if step == 3 else "default")
        return out

    def averaged(*args):
        average(*args)
        torch.cuda.set_sync_debug_mode("default")
    monkeypatch.setattr(data.Batches, "__getitem__", made)
    monkeypatch.setattr(sharding, "update_ema", averaged)
    try:
        keys = dict(keys, arch="toy", tiles=tiles, device="cuda", max_steps=5, log_interval=100, out_dir=tmp_path / "a")
        train(monkeypatch, flags(**keys))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("arch", [test_sharding.V2, test_sharding.V3], ids=["dinov2", "dinov3"])
def test_activation_checkpointing_gives_the_same_bits(arch, monkeypatch):
    monkeypatch.setattr(torch, "randn", lambda *a, real=torch.randn: real(*a).cuda())
    monkeypatch.setattr(torch, "rand", lambda *a, real=torch.rand: real(*a).cuda())
    first = model.ViT(arch).state_dict()
    grads = []
    for mode in sharding.CHECKPOINTING:
        net = model.ViT(arch).cuda()
        net.load_state_dict(first)
        sharding.checkpoint_activations(net.blocks, mode)
        grads.append(test_sharding.gradients(net, arch)[0])
    for other in grads[1:]:
        for k, v in grads[0].items():
            torch.testing.assert_close(other[k], v, rtol=1e-5, atol=1e-6)  # atomics sum in any order


def test_a_resumed_run_equals_an_uninterrupted_one(tiles, tmp_path, monkeypatch):
    keys = dict(arch="toy", tiles=tiles, device="cuda", schedule_steps=6, save_interval=3)
    straight = train(monkeypatch, flags(**keys, max_steps=6, out_dir=tmp_path / "a"))
    train(monkeypatch, flags(**keys, max_steps=3, out_dir=tmp_path / "b"))
    resumed = train(monkeypatch, flags(**keys, max_steps=6, out_dir=tmp_path / "b", resume="true"))
    for k, v in weights(straight).items():
        torch.testing.assert_close(weights(resumed)[k], v, rtol=1e-3, atol=1e-5)


def test_an_export_holds_one_whole_tensor_more(tiles, tmp_path, monkeypatch):
    gathered, extra = sharding.gathered, []

    def watched(module):
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        yield from gathered(module)
        extra.append(torch.cuda.max_memory_allocated() - before)
    monkeypatch.setattr(sharding, "gathered", watched)
    run = train(monkeypatch, flags(arch="toy", tiles=tiles, device="cuda", out_dir=tmp_path / "a"))
    largest = max(p.numel() * 4 for p in run["teacher"]["backbone"].parameters())
    assert extra and max(extra) <= 1.01 * largest


def test_the_dry_run_predicts_the_peak(tiles, tmp_path):
    """Each run has a process of its own, because hooks of an earlier one in the same process keep its nets alive."""
    keys = dict(arch="dinov2_vitl14_reg", depth=6, tiles=tiles, device="cuda", global_px=224, local_px=98,
                local_crops=8, batch_size=8, max_steps=3)
    for mode in sharding.CHECKPOINTING:
        argv = flags(**keys, activation_checkpointing=mode, out_dir=tmp_path / mode)
        subprocess.run([sys.executable, "train.py", *argv], cwd=ROOT, check=True)
        planned = budget.estimate(train_config(argv), 1)["memory_gb"] - budget.CONTEXT / 1e9  # which PyTorch leaves out
        assert rows(tmp_path / mode)[-1]["peak_gb"] == pytest.approx(planned, rel=0.1), mode
