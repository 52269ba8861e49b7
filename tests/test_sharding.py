"""Activation checkpointing, sharding, first values, resharding, and the memory that a save needs."""
import gc
import math
import os
import socket
import time
import weakref
from collections import Counter
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from conftest import one_line
from test_train import bit_equal, flags, rows, train, weights
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import checkpoint
import model
import sharding

V2 = model.ViTConfig(14, 64, 2, 2, "mlp", 128, 4, pos_grid=4, layerscale=1.0, drop_path=0.4)
V3 = model.ViTConfig(16, 64, 3, 2, "swiglu", 96, 4, "rope", qkv_bias=False, layerscale=1.0, drop_path=0.4,
                     rope_rescale=2.0, local_cls_norm=True)
FAMILIES = pytest.mark.parametrize("arch", [V2, V3], ids=["dinov2", "dinov3"])


class Count(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls[function] += 1
        return function(*args, **kwargs or {})


def test_each_part_is_clipped_to_its_own_norm():
    """Norms are those before clipping; a part below the limit stays as it is, and 0 clips none."""
    student = torch.nn.ModuleDict({name: torch.nn.Linear(4, 3) for name in ("backbone", "dino_head", "ibot_head")})
    for part, scale in zip(student.values(), (10.0, 5.0, 0.01)):
        for p in part.parameters():
            p.grad = scale * torch.ones_like(p)
    before = torch.tensor([10.0, 5.0, 0.01]) * 15**0.5
    torch.testing.assert_close(sharding.clip_gradients(student, 0), before)
    torch.testing.assert_close(sharding.clip_gradients(student, 3.0), before)
    torch.testing.assert_close(sharding.clip_gradients(student, 0), before.clamp(max=3.0))


def gradients(net, arch):
    """(gradients, products in forward, in backward, repeated norms) of a multi-crop pass with drop path."""
    torch.manual_seed(0)
    p = arch.patch_size
    x = [torch.randn(10, 3, 4 * p, 4 * p), torch.randn(15, 3, 2 * p, 2 * p)]
    net.zero_grad(set_to_none=True)
    with Count() as forward:
        out = net.train()(x, [torch.rand(10, 16) < 0.3, None])
    loss = sum(o["cls"].square().sum() + (o["patches"] * o["patches"].detach().sin()).sum() for o in out)
    with Count() as backward:
        loss.backward()
    grads = {k: v.grad.clone() for k, v in net.named_parameters() if v.grad is not None}
    norms = backward.calls[torch.ops.aten.native_layer_norm.default]
    return grads, *(sum(n for f, n in m.calls.items() if f in sharding.PRODUCTS) for m in (forward, backward)), norms


@FAMILIES
def test_activation_checkpointing_recomputes_what_it_says_and_gives_the_same_bits(arch):
    torch.manual_seed(1)
    nets = {mode: model.ViT(arch) for mode in sharding.CHECKPOINTING}
    for mode, net in nets.items():
        net.load_state_dict(nets["none"].state_dict())
        sharding.checkpoint_activations(net.blocks, mode)
    grads, forward, backward, norms = zip(*(gradients(net, arch) for net in nets.values()))
    assert norms == (0, 2 * arch.depth, 2 * arch.depth)  # elementwise work is not kept
    bit_equal(grads[0], grads[1])
    bit_equal(grads[0], grads[2])
    assert forward[0] == forward[1] == forward[2] >= 6 * arch.depth
    assert backward[1] == backward[0]  # products with a bias included, which Meta's list forgets
    last = arch.depth  # a block's last product need not be repeated, as only the sum after it uses it
    assert forward[0] - last <= backward[2] - backward[0] <= forward[0], (forward, backward)


def plain_residual(x, shapes, kept, branch):
    """model.residual by autograd alone."""
    rows, kept_shapes = kept
    subset = x[rows]
    parts = zip(shapes, kept_shapes, model.split(subset, kept_shapes),
                model.split(branch(subset, kept_shapes), kept_shapes))
    return x.index_put((rows,), torch.cat([s.add(c, alpha=B / keep) for (B, _), (keep, _), s, c in parts]))


@FAMILIES
@pytest.mark.parametrize("mode", sharding.CHECKPOINTING)
def test_backward_of_drop_path_fills_and_sorts_nothing_and_has_the_bits_of_the_plain_form(arch, mode, monkeypatch):
    torch.manual_seed(1)
    net = model.ViT(arch)
    sharding.checkpoint_activations(net.blocks, mode)
    grads = gradients(net, arch)[0]
    shapes = [(10, 17), (15, 5)]
    x = torch.randn(10 * 17 + 15 * 5, arch.embed_dim, requires_grad=True)
    kept = [model.draw_kept(shapes, 0.4, "cpu") for _ in range(2)]
    out = net.blocks[0](x, shapes, [None, None], kept)
    with Count() as backward:
        out.backward(x.detach())
    assert not {"aten::index_put_", "aten::_index_put_impl_", "aten::index_put", "aten::clone"} & {
        op._schema.name for op in backward.calls}, "q, k, v's gradients are copied, or rows filled, sorted and added"
    monkeypatch.setattr(model, "residual", plain_residual)
    bit_equal(grads, gradients(net, arch)[0])


def test_a_run_is_the_same_to_the_bit_whatever_it_keeps_and_prefetches(tiles, tmp_path, monkeypatch):
    runs = [{}, dict(activation_checkpointing="selective"), dict(activation_checkpointing="full", prefetch=0)]
    first, *others = (weights(train(monkeypatch, flags(tiles=tiles, max_steps=2, out_dir=tmp_path / str(i), **keys)))
                      for i, keys in enumerate(runs))
    for other in others:
        bit_equal(first, other)


def test_the_teacher_starts_as_the_student_and_an_infinite_gradient_changes_nothing(tiles, tmp_path, monkeypatch):
    """Also where the loss is finite."""
    start = weights(train(monkeypatch, flags(tiles=tiles, max_steps=0, out_dir=tmp_path / "start")))
    student, teacher = ({k.removeprefix(net): v for k, v in start.items() if k.startswith(net)}
                        for net in ("student", "teacher"))
    bit_equal(student, teacher)
    assert any(k.startswith(".dino_head.") for k in student)
    clip = sharding.clip_gradients

    def spoil(student, max_norm):
        sharding.local(student["dino_head"].mlp[0].weight.grad)[0, 0] = float("inf")
        return clip(student, max_norm)
    monkeypatch.setattr(sharding, "clip_gradients", spoil)
    run = train(monkeypatch, flags(tiles=tiles, max_steps=1, out_dir=tmp_path / "spoilt"))
    bit_equal(start, weights(run))
    assert run["progress"]["bad_steps"] == 1 and torch.isfinite(torch.tensor(rows(tmp_path / "spoilt")[-1]["loss"]))


def test_blocks_ahead_are_named_to_fsdp_nearest_first(mesh):
    net = sharded(model.replace(V2, depth=4), mesh, prefetch=2)
    states = [block._get_fsdp_state() for block in net["backbone"].blocks]
    assert [s._states_to_forward_prefetch for s in states] == [states[1:3], states[2:4], states[3:], []]
    assert [s._states_to_backward_prefetch for s in states] == [[], states[:1], states[1::-1], states[2:0:-1]]


@pytest.fixture
def mesh():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def sharded(arch, mesh, prefetch=1):
    with torch.device("meta"):
        net = torch.nn.ModuleDict({"backbone": model.ViT(arch), "dino_head": model.DINOHead(64, 32, 16, 8)})
    sharding.shard(net, mesh, bf16=False, trained=True, prefetch=prefetch)
    return net


def join(rank, world, port):
    os.environ |= dict(RANK=rank, WORLD_SIZE=world, MASTER_ADDR="localhost", MASTER_PORT=port)
    sharding.JOIN = timedelta(seconds=1)
    with pytest.raises(SystemExit) as e:
        sharding.begin("cpu")
    return str(e.value)


@pytest.mark.parametrize("rank, world, reason", [("0", "1", "address already in use"), ("0", "2", "1/2 clients"),
                                                 ("1", "2", "timed out")])
def test_ranks_that_do_not_meet_say_so_within_minutes(rank, world, reason, on_ranks):
    """The bug: a traceback where the port is in use, and half an hour of silence where a rank is missing."""
    with socket.create_server(("localhost", 0)) as taken:
        port = taken.getsockname()[1]
        if world == "2":
            taken.close()
        said, = on_ranks(1, join, rank, world, str(port))
    assert f"rank {rank} of {world} ranks met no other at localhost:{port}" in said and reason in said
    assert "\n" not in said and sharding.JOIN <= timedelta(minutes=10)


@pytest.mark.parametrize("local, part", [
    ("", "not set: LOCAL_RANK"), ("2", "LOCAL_RANK = 2, and this process sees 2 GPUs"), ("x", "LOCAL_RANK = x")])
def test_each_rank_needs_a_gpu_of_its_own(local, part, monkeypatch):
    """The bug: all ranks of a node on its first GPU, or CUDA's invalid device ordinal."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    launch = dict(RANK="2", WORLD_SIZE="4", MASTER_ADDR="localhost", MASTER_PORT="1", LOCAL_RANK=local)
    for name, value in launch.items():
        monkeypatch.setenv(name, value)
    with one_line(part):
        sharding.begin("cuda")


@FAMILIES
def test_a_forgotten_first_value_shows(arch, mesh, monkeypatch):
    net = sharded(arch, mesh)
    sharding.materialize(net, "cpu", 0)
    assert not any(torch.isnan(sharding.local(t)).any() for _, t in model.named_tensors(net))
    init = model.ViT.init_tensor
    monkeypatch.setattr(model.ViT, "init_tensor", lambda self, name, *a: name != "norm.bias" and init(self, name, *a))
    sharding.materialize(net, "cpu", 0)
    assert net["backbone"](torch.randn(1, 3, 2 * arch.patch_size, 2 * arch.patch_size))["cls"].isnan().all()
    monkeypatch.undo()
    with torch.device("meta"):
        net["backbone"].gate = torch.nn.Parameter(torch.empty(3))
    with pytest.raises(AssertionError, match="no first values are known for gate"):
        sharding.materialize(net, "cpu", 0)


def test_first_values_have_their_spread_and_a_seed_a_name(mesh):
    net = sharded(V2, mesh)
    sharding.materialize(net, "cpu", 0)
    a = {k: v.full_tensor() for k, v in net.state_dict().items()}
    for name, std in (("backbone.blocks.0.attn.qkv.weight", 0.02), ("backbone.blocks.1.mlp.fc2.weight", 0.02),
                      ("backbone.pos_embed", 0.02), ("backbone.patch_embed.proj.weight", (3 * 3 * 14**2) ** -0.5),
                      ("dino_head.mlp.0.weight", 0.02), ("dino_head.last_layer.weight_v", (3 * 8) ** -0.5)):
        assert a[name].std() == pytest.approx(std, rel=0.1), name
    assert (a["dino_head.last_layer.weight_g"] == 1).all() and (a["backbone.blocks.0.ls1.gamma"] == 1).all()
    assert not torch.equal(a["backbone.blocks.0.attn.qkv.weight"], a["backbone.blocks.1.attn.qkv.weight"])
    sharding.materialize(net, "cpu", 1)
    assert not torch.equal(a["backbone.pos_embed"], net["backbone"].pos_embed.full_tensor())


SMALL = model.ViTConfig(14, 96, 3, 3, "swiglu", 160, 4, pos_grid=5, layerscale=1.0)


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


def drawn(seed, shape):
    """(student and teacher, optimizer with random moments), sharded on a mesh of this shape."""
    with torch.device("meta"):
        parts = [dict(backbone=model.ViT(SMALL), dino_head=model.DINOHead(96, 33, 24, 8)) for _ in range(2)]
        nets = torch.nn.ModuleDict(zip(("student", "teacher"), map(torch.nn.ModuleDict, parts)))
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("nodes", "ranks")[-len(shape):])
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


def save_checkpoint(folder, shape):
    nets, optimizer = drawn(1, shape)
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


def load_checkpoint(folder, shape):
    (nets, optimizer), wanted = drawn(2, shape), drawn(1, shape)
    state = dict(zip(("model", "optimizer"), get_state_dict(nets, optimizer)))
    assert checkpoint.load(folder, state, print) == 1
    set_state_dict(nets, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    for (name, a), (_, b) in zip(tensors(nets, optimizer), tensors(*wanted), strict=True):
        assert torch.equal(a, b) and not torch.isnan(a).any(), name


def on_rank(function, *arguments):
    dist.init_process_group("gloo")
    returned = function(*arguments)
    dist.destroy_process_group()
    return returned


@pytest.mark.parametrize("before, after", [((2,), (1,)), ((2, 2), (2,)), *(
    pytest.param(*shapes, marks=pytest.mark.slow) for shapes in (((1,), (2,)), ((2,), (2,)), ((2,), (2, 2))))])
def test_checkpoints_are_exact_on_any_mesh_and_nothing_whole_is_built(before, after, on_ranks, tmp_path):
    """A rank that receives no export needs one whole tensor for it, and for a save a host copy of its own shards."""
    saved = on_ranks(math.prod(before), on_rank, save_checkpoint, str(tmp_path), before)
    largest, exporting, shards, saving = saved[-1]
    written = sum(file.stat().st_size for file in tmp_path.rglob("*.distcp"))
    assert written < 1.2 * before[-1] * shards, "a node's copy is written too"
    if len(saved) > 1:
        assert exporting <= 1.01 * largest and saving <= 1.01 * shards, (exporting, largest, saving, shards)
    on_ranks(math.prod(after), on_rank, load_checkpoint, str(tmp_path), after)


@pytest.mark.parametrize("stated", ["", "3", "x"])
def test_hybrid_needs_nodes_of_one_size(stated, monkeypatch):
    for name, value in dict(RANK="0", WORLD_SIZE="4", MASTER_ADDR="localhost", MASTER_PORT="1").items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", stated)
    with one_line("of 4 ranks: hybrid = True needs the same number of ranks on each node"):
        sharding.begin("cpu", hybrid=True)


def different_nodes():
    os.environ["LOCAL_WORLD_SIZE"] = "1" if os.environ["RANK"] == "0" else "2"
    with one_line("LOCAL_WORLD_SIZE differs between nodes"):
        sharding.begin("cpu", hybrid=True)


def test_hybrid_refuses_nodes_that_differ_though_each_number_divides_the_world(on_ranks):
    on_ranks(2, different_nodes)


def test_a_node_s_ranks_are_the_mesh_s_last_dimension(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert sharding.mesh_shape(8, True) == (2, 4) and sharding.mesh_shape(8, False) == (8,)


LARGE = model.ViTConfig(14, 512, 8, 8, "mlp", 2048, 4, pos_grid=8)


def anonymous():
    """Bytes of this process that belong to no file."""
    with open("/proc/self/status") as lines:
        return 1024 * int(next(line for line in lines if line.startswith("RssAnon")).split()[1])


def load_weights(path):
    """Bytes that opening a weight file costs, that first values from it cost, and of the parameters."""
    net = sharded(LARGE, init_device_mesh("cpu", (1,)))
    sharding.materialize(net, "cpu", 0)
    before = anonymous()
    given = model.first_weights(path, LARGE)
    opened = anonymous()
    sharding.materialize(net, "cpu", 0, given)
    loaded, whole = anonymous(), torch.load(path, weights_only=True)
    for name, p in net["backbone"].named_parameters():
        assert torch.equal(p.full_tensor(), whole[name]), name
    return opened - before, loaded - before, sum(p.numel() * 4 for p in net.parameters())


def test_weights_stay_in_their_file_until_a_rank_takes_its_rows(on_ranks, tmp_path):
    """The bug: each of 8 ranks reads the whole of a 7B's file into memory of its own."""
    torch.manual_seed(0)
    path = tmp_path / "weights.pth"
    torch.save(model.ViT(LARGE).state_dict(), path)
    (opened, loaded, size), = on_ranks(1, on_rank, load_weights, path)
    assert opened < 0.1 * size and loaded < 1.15 * size, (opened, loaded, size)


@pytest.mark.slow
def test_compiled_blocks_do_not_recompile_after_the_first_step(tiles, tmp_path, monkeypatch):
    """All blocks of the student share one graph, and those of the teacher. Later steps add none."""
    import torch._dynamo.utils as dynamo
    keys = dict(tiles=tiles, schedule_steps=5, activation_checkpointing="selective")
    train(monkeypatch, flags(**keys, max_steps=5, out_dir=tmp_path / "eager"))
    graphs, average = [], sharding.update_ema

    def after_a_step(*args):
        graphs.append(dynamo.counters["stats"]["unique_graphs"])
        return average(*args)
    monkeypatch.setattr(sharding, "update_ema", after_a_step)
    torch._dynamo.reset()
    dynamo.counters.clear()
    train(monkeypatch, flags(**keys, max_steps=5, compile="true", out_dir=tmp_path / "compiled"))
    assert graphs == [2] * 5
    eager, compiled = ([r["loss"] for r in rows(tmp_path / k)[1:]] for k in ("eager", "compiled"))
    assert eager == pytest.approx(compiled, rel=1e-3)
