"""A step waits for no result: what would make a GPU's host wait, found on a CPU. tests/gpu has CUDA's own alarm."""
import sys
from collections import Counter

import pytest
import torch
from test_train import ROOT, flags, rows, train
from torch.utils._python_dispatch import TorchDispatchMode

import data

# of which the first is item, bool(), int(), float(); the rest make shapes that depend on values, or compare
WAITS = set("_local_scalar_dense nonzero masked_select equal _unique2 unique_dim unique_consecutive bincount".split())
SCRIPTS = {p.name for p in ROOT.glob("*.py")}


class Waits(TorchDispatchMode):
    """{(file:function of ours, operation): times} of operations whose result the host needs."""

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.__name__.split(".")[0]
        indices = args[1] if len(args) > 1 and isinstance(args[1], (list, tuple)) else ()
        masks = "index" in name and any(torch.is_tensor(i) and i.dtype == torch.bool for i in indices)
        if name in WAITS or masks:
            frame = sys._getframe()
            while frame and frame.f_code.co_filename.rpartition("/")[2] not in SCRIPTS:
                frame = frame.f_back
            at = f"{frame.f_code.co_filename.rpartition('/')[2]}:{frame.f_code.co_name}" if frame else "torch"
            self.seen[at, name] += 1
        return function(*args, **kwargs or {})


def waits(monkeypatch, argv):
    """Of steps 2 and 3 of 5: from when step 2's batch is there to when step 4's is asked for."""
    watch, batch = Waits(), data.Batches.__getitem__

    def made(self, step):
        if step == 4:
            watch.__exit__(None, None, None)
        if step == 3:  # making a batch is the workers' work
            watch.__exit__(None, None, None)
        out = batch(self, step)
        if step in (2, 3):
            watch.__enter__()
        return out
    monkeypatch.setattr(data.Batches, "__getitem__", made)
    train(monkeypatch, argv)
    return watch.seen


RUNS = {"defaults": {}, "others": dict(centering="softmax", kde="koleo", hed="openmidnight", fp8="force", depth=1,
                                       batch_size=2, global_px=28, local_px=14,
                                       clip_grad=0, activation_checkpointing="selective", drop_path=0.0),
        "dinov3": dict(arch="dinov3_vits16", depth=2, global_px=64, local_px=32, rope_rescale=2.0, kde="none",
                       head_weight_norm="False", activation_checkpointing="full"),
        "released": dict(kde="openmidnight", local_crops=0)}
ON_THE_HOST = {"data.py:change"}  # indices from the colour parameters, constants: never on a GPU


@pytest.mark.parametrize("keys", RUNS.values(), ids=RUNS)
def test_a_step_waits_for_no_result(keys, tiles, tmp_path, monkeypatch):
    seen = waits(monkeypatch, flags(tiles=tiles, out_dir=tmp_path / "a", max_steps=5, log_interval=100, **keys))
    assert seen and {at for at, _ in seen} <= ON_THE_HOST, seen
    assert rows(tmp_path / "a")[-1]["loss"] > 0, "these keys train"


def test_and_at_log_points_they_are(tiles, tmp_path, monkeypatch):
    seen = waits(monkeypatch, flags(tiles=tiles, out_dir=tmp_path / "a", max_steps=5, log_interval=1))
    assert any(at.startswith("train.py") for at, _ in seen), seen
