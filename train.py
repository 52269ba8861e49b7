"""
Continual DINO + iBOT pretraining of a vision transformer on H&E tiles, with its BACH curve.

    toy world, one core    python prepare/toy.py && python train.py config/toy.py
    two CPU processes      torchrun --nproc_per_node=2 train.py config/toy.py --device=cpu --out_dir=out/toy2
    one node of 8 GPUs     torchrun --nproc_per_node=8 train.py config/vitg_clip3.py
    one ablation           torchrun --nproc_per_node=8 train.py config/vitg.py config/ablate/koleo.py
    two nodes, on each     torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 \\
                               train.py config/vitg_clip3.py
    what would it cost     python train.py config/vitg_clip3.py --dry_run=true --world_size=8 --gpu_memory_gb=80
    resume after a stop    the same command with --resume=true

A step is a pure function of (config, seed, step): seeds that hold the step draw tiles, crops, masks and drop path. So a
resumed run equals an uninterrupted one, bit for bit on a CPU. With other ranks or another batch, a resumed run takes
the samples that come next. FSDP2 shards student and teacher on any number of devices. On a GPU, parameters compute in
bf16 and gradients are reduced in fp32.
"""
import gc
import importlib
import json
import math
import os
import re
import resource
import signal
import sys
import time

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import checkpoint
import data
import eval_bach
import listing
import model
import rundir
import sharding
import sources
from bench import budget
from configurator import configure
from fp8 import to_fp8, without_fp8

