"""
Called by test_sharding.py on one rank or several. `save` writes a checkpoint of
networks and moments drawn from seed 1, and measures the memory that it needs. `load` reads it into others and compares
them with seed 1 drawn again: first values do not depend on the ranks, and neither may what a checkpoint holds.
"""
import gc
import math
import time
import weakref

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import checkpoint
import model
import sharding

CONFIG = model.ViTConfig(14, 96, 3, 3, "swiglu", 160, 4, pos_grid=5, layerscale=1.0)


class Peak(TorchDispatchMode):
    """
    The most bytes of new storages that live at once. Gloo's threads drop a collective's tensors a moment after they
    have reported it, later on a busy machine: where more than `allowed` live, they get ten seconds for it.
    """

    def __init__(self, allowed):
        super().__init__()
        self.allowed, self.live, self.most, self.count = allowed, {}, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        known = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if type(t) is torch.Tensor}
        for t in (t for t in tree_leaves(out) if type(t) is torch.Tensor):
            storage = t.untyped_storage()
            if storage._cdata not in known:
                known.add(storage._cdata)
                self.count += 1
                self.live[self.count] = storage.nbytes()
                weakref.finalize(storage, self.live.pop, self.count)
        deadline = time.monotonic() + 10
        while self.now() > self.allowed and time.monotonic() < deadline:
            gc.collect()
            time.sleep(0.01)
        self.most = max(self.most, self.now())
        return out

    def now(self):
        return sum(list(self.live.values()))


def build(seed):
    """(student and teacher, optimizer with random moments)."""
    with torch.device("meta"):
        parts = [dict(backbone=model.ViT(CONFIG), dino_head=model.DINOHead(96, 33, 24, 8)) for _ in range(2)]
        nets = torch.nn.ModuleDict(zip(("student", "teacher"), map(torch.nn.ModuleDict, parts)))
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for i, (name, net) in enumerate(nets.items()):
        sharding.shard(net, mesh, bf16=False, trained=name == "student")
        sharding.materialize(net, "cpu", seed + 10 * i)
    optimizer = torch.optim.AdamW(model.param_groups(nets["student"]), lr=1e-3, fused=True)
    for (name, p), part in ((item, key) for key, m in nets["student"].items() for item in m.named_parameters()):
        moments = [torch.zeros_like(p), torch.zeros_like(p)]
        for j, moment in enumerate(moments):
            sharding.copy_rows(moment, sharding.draw(nets["student"][part], f"{part}.{name}", p.shape, "cpu", seed + j))
        optimizer.state[p] = {"step": torch.tensor(float(seed)), "exp_avg": moments[0], "exp_avg_sq": moments[1]}
    return nets, optimizer


def tensors(nets, optimizer):
    yield from ((k, sharding.local(v)) for k, v in nets.state_dict().items())
    for name, p in nets["student"].named_parameters():
        yield from ((f"{name} {k}", sharding.local(v)) for k, v in optimizer.state[p].items())


def save(folder):
    nets, optimizer = build(1)
    shards = sum(t.nbytes for _, t in tensors(nets, optimizer))
    largest = max(p.numel() * 4 for p in nets["teacher"]["backbone"].parameters())
    receives = dist.get_rank() == 0  # and so holds the whole export
    with Peak(math.inf if receives else 1.01 * largest) as exporting:
        whole = dict(sharding.gathered(nets["teacher"]["backbone"]))
    saver = checkpoint.Saver(folder, 2, 0)
    with Peak(1.01 * shards) as saving:
        saver.save(1, dict(zip(("model", "optimizer"), get_state_dict(nets, optimizer))))
    saver.finish()
    assert dist.get_rank() == 0 or all(v is None for v in whole.values())
    return largest, exporting.most, shards, saving.most


def load(folder):
    (nets, optimizer), wanted = build(2), build(1)
    state = dict(zip(("model", "optimizer"), get_state_dict(nets, optimizer)))
    assert checkpoint.load(folder, state, print) == 1
    set_state_dict(nets, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    for (name, a), (_, b) in zip(tensors(nets, optimizer), tensors(*wanted), strict=True):
        assert torch.equal(a, b) and not torch.isnan(a).any(), name


def on_rank(function, folder):
    dist.init_process_group("gloo")
    returned = function(folder)
    dist.destroy_process_group()
    return returned