# ---- run ------------------------------------------------------------------------------------------------------------
out_dir = "out/run"      # config.json, metrics.jsonl, bach.jsonl, ckpt/, teacher/; must be empty unless resuming
seed = 0
max_steps = 137_500      # optimizer steps; 110 "epochs" of 1,250 in OpenMidnight's current recipe
resume = False           # continue from the newest complete checkpoint in out_dir
dry_run = False          # print parameters, FLOPs, memory and disk, then exit; needs no data and no GPU
device = ""              # "cuda" or "cpu"; "" = cuda if there is one
log_interval = 10        # write a row every N steps; skipped steps, unreadable tiles and signals are checked only then
eval_interval = 2500     # steps between points of the BACH curve; also at step 0 and at the end; 0 = only there
save_interval = 2500     # steps between checkpoints and teacher exports; also at the end; 0 = only there
keep_checkpoints = 2     # keep the newest N checkpoints; 0 = all
keep_teachers = 0        # keep the newest N teacher exports; 0 = all
keep_every = 0           # also keep checkpoints and exports at multiples of N steps; 0 = none
max_bad_steps = 10       # skipped steps (loss or gradient not finite) before the run stops
max_bad_tiles = 100      # files with unreadable tiles before the run stops and lists them; other draws replace them
wandb_project = ""       # also send metrics.jsonl to this project of Weights & Biases (WANDB_* configure it); "" = off
# ---- data: exactly one of the first six (sources.py) ----------------------------------------------------------------
slides = ""              # glob of whole-slide images, read on the fly
sample_list = ""         # file of lines `path x y level`
shards = ""              # folder or glob of prepare/tiles.py's .tar, used as they were cut: mpps, tile_px do nothing
parquet = ""             # folder or glob of .parquet with image bytes, as medarc/TCGA-12K-parquet; needs pyarrow
tiles = ""               # folder tree of images, each a tile of any size; mpps, tile_px do nothing
mix = ()                 # several: ((kind, path, weight), ...), e.g. (("slides", "a/*.svs", 0.8), ("shards", "b", 0.2))
bach_dir = ""            # folder that holds ICIAR2018_BACH_Challenge; "" = no curve of BACH
image_dir = ""           # instead a curve of labelled tiles, as eval_slides.py scores them; minutes per point
holdout = 0.0            # share of the patients never trained on, chosen by a hash of their names; 0 = none
patient = r"TCGA-\w\w-\w{4}"  # pattern of the patient in a file name; without a match a slide is its own patient
mpps = (0.25, 0.5, 1.0, 2.0)  # um/px, drawn evenly from those that a slide is fine enough for (Midnight's set)
mpp_range = ()           # (low, high) um/px, log-uniform, instead of mpps; () = mpps
eval_mpp = 0.5           # um/px that a range draws more often: where the encoder will be used
eval_share = 0.5         # share of a range's tiles at exactly eval_mpp; 0 = none
wide_field = ()          # (low, high): cut the second global crop from that many times the field; () = off
tile_px = 224            # side of the tile that crops are cut from; at 224 the smallest global crop is enlarged 1.8 x
slide_mpp = 0.0          # um/px of level 0 of every slide, overriding what the files say; 0 = believe the files
mpp_table = ""           # csv with columns slide,mpp that states um/px of single slides, before slide_mpp; "" = none
trust_mpp = False        # believe the um/px of files that contradict the objective power by more than 30 %
mpp_from_objective = False  # if nothing better is stated, take 10 / objective power: a guess, off by up to 50 %
exact_reads = True       # undo OpenSlide's interpolation (wsi.py); False is the old way
mask_dir = ""            # folder that keeps tissue masks, filled at each slide's first visit; "" = keep none
tiles_per_visit = 4      # consecutive samples from one slide, because opening and masking it takes up to a second
tissue_share = 0.6       # smallest share of a tile's pixels in Midnight's H&E range of HSV; 0 = no test (other stains)
open_slides = 16         # slides kept open per worker, which share 32 MiB of decoded tiles
workers = 4              # data processes per rank
# ---- augmentation ---------------------------------------------------------------------------------------------------
global_px = 224
local_px = 98            # a multiple of the patch: 7 x 14; 96 or 112 for patch 16
local_crops = 8
global_scale = (0.32, 1.0)   # area fraction of the tile
local_scale = (0.05, 0.32)   # at 0.5 um/px the lower end is a square of about 25 um: a few nuclei
hed = "od"               # stain shift in optical density; "openmidnight" clips stains at zero first: it mostly darkens
hed_prob = 0.5
hed_nats = 0.69          # optical density, up or down; 0.69 halves or doubles the light. not studied, inherited
jitter = (0.2, 0.2, 0.1, 0.05)  # brightness, contrast, saturation, hue
jitter_prob = 0.8
gray_prob = 0.2
blur_prob = (0.0, 0.9, 0.5)  # share of first global, second global, local crops; DINOv2's code inverts its own keys
norm = None              # "imagenet", "half" (0.5) or (mean, std) of RGB in 0-1; None = what the weights state
mask_prob = 0.5          # share of global crops with masked patches for iBOT
mask_ratio = (0.1, 0.45) # share of masked patches, stratified over the masked crops
# ---- model ----------------------------------------------------------------------------------------------------------
arch = "dinov2_vitg14_reg"  # a name in model.ARCHS
depth = 0                # blocks; 0 = the architecture's; fewer is a slice of it, for benchmarks on one GPU
weights = ""             # file to start from: DINOv2's, DINOv3's, a Hugging Face folder, a teacher; "" = random
pos_embed_init = "resample"  # the position table of the weights; "random" is what OpenMidnight's release had
pos_interp = ""          # that table on local crops: "" = as Meta; "offset" = OpenMidnight's release, no antialias
drop_path = 0.4          # share of the crops that skip a residual branch; the same in every block
rope_rescale = 0.0       # DINOv3 augments positions in training by 2.0; 0 = off
head_weight_norm = True  # DINOv2's last layer; False is DINOv3's
dino_hidden = 2048
dino_bottleneck = 384
dino_prototypes = 131072
ibot_hidden = 2048
ibot_bottleneck = 256
ibot_prototypes = 131072
# ---- losses ---------------------------------------------------------------------------------------------------------
ibot_weight = 1.0        # weight of the masked-patch term; DINO's is 1
kde = "uniformity"       # spreads class tokens; "openmidnight" has the released sign, which gathers; "koleo"; "none"
kde_weight = 0.05        # times the sum over the two global crops
kde_kappa = 5.0          # concentration of the density estimate
student_temp = 0.1
centering = "sinkhorn"   # or "softmax", DINO's original
# ---- optimizer: AdamW -----------------------------------------------------------------------------------------------
batch_size = 48          # images per rank
base_lr = 3e-4           # at a global batch of 1024; scaled by the square root of the batch
min_lr = 1e-6
betas = (0.9, 0.999)
weight_decay = 0.04
weight_decay_end = 0.2
layer_decay = 1.0        # learning rate factor per block, from the last to the first; DINOv3 uses 0.98
patch_embed_lr = 0.2     # learning rate factor of the patch embedding
clip_grad = 3.0          # max gradient norm; backbone and each head are clipped separately as in DINOv2; 0 = off
# ---- schedules, in steps --------------------------------------------------------------------------------------------
schedule_steps = 0       # length of the cosines; 0 = max_steps; if longer, the run stops before their end
warmup_steps = 12_500
freeze_last_layer = 1250 # the prototypes do not move before this step
momentum = 0.994         # of the teacher's average; a cosine leads to momentum_end
momentum_end = 1.0
teacher_temp_start = 0.04
teacher_temp = 0.07
teacher_temp_warmup = 37_500
# ---- system: memory against time; sharding is always on (sharding.py) -----------------------------------------------
hybrid = False           # with several nodes: shard inside each and replicate across; False shards over all ranks
activation_checkpointing = "none"  # "selective": keep products and attention; "full": only the blocks' inputs
fp8 = "off"              # "on": the blocks' linear layers in fp8 (fp8.py), from width 1024 up; "force": at any width
compile = False          # torch.compile of each block; takes a minute or more at the start
prefetch = 1             # blocks gathered ahead while one computes; 0 = FSDP2's own order
gpu_memory_gb = 0.0      # memory that the estimate is compared with, in 1e9 bytes; 0 = this GPU's, or 80 without one
world_size = 0           # ranks of a dry run; 0 = as launched
step_seconds = 0.0       # if given, a dry run also prints MFU and hours
gpu_tflops = 989.0       # dense bf16 peak for MFU; an H100's or H200's

config = configure(globals())

# ---- what the configuration needs, checked before anything is built -------------------------------------------------

world, rank = sharding.launched()
if dry_run and world_size:
    world = world_size


def say(message):
    if rank == 0:
        tqdm.write(message)
        sys.stdout.flush()  # a log shows it at once


def stop(message):
    raise SystemExit(f"train.py: {message}")


kde_losses = {"uniformity": lambda cls: model.kde_loss(cls, kde_kappa), "koleo": model.koleo_loss,
              "openmidnight": lambda cls: model.kde_loss_openmidnight(cls, kde_kappa),
              "none": lambda cls: cls.new_zeros((), dtype=torch.float32)}
loss_weights = {"dino": 1.0, "ibot": ibot_weight, "kde": kde_weight}  # the loop computes a term for each name
choices = {"arch": model.ARCHS, "kde": kde_losses, "hed": ("od", "openmidnight"), "centering": ("sinkhorn", "softmax"),
           "pos_embed_init": ("resample", "random"), "pos_interp": model.POS_INTERP, "device": ("", "cuda", "cpu"),
           "fp8": ("off", "on", "force"), "activation_checkpointing": sharding.CHECKPOINTING}
for key, known in choices.items():
    if config[key] not in known:
        stop(f"unknown {key} '{config[key]}'; known: {', '.join(map(repr, known))}")
try:
    data.check(config)
    arch_config = model.run_arch(config)  # the ViTConfig
except ValueError as e:
    stop(e)
patch = arch_config.patch_size
if bach_dir and image_dir:
    stop("bach_dir and image_dir: a run has one curve; unset the other, as in --bach_dir=")
if pos_embed_init == "random" and not weights:
    stop("pos_embed_init = 'random' changes nothing without weights: positions are drawn anyway")
images = batch_size * world  # per step, over all ranks
if kde == "uniformity" and images < 2:
    stop("the kde term compares images: batch_size times ranks must be at least 2, or kde = 'none'")
if kde in ("koleo", "openmidnight") and batch_size < 2:
    stop(f"kde = '{kde}' compares images of one rank: batch_size must be at least 2, or kde = 'none'")
peak_lr = base_lr * math.sqrt(images / 1024)
has_gpu = torch.cuda.is_available()
gpu_gb = torch.cuda.get_device_properties(0).total_memory / 1e9 if has_gpu else 80.0
if dry_run:
    if rank == 0:
        print(budget.report(config, world, gpu_memory_gb or gpu_gb)[0])
    sys.exit()
if world_size:
    stop("world_size is for a dry run; torchrun states the ranks of a real one: --nproc_per_node")
if device == "cuda" and not has_gpu:
    stop("device = 'cuda', but torch sees no GPU; --device=cpu runs without")
dev = device or ("cuda" if has_gpu else "cpu")
try:
    if wandb_project and rank == 0:
        import wandb
except ImportError:
    stop(f"wandb_project = {wandb_project!r}, but wandb is not installed: pip install wandb")

# ---- set-up: processes, data, networks, optimizer -------------------------------------------------------------------

mesh = sharding.begin(dev, hybrid)
rundir.on_rank_0(f"out_dir = {out_dir!r}", lambda: rundir.check_folder(out_dir, resume))
refusals = []  # of all that users state and the files that it names, to be said at once


def attempt(work, path=""):
    """What work() returns; where that is refused, None, and refusals say why, and how to get what is not at `path`."""
    fixed = re.split(r"[*?[]", path)[0]  # before a wildcard
    place = fixed if fixed == path else os.path.dirname(fixed)
    try:  # no collective, as it may fail on one rank
        return work()
    except (ValueError, OSError) as e:
        remedy = "" if os.path.exists(place or ".") else f"; {eval_bach.how_to_get(path)}"
        refusals.append(f"{e}{remedy}")


def open_weights():
    """The tensors to start from, or None. The pixels' norm that the weights state becomes the run's."""
    if not weights or resume:
        return None
    if not os.path.exists(weights):
        raise ValueError(f"weights: no file or folder {weights}")
    stated = model.stored_norm(weights) if norm is None else None
    if stated and stated != model.norm_values(None):
        config["norm"] = stated
    return model.first_weights(weights, arch_config, pos_embed_init)


def load_probe():
    """Labelled images, uint8 (n, 3, 224, 224), and score(features, view), which makes a row of bach.jsonl."""
    if bach_dir:
        return eval_bach.load_pixels(bach_dir), eval_bach.bach_row
    eval_slides = importlib.import_module("eval_slides")  # by name: training reads it for image_dir alone
    images, score = eval_slides.load(eval_slides.AS_IN_TRAINING | {"image_dir": image_dir})
    return torch.stack(images), score


def build():
    if dev == "cuda" and fp8 != "off" and torch.cuda.get_device_capability() < (8, 9):
        raise ValueError(f"fp8 = '{fp8}': {torch.cuda.get_device_name()} has no fp8 (Ada, Hopper or newer do); fp8 = "
                         "'off'")
    with torch.device("meta"):
        nets = model.build(config), model.build(config)
    for net in nets if fp8 != "off" else ():
        to_fp8(net["backbone"], force=fp8 == "force")
    return nets


source = attempt(lambda: sources.open_source(config), slides or tiles or shards or parquet or sample_list)
pixels = score = None  # of the probe
if (bach_dir or image_dir) and rank == 0:
    pixels, score = attempt(load_probe) or (None, None)
start = attempt(open_weights, weights)
mean, std = attempt(lambda: model.norm_values(config["norm"])) or (None, None)
if not refusals:
    student, teacher = attempt(build) or (None, None)
found = set(rundir.agree("", lambda: stop("\n".join(refusals)) if refusals else source.about))
if len(found) > 1:
    stop(f"ranks have found different data, is something still being written there? {'; '.join(sorted(found))}")
rundir.claim(out_dir, resume, say)
teacher.requires_grad_(False).eval()
sharding.checkpoint_activations(student["backbone"].blocks, activation_checkpointing)
for net in (student, teacher):
    if compile:
        sharding.compile_blocks(net["backbone"].blocks)
    sharding.shard(net, mesh, bf16=dev == "cuda", trained=net is student, prefetch=prefetch)
sharding.materialize(student, dev, seed, start)
sharding.copy_net(teacher, student)
del start
optimizer = sharding.adamw(model.param_groups(student, layer_decay, patch_embed_lr), betas, dev)
nets = torch.nn.ModuleDict({"student": student, "teacher": teacher})
centers = {k: torch.zeros(1, config[f"{k}_prototypes"], device=dev) for k in ("dino", "ibot")}
next_centers = {}  # they replace `centers` only if the step is finite
progress = {"step": 0, "bad_steps": 0, "samples": 0, "images": images}  # samples consumed; images per step
bad_steps = torch.zeros((), dtype=torch.int64, device=dev)  # counted on the device, so that no step waits for it
bad_tiles = {}     # file -> first message, of all ranks
bad_messages, useless = [], []  # of this rank, since the last exchange: unreadable tiles; slides of no use

# ---- what happens at log points and saves ---------------------------------------------------------------------------


def state():
    """Everything that a later step depends on; tensors are shards. Random numbers are a function of the step."""
    texts = {"bad_tiles": json.dumps(bad_tiles), "config": json.dumps(config), "data": source.about}
    return {**checkpoint.tensors(nets, optimizer), "centers": centers, "progress": dict(progress), **texts}


def write_row(file, row):
    """On rank 0, but a collective; {} writes nothing."""
    row = rundir.append_row(f"{out_dir}/{file}", row)
    if wandb_project and file == "metrics.jsonl":
        rundir.on_rank_0("wandb took no row", lambda: wandb.log(row))


def exchange():
    """
    The messages between ranks, at log points and saves: skipped steps, unreadable tiles, signals. Too many of the first
    two stop the run; each file is named once. Returns whether a signal reached any rank.
    """
    skipped, progress["bad_steps"] = bad_steps.item() - progress["bad_steps"], bad_steps.item()
    if skipped:
        say(f"step {progress['step']}: loss or gradient was not finite in {skipped} steps since the last row, which "
            f"were skipped ({progress['bad_steps']} so far)")
    if progress["bad_steps"] > max_bad_steps:
        stop(f"{progress['bad_steps']} steps were not finite (max_bad_steps = {max_bad_steps})")
    everyone = [None] * world
    dist.all_gather_object(everyone, (bad_messages, useless, len(signals)))
    bad_messages.clear()
    useless.clear()
    unreadable, unused, signalled = zip(*everyone)
    found = {message.split(": ")[0]: message for message in sum(unused, [])}
    new = {file: message for file, message in found.items() if file not in source.left_out}
    source.left_out |= new
    if found:
        path = f"{out_dir}/left_out.csv"
        rundir.on_rank_0(f"{path} cannot be written", lambda: listing.say_left_out(new, say, path, "a"))
    for message in sum(unreadable, []):
        file = message.split(": ")[0]
        if file not in bad_tiles:
            bad_tiles[file] = message
            say(f"unreadable, another tile was drawn instead: {message}")
    if len(bad_tiles) > max_bad_tiles:
        stop(f"{len(bad_tiles)} unreadable files (max_bad_tiles = {max_bad_tiles}):\n" + "\n".join(bad_tiles.values()))
    return any(signalled)


def log(done, losses, norms, now, cls):
    """The row of metrics.jsonl. The collapse metrics are those of this rank's global crops, half of them masked."""
    seconds, steps = max(time.time() - clock["start"], 1e-9), done - clock["step"]
    metrics = eval_bach.collapse_metrics(cls.detach().float().cpu()) if cls.isfinite().all() else {}
    row = {"step": done, **dict(zip(("loss", *loss_weights), (losses / world).tolist())),
           "grad_norm": norms.square().sum().sqrt().item(), "lr": now["lr"],
           **{f"grad_norm_{name}": norm for name, norm in zip(student, norms.tolist())},
           "teacher_temp": now["teacher_temp"], "wd": now["wd"],
           "cls_rank": metrics.get("effective_rank"), "cls_cosine": metrics.get("mean_cosine"),
           "images_per_s": round(steps * images / seconds, 2), "data_wait": round(clock["data"] / seconds, 3),
           "bad_steps": progress["bad_steps"], "bad_tiles": len(bad_tiles),
           "host_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6}  # most so far, without the workers
    if dev == "cuda":
        row["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
        row["mfu"] = tflop * steps / seconds / gpu_tflops
    say(f"step {done}/{max_steps}: loss {row['loss']:.4f}, gradient {row['grad_norm']:.2f}, "
        f"{row['images_per_s']:.1f} images/s")
    return row


def evaluate(step):
    """A point of the curve, on all ranks; returns what metrics.jsonl shows of it."""
    if not (bach_dir or image_dir):
        return {}
    with without_fp8(teacher["backbone"]), torch.compiler.set_stance("force_eager"):  # other shapes than training's
        note, before_exit = f"{out_dir}/bach_failed_{step}", saver.thread.shutdown
        row = eval_bach.curve_point(teacher["backbone"], pixels, (mean, std), dev, note, before_exit, score)
    scored = row if row.get("seeds") else {}  # on rank 0, unless it failed
    write_row("bach.jsonl", scored and {"step": step, "images": progress["samples"], **row})
    key, name = ("bach", "BACH") if bach_dir else ("balanced", f"balanced accuracy of {image_dir}")
    if "bach_error" in row:
        say(f"step {step}: no {name}, training continues: {row['bach_error']}")
    if not scored:
        return row
    say(f"step {step}: {name} {row[key]:.3f} +- {row['std']:.3f}, mean cosine {row['mean_cosine']:.3f}, "
        f"effective rank {row['effective_rank']:.1f}; took {row['seconds']} s")
    shown = ("bach", "balanced", "se_groups", "plateau", "clean", "knn", "mean_cosine", "effective_rank")
    own = {k: row[k] for k in shown if k in row}
    return own | {f"{key}_{k}": row[k] for k in ("std", "seeds", "protocol", "embed_seconds", "seconds")}


def save(done, wait):
    """The teacher's export, then a checkpoint behind training; `wait` until it is written."""
    header = {"arch": None if depth else arch, "step": done, "config": config}
    tensors = sharding.gathered(teacher["backbone"])
    checkpoint.export(f"{out_dir}/teacher", tensors, header, keep_teachers, keep_every, say)
    say(f"exported: {out_dir}/teacher/{done}.pth")
    saver.save(done, state())  # last: a run that resumes here has its export and its rows
    if wait:
        saver.finish()


def targets(logits, head, temp):
    """Teacher logits -> probabilities."""
    if centering == "sinkhorn":
        return model.sinkhorn(logits, temp)
    next_centers[head] = model.update_center(centers[head], logits)
    return model.softmax_center(logits, centers[head], temp)


# ---- start or resume ------------------------------------------------------------------------------------------------

if resume:
    loaded = state()
    checkpoint.load(f"{out_dir}/ckpt", loaded, say)
    bad_tiles.update(json.loads(loaded["bad_tiles"]))
    if norm is None:  # the weights are not read again, and may have gone or not be named
        config["norm"] = json.loads(loaded["config"])["norm"]
        mean, std = model.norm_values(config["norm"])
    if loaded["data"] != source.about:
        say(f"resume: the data were {loaded['data']}, are now {source.about}: other tiles follow than without the stop")
    before = loaded["progress"]["images"]
    if before != images:
        say(f"resume: {images} images per step instead of {before}: the learning rate's peak is {peak_lr:.4g} instead "
            f"of {base_lr * math.sqrt(before / 1024):.4g}; the data continue where they stopped, schedules count steps")
    progress.update({**loaded["progress"], "images": images})


def begin_files():
    if wandb_project:  # before any file changes: what wandb refuses can be tried again
        rundir.begin_wandb(wandb, wandb_project, out_dir, config)
    rundir.begin_folder(out_dir, config, progress["step"] if resume else None, say)
    listing.say_left_out(source.left_out, say, f"{out_dir}/left_out.csv")


rundir.on_rank_0(f"the run cannot begin in {out_dir}", begin_files)
saver = checkpoint.Saver(f"{out_dir}/ckpt", keep_checkpoints, keep_every, say)
if bach_dir or image_dir:
    shape = rundir.on_rank_0("the probe has no images", lambda: pixels.shape)
    pixels = pixels.to(dev) if rank == 0 else torch.empty(shape, dtype=torch.uint8, device=dev)
    dist.broadcast(pixels, 0)
tflop = sum(budget.tflop(config, arch_config).values())  # per step and rank
cost, _ = budget.report(config, world, gpu_memory_gb or (gpu_gb if dev == "cuda" else 0), details=False)
say(f"data: {source.about}\n{cost}\nwrites to {out_dir}, where config.json has all keys")
if progress["step"] == 0:
    blank = dict.fromkeys(("loss", *loss_weights, "grad_norm", "lr", "images_per_s"))
    write_row("metrics.jsonl", {"step": 0, **blank, **evaluate(0)})
signals = rundir.catch_signals()
offset = progress["samples"] - progress["step"] * images  # nonzero only after resuming with other ranks or batches
dataset = data.Batches(source, config, global_px // patch, rank, world, offset)
batches = iter(data.loader(dataset, range(progress["step"], max_steps), workers, dev))
bar = listing.bar(total=max_steps, initial=progress["step"], unit="step", disable=rank != 0 or not sys.stderr.isatty())
clock = {"start": time.time(), "step": progress["step"], "data": 0.0}
bad_steps.fill_(progress["bad_steps"])
gc.disable()  # ranks that collect at different times wait for each other

for step in range(progress["step"], max_steps):
    torch.manual_seed(np.random.SeedSequence((seed, step, rank)).generate_state(1)[0].item())  # drop path, rope
    # schedules
    now = model.schedules(step, config, peak_lr)
    for group in optimizer.param_groups:
        group["lr"] = now["last_layer_lr" if group["last_layer"] else "lr"] * group["lr_scale"]
        group["weight_decay"] = now["wd"] * group["wd_scale"]
    # batch: crop-major, B images, L local crops, M masked patches
    waited = time.time()
    batch = next(batches)
    clock["data"] += time.time() - waited
    if "global_crops" not in batch:
        of_file = {message.split(": ")[0]: message for message in batch["bad"]}
        stop("a tile could not be replaced, every draw failed:\n" + "\n".join(of_file.values()))
    crops = [data.augment(batch["global_crops"], batch["global_colour"], config, dev)]  # (2B, 3, S, S)
    if local_crops:
        crops.append(data.augment(batch["local_crops"], batch["local_colour"], config, dev))  # (L*B, 3, s, s)
    masks, masked, mask_weights = (batch[k].to(dev, non_blocking=True) for k in ("masks", "masked", "mask_weights"))
    # teacher: unmasked global crops
    with torch.no_grad():
        seen = teacher["backbone"](crops[0])
        dino_targets = targets(teacher["dino_head"](seen["cls"]), "dino", now["teacher_temp"])  # (2B, K)
        on_masked = teacher["ibot_head"](seen["patches"].flatten(0, 1)[masked])
        ibot_targets = targets(on_masked, "ibot", now["teacher_temp"])  # (M, K)
    # student: masked global crops, local crops
    out = student["backbone"](crops, [masks, None][: len(crops)])
    logits = student["dino_head"](torch.cat([o["cls"] for o in out]))  # ((2 + L) * B, K)
    on_global, on_local = logits.split([2 * batch_size, local_crops * batch_size])
    on_masked = student["ibot_head"](out[0]["patches"].flatten(0, 1)[masked])  # (M, K)
    # losses: means over this rank's images
    losses = {
        "dino": sum(model.dino_loss(on_global, on_local, dino_targets, student_temp)),
        "ibot": model.ibot_loss(on_masked, ibot_targets, mask_weights, 2 * batch_size, student_temp),
        "kde": sum(kde_losses[kde](cls) for cls in out[0]["cls"].chunk(2))}  # each global crop on its own
    loss = sum(weight * losses[name] for name, weight in loss_weights.items())
    del logits, on_global, on_local, on_masked, dino_targets, ibot_targets  # their gradient is made; 3 GB in ViT-g
    loss.backward()
    # clip, finite check, step, average
    norms = sharding.clip_gradients(student, clip_grad)  # of backbone and heads, before clipping, over all ranks
    terms = torch.stack([loss, *(losses[name] for name in loss_weights)]).detach()
    dist.all_reduce(terms)
    finite = torch.isfinite(torch.cat([terms, norms])).all()  # equal on all ranks; read at log points only
    optimizer.found_inf = (~finite).float()  # with it, fused AdamW leaves weights and moments as they were
    optimizer.step()
    centers.update({head: torch.where(finite, center, centers[head]) for head, center in next_centers.items()})
    sharding.update_ema(teacher, student, now["momentum"], finite)
    bad_steps += ~finite
    optimizer.zero_grad()
    bad_messages += batch["bad"]
    useless += batch["left_out"]
    progress["step"] = done = step + 1
    progress["samples"] += images
    bar.update()
    # log, evaluate, save
    last = done == max_steps
    evaluating = last or (eval_interval and done % eval_interval == 0)
    logging = evaluating or done % log_interval == 0
    saving = last or (save_interval and done % save_interval == 0)
    preempted = exchange() if logging or saving else False
    if logging:
        row = log(done, terms, norms, now, out[0]["cls"])
        if evaluating and (last or not preempted):  # a signal leaves little time, and an evaluation takes a minute
            row |= evaluate(done)
        write_row("metrics.jsonl", row)
        clock = {"start": time.time(), "step": done, "data": 0.0}
    if saving or preempted:
        began = time.time()
        save(done, wait=last or preempted)
        clock["start"] += time.time() - began
    if preempted and not last:
        say(f"stopped by a signal after step {done}; resume by:\n    {rundir.resume_command()}")
        break
    if done % 100 == 0:
        gc.collect()

# ---- finish ---------------------------------------------------------------------------------------------------------
bar.close()
del batches  # its workers end now, not by loader's kill
if progress["step"] >= max_steps:
    say(f"done: {progress['step']} steps, {out_dir}")
dist.destroy_process_group()
if signal.SIGINT in signals:
    os.kill(os.getpid(), signal.SIGINT)  # the end that a shell knows as Ctrl-C's: it starts nothing that comes next

