"""
Continual DINO + iBOT pretraining of a vision transformer on H&E tiles, with its BACH curve.

    toy world, two cores   python prepare/toy.py && python train.py config/toy.py
    two CPU processes      torchrun --nproc_per_node=2 train.py config/toy.py --device=cpu --out_dir=out/toy2
    one node of 8 GPUs     torchrun --nproc_per_node=8 train.py config/vitg_clip3.py
    two nodes, on each     torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 \\
                               train.py config/vitg_clip3.py
    what would it cost     python train.py config/vitg_clip3.py --dry_run=true --world_size=8 --gpu_memory_gb=80
    go on after a stop     the same command with --resume=true

A step is a pure function of (config, seed, step): tiles, crops, masks and drop path are drawn from seeds that hold the
step, so a resumed run equals an uninterrupted one, bit for bit on a CPU; on other ranks or with another batch it takes
the samples that come next. Student and teacher are sharded with FSDP2 on every device count, one included; on a GPU
parameters compute in bf16 and gradients are reduced in fp32.
"""
import atexit
import gc
import json
import math
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from tqdm import tqdm

import checkpoint
import data
import eval_bach
import model
import sharding
import sources
from bench import budget
from configurator import configure
from fp8 import to_fp8, without_fp8

# ---- run ------------------------------------------------------------------------------------------------------------
out_dir = "out/run"      # config.json, metrics.jsonl, bach.jsonl, ckpt/, teacher/; must be empty, unless resuming
seed = 0
max_steps = 137_500      # optimizer steps; 110 "epochs" of 1,250 in OpenMidnight's current recipe
resume = False           # go on from the newest complete checkpoint in out_dir
dry_run = False          # print parameters, FLOPs and memory, then exit; needs neither data nor a GPU
device = ""              # "cuda" or "cpu"; "" = cuda if there is one
log_interval = 10        # steps a row of metrics.jsonl; only then are bad steps, bad tiles and signals looked at
eval_interval = 2500     # steps a point of the BACH curve; also at step 0 and at the end; 0 = only there
save_interval = 2500     # steps a checkpoint and a teacher export; also at the end; 0 = only there
keep_checkpoints = 2     # the newest so many checkpoints; 0 = all. teacher exports are all kept
keep_every = 0           # also keep every checkpoint at a multiple of so many steps; 0 = none
max_bad_steps = 10       # steps with a non-finite loss or gradient, all skipped, before the run stops
max_bad_tiles = 100      # files with unreadable tiles, replaced by other draws, before the run stops with their list
wandb_project = ""       # also send the rows of metrics.jsonl to Weights & Biases, which WANDB_* configure; "" = off
# ---- data: exactly one of the first six (sources.py) ----------------------------------------------------------------
slides = ""              # glob of whole-slide images, read on the fly
sample_list = ""         # file of lines `path x y level`
shards = ""              # folder or glob of wsi.py --task=tiles's .tar, used as they were cut: not mpps, not tile_px
parquet = ""             # folder or glob of .parquet with image bytes, medarc/TCGA-12K-parquet's columns; needs pyarrow
tiles = ""               # folder tree of images, each a tile whatever its size (mpps, tile_px do nothing)
mix = ()                 # several: ((kind, path, weight), ...), e.g. (("slides", "a/*.svs", 0.8), ("shards", "b", 0.2))
bach_dir = ""            # folder that holds ICIAR2018_BACH_Challenge; "" = no curve
holdout = 0.0            # share of the patients never trained on, by a hash of their names, whatever the seed; 0 = none
patient = r"TCGA-\w\w-\w{4}"  # regular expression of the patient in a file's name; a slide without is its own patient
mpps = (0.25, 0.5, 1.0, 2.0)  # um/px, each as likely, of those that a slide is fine enough for (Midnight's set)
mpp_range = ()           # (low, high) um/px, log-uniform, as far as a slide is fine enough, instead of mpps; () = mpps
eval_mpp = 0.5           # um/px of which a range has more: where the encoder will be used
eval_share = 0.5         # share of a range's tiles at exactly eval_mpp; 0 = none
tile_px = 224            # side of the tile that crops are cut from; at 224 the smallest global crop is enlarged 1.8 x
slide_mpp = 0.0          # um/px of level 0 of every slide, overriding what the files say; 0 = believe the files
mpp_from_objective = False  # where nothing better is stated, take 10 / objective power: a guess, off by up to 50 %
exact_reads = True       # undo OpenSlide's interpolation (wsi.py); False is the old way
mask_dir = ""            # folder that keeps tissue masks, filled at each slide's first visit; "" = masks are made anew
tiles_per_visit = 4      # consecutive samples from one slide: opening and masking it costs up to a second
tissue_share = 0.6       # share of a tile's pixels in Midnight's H&E range of HSV
open_slides = 16         # slides kept open in each worker; OpenSlide caches up to 32 MiB for each
workers = 4              # data processes a rank
# ---- augmentation ---------------------------------------------------------------------------------------------------
global_px = 224
local_px = 98            # a multiple of the patch: 7 x 14; 96 or 112 for patch 16
local_crops = 8
global_scale = (0.32, 1.0)   # area fraction of the tile
local_scale = (0.05, 0.32)   # at 0.5 um/px the lower end is a square of about 25 um: a few nuclei
hed = "od"               # stain shift in optical density; "openmidnight" clips stains at zero first: mostly darkens
hed_prob = 0.5
hed_nats = 0.69          # of optical density, up or down; 0.69 halves or doubles the light. not studied, inherited
jitter = (0.2, 0.2, 0.1, 0.05)  # brightness, contrast, saturation, hue
jitter_prob = 0.8
gray_prob = 0.2
blur_prob = (0.0, 0.9, 0.5)  # share of first global, second global, local crops; DINOv2's code inverts its own keys
norm = None              # "imagenet", "half" (0.5) or (mean, std) of RGB in 0-1; None = as weights state, or imagenet
mask_prob = 0.5          # share of global crops with masked patches for iBOT
mask_ratio = (0.1, 0.45) # share of masked patches, stratified over the masked crops
# ---- model ----------------------------------------------------------------------------------------------------------
arch = "dinov2_vitg14_reg"  # a name in model.ARCHS
depth = 0                # blocks; 0 = the architecture's. A slice of a large one, for benchmarks on one GPU
weights = ""             # to start from: released DINOv2 or DINOv3, its Hugging Face folder, a teacher; "" = random
pos_embed_init = "resample"  # of a learned position table, from the file's grid; "random" is what OpenMidnight released
pos_interp = ""          # of that table to local crops: "" = as Meta's; "offset" = OpenMidnight's release, no antialias
drop_path = 0.4          # share of the crops that skip a residual branch; the same in every block
rope_rescale = 0.0       # DINOv3's training augmentation of positions is 2.0; 0 = off
head_weight_norm = True  # DINOv2's last layer; False is DINOv3's
dino_hidden = 2048
dino_bottleneck = 384
dino_prototypes = 131072
ibot_hidden = 2048
ibot_bottleneck = 256
ibot_prototypes = 131072
# ---- losses ---------------------------------------------------------------------------------------------------------
ibot_weight = 1.0        # of the masked-patch term; DINO's weight is 1
kde = "uniformity"       # spreads class tokens; "openmidnight" has the released sign, which gathers; "koleo"; "none"
kde_weight = 0.05        # times the sum over the two global crops
kde_kappa = 5.0          # concentration of the density estimate
student_temp = 0.1
centering = "sinkhorn"   # or "softmax", DINO's original
# ---- optimizer: AdamW -----------------------------------------------------------------------------------------------
batch_size = 48          # images a rank
base_lr = 3e-4           # at a global batch of 1024; scaled by the square root of the batch
min_lr = 1e-6
betas = (0.9, 0.999)
weight_decay = 0.04
weight_decay_end = 0.2
layer_decay = 1.0        # learning rate factor a block, from the last to the first; DINOv3 uses 0.98
patch_embed_lr = 0.2     # learning rate factor of the patch embedding
clip_grad = 3.0          # max gradient norm, of backbone and of each head on its own, as DINOv2 clips; 0 = off
# ---- schedules, in steps --------------------------------------------------------------------------------------------
schedule_steps = 0       # length of the cosines; 0 = max_steps. longer than max_steps: the run stops on the way
warmup_steps = 12_500
freeze_last_layer = 1250 # prototypes do not move for so long
momentum = 0.994         # of the teacher's average, to 1 by a cosine
momentum_end = 1.0
teacher_temp_start = 0.04
teacher_temp = 0.07
teacher_temp_warmup = 37_500

# ---- memory against time: one key each, sharding over all ranks is always on (sharding.py) --------------------------
activation_checkpointing = "none"  # "selective": keep results of products and attention only; "full": blocks' inputs
fp8 = "off"              # "on": the blocks' linear layers in fp8 (fp8.py), from width 1024 up; "force": at any width
compile = False          # torch.compile of each block: a minute or more at the start, no more in later steps
prefetch = 1             # blocks gathered ahead while one computes; 0 = FSDP2's own order, no later than needed
gpu_memory_gb = 0.0      # 1e9 bytes a rank may hold, or the run is refused; 0 = this GPU's, 80 where there is none
world_size = 0           # ranks of a dry run; 0 = as launched
step_seconds = 0.0       # of a dry run, which then prints MFU and hours; 0 = off
gpu_tflops = 989.0       # dense bf16 peak that MFU refers to; an H100's or H200's

config = configure(globals())

# ---- what the configuration implies, and what it needs: said before anything is built -------------------------------


def stop(message):
    raise SystemExit(f"train.py: {message}")


if arch not in model.ARCHS:
    stop(f"unknown arch '{arch}'; known: {', '.join(model.ARCHS)}")
choices = {"kde": ("uniformity", "openmidnight", "koleo", "none"), "hed": ("od", "openmidnight"),
           "centering": ("sinkhorn", "softmax"), "pos_embed_init": ("resample", "random"), "pos_interp": ("", "offset"),
           "device": ("", "cuda", "cpu"), "fp8": ("off", "on", "force"),
           "activation_checkpointing": sharding.CHECKPOINTING}
for key, known in choices.items():
    if config[key] not in known:
        stop(f"{key} = {config[key]!r}; known: {', '.join(map(repr, known))}")
rules = {
    "more than 0": (lambda x: x > 0, """batch_size log_interval gpu_tflops tile_px global_px local_px mpps open_slides
        tiles_per_visit student_temp teacher_temp teacher_temp_start eval_mpp mpp_range base_lr layer_decay
        mask_prob dino_hidden ibot_hidden dino_prototypes dino_bottleneck ibot_prototypes ibot_bottleneck local_scale
        global_scale"""),
    "at least 0": (lambda x: x >= 0, """seed depth max_steps prefetch gpu_memory_gb world_size step_seconds
        eval_interval save_interval keep_checkpoints keep_every workers slide_mpp local_crops clip_grad warmup_steps
        freeze_last_layer teacher_temp_warmup schedule_steps weight_decay jitter hed_nats rope_rescale mask_ratio
        betas max_bad_steps max_bad_tiles eval_share holdout"""),
    "at most 1": (lambda x: x <= 1, """tissue_share mask_prob mask_ratio global_scale local_scale hed_prob jitter_prob
        gray_prob blur_prob drop_path momentum momentum_end betas layer_decay eval_share holdout"""),
}
for rule, (holds, names) in rules.items():
    for key in names.split():
        values = config[key] if isinstance(config[key], tuple) else (config[key],)
        if not all(isinstance(x, (int, float)) and holds(x) for x in values):
            stop(f"{key} = {config[key]!r}: must be {rule}")
lengths = {"global_scale": 2, "local_scale": 2, "mask_ratio": 2, "betas": 2, "jitter": 4, "blur_prob": 3,
           "mpp_range": 2 * bool(mpp_range)}
for key in [k for k, n in lengths.items() if len(config[k]) != n]:
    stop(f"{key} = {config[key]}: give {lengths[key]} numbers")
for key in [k for k in ("global_scale", "local_scale", "mask_ratio", "mpp_range") if sorted(config[k]) != [*config[k]]]:
    stop(f"{key} = {config[key]}: give the smaller number first")
if not mpps:
    stop("mpps = (): give at least one um/px")
try:
    norm_mean, norm_std = model.norm_values(norm)
except ValueError as e:
    stop(e)
if device == "cuda" and not torch.cuda.is_available():
    stop("device = 'cuda', but torch sees no GPU; --device=cpu runs without")
patch = model.ARCHS[arch].patch_size
for key, px in (("global_px", global_px), ("local_px", local_px)):
    if px % patch:
        stop(f"{key} = {px} is no multiple of {arch}'s patch of {patch}; nearest: {max(round(px / patch), 1) * patch}")
grid = global_px // patch
vit_config = model.replace(model.ARCHS[arch], pos_grid=grid, drop_path=drop_path, rope_rescale=rope_rescale,
                           depth=depth or model.ARCHS[arch].depth)
file_config, vit_config = vit_config, model.replace(vit_config, **model.POS_INTERP[pos_interp])
if model.ARCHS[arch].pos == "rope" and (pos_interp or pos_embed_init == "random"):
    stop(f"pos_interp and pos_embed_init are of learned positions, and {arch} has rotary ones")
if pos_embed_init == "random" and not weights:
    stop("pos_embed_init = 'random' changes nothing without weights: positions are drawn anyway")
world, rank, local_rank = (int(os.environ.get(k, d)) for k, d in (("WORLD_SIZE", 1), ("RANK", 0), ("LOCAL_RANK", 0)))
world = world_size if dry_run and world_size else world
images = batch_size * world  # of all ranks in a step
if kde != "none" and images < 2:
    stop("the spreading term compares images: batch_size times ranks must be at least 2, or kde = 'none'")
peak_lr = base_lr * math.sqrt(images / 1024)
head_sizes = {"dino": (dino_hidden, dino_bottleneck, dino_prototypes),
              "ibot": (ibot_hidden, ibot_bottleneck, ibot_prototypes)}
if int(2 * batch_size * mask_prob) < 1:
    stop(f"mask_prob = {mask_prob} of {2 * batch_size} crops masks none, and iBOT needs some")
masked_patches = sum(data.mask_counts(2 * batch_size, grid, mask_prob, mask_ratio))


def build():
    """Backbone and heads of a student or a teacher."""
    heads = {f"{k}_head": model.DINOHead(vit_config.embed_dim, K, hidden, bottleneck, weight_norm=head_weight_norm)
             for k, (hidden, bottleneck, K) in head_sizes.items()}
    backbone = model.ViT(vit_config)
    if fp8 != "off":
        to_fp8(backbone, force=fp8 == "force")
    return torch.nn.ModuleDict({"backbone": backbone, **heads})


if fp8 != "off":
    try:
        with torch.device("meta"):
            build()
    except ValueError as e:
        stop(e)


def cost():
    """budget.report's text and remedy, None where it fits; without a GPU a dry run takes one of 80 GB."""
    found = torch.cuda.is_available()
    on_gpu = device != "cpu" and (found or dry_run)
    memory = torch.cuda.get_device_properties(0).total_memory / 1e9 if found else 80.0
    with torch.device("meta"):
        return budget.report(config, vit_config, build(), world, 2 if on_gpu else 4,
                             1e9 * (gpu_memory_gb or memory * on_gpu), peak_lr, head_sizes, masked_patches)


if dry_run:
    text, remedy = cost()
    if rank == 0:
        print(text)
    sys.exit(remedy and f"train.py: {remedy}")
if weights and not os.path.exists(weights):
    stop(f"weights: no file or folder {weights}")
if weights and norm is None:
    try:
        norm_mean, norm_std = model.stored_norm(weights)
    except ValueError as e:
        stop(e)
    if (norm_mean, norm_std) != model.norm_values(None):
        config["norm"] = norm_mean, norm_std
if wandb_project and rank == 0:
    try:
        import wandb
    except ImportError:
        stop(f"wandb_project = {wandb_project!r}, but wandb is not installed: pip install wandb")
if rank == 0 and not resume and os.path.isdir(out_dir) and os.listdir(out_dir):
    stop(f"{out_dir} is not empty: go on with --resume=true, delete it, or choose another --out_dir")
try:
    source = sources.open_source(config)
    pixels = torch.empty(400, 3, 224, 224, dtype=torch.uint8)  # decoded once, on rank 0: 60 MB
    if bach_dir and rank == 0:
        pixels = eval_bach.load_pixels(bach_dir)
    os.makedirs(out_dir, exist_ok=True)
except (ValueError, OSError) as e:
    stop(e)
text, remedy = cost()
if remedy:
    stop(remedy)

# ---- set-up: processes, models, optimizer ---------------------------------------------------------------------------

dev = device or ("cuda" if torch.cuda.is_available() else "cpu")
if dev == "cuda":
    torch.cuda.set_device(local_rank)
    if fp8 != "off" and torch.cuda.get_device_capability() < (8, 9):
        stop(f"fp8 = '{fp8}': {torch.cuda.get_device_name()} has no fp8 (Ada, Hopper or newer do); fp8 = 'off'")
store = None if "RANK" in os.environ else dist.HashStore()
dist.init_process_group("nccl" if dev == "cuda" else "gloo", store=store, rank=rank, world_size=world,
                        timeout=timedelta(minutes=30))  # NCCL's 10 are short for rank 0 to read 7.4 GB of BACH
lists = [None] * world
dist.all_gather_object(lists, source.about)
if len(set(lists)) > 1:
    stop(f"ranks have found different data, is something still being written there? {'; '.join(sorted(set(lists)))}")
mesh = init_device_mesh(dev, (world,))
try:
    start = model.first_weights(weights, file_config, pos_embed_init) if weights else None
except ValueError as e:
    stop(e)
with torch.device("meta"):
    student, teacher = build(), build()
teacher.requires_grad_(False).eval()
sharding.checkpoint_activations(student["backbone"].blocks, activation_checkpointing)
for net in (student, teacher):
    if compile:
        sharding.compile_blocks(net["backbone"].blocks)
    sharding.shard(net, mesh, bf16=dev == "cuda", trained=net is student, prefetch=prefetch)
sharding.materialize(student, dev, seed, start)
sharding.copy_net(teacher, student)
del start
groups = model.param_groups(student, layer_decay, patch_embed_lr)
optimizer = torch.optim.AdamW(groups, lr=peak_lr, betas=betas, fused=True)
for p in (p for group in groups for p in group["params"]):  # from the start, so that every checkpoint is complete
    optimizer.state[p] = {"step": torch.zeros((), device=dev), "exp_avg": torch.zeros_like(p),
                          "exp_avg_sq": torch.zeros_like(p)}
centers = {k: torch.zeros(1, K, device=dev) for k, (_, _, K) in head_sizes.items()}
progress = {"step": 0, "bad_steps": 0, "samples": 0, "images": images}  # samples taken; images in a step
bad_steps = torch.zeros((), dtype=torch.int64, device=dev)  # counted on the device: a step waits for no result
bad_tiles = {}  # file -> first message, of all ranks


def say(message):
    if rank == 0:
        tqdm.write(message)


# ---- checkpoints and rows -------------------------------------------------------------------------------------------


def state():
    """Everything that a later step depends on; tensors are shards. Random numbers are a function of the step."""
    nets, optim = get_state_dict(torch.nn.ModuleDict({"student": student, "teacher": teacher}), optimizer)
    texts = {"bad_tiles": json.dumps(bad_tiles), "config": json.dumps(config), "data": source.about}
    return {"model": nets, "optimizer": optim, "centers": centers, "progress": progress, **texts}


def load_checkpoint():
    loaded = state()
    try:
        checkpoint.load(f"{out_dir}/ckpt", loaded, say)
    except ValueError as e:
        stop(e)
    nets = torch.nn.ModuleDict({"student": student, "teacher": teacher})
    set_state_dict(nets, optimizer, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"])
    bad_tiles.update(json.loads(loaded["bad_tiles"]))
    if loaded["data"] != source.about:
        say(f"resume: the data were {loaded['data']}, are now {source.about}: other tiles follow than without the stop")
    before = loaded["progress"]["images"]
    if before != images:
        say(f"resume: {images} images a step instead of {before}: the learning rate's peak is {peak_lr:.4g} instead of "
            f"{base_lr * math.sqrt(before / 1024):.4g}; the data go on where they stopped, schedules count steps")
    progress.update({**loaded["progress"], "images": images})


def export_teacher(step):
    """out_dir/teacher/<step>.pth for load_backbone, gathered to rank 0 tensor by tensor. ValueError if not written."""
    whole, unfinished = dict(sharding.gathered(teacher["backbone"])), f"{out_dir}/teacher/unfinished"
    if rank != 0:
        return
    try:
        os.makedirs(f"{out_dir}/teacher", exist_ok=True)
        name = None if depth else arch
        torch.save({"teacher": whole, "arch": name, "step": step, "config": config}, unfinished)
        os.replace(unfinished, f"{out_dir}/teacher/{step}.pth")
    except (OSError, RuntimeError) as e:  # torch's own writer raises the latter where the disk is full
        raise ValueError(f"{unfinished} could not be written ({checkpoint.one_line(e)}); the last checkpoint is whole: "
                         "make room, then go on with --resume=true") from None


def write_row(file, row):
    if rank == 0:
        with open(f"{out_dir}/{file}", "a") as f:
            finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
            f.write(json.dumps(finite) + "\n")
        if wandb_project and file == "metrics.jsonl":
            wandb.log(finite)


def drop_rows_after(step):
    """A resumed run writes these steps again."""
    for file in ("metrics.jsonl", "bach.jsonl"):
        if os.path.isfile(f"{out_dir}/{file}"):
            with open(f"{out_dir}/{file}") as f:  # a line cut short by a crash has no end
                rows = [line for line in f if line.endswith("\n") and json.loads(line)["step"] <= step]
            with open(f"{out_dir}/{file}.new", "w") as f:
                f.writelines(rows)
            os.replace(f"{out_dir}/{file}.new", f"{out_dir}/{file}")


# ---- start or resume ------------------------------------------------------------------------------------------------

saver = checkpoint.Saver(f"{out_dir}/ckpt", keep_checkpoints, keep_every)
if resume:
    load_checkpoint()
if wandb_project and rank == 0:  # before any file changes: what wandb refuses can be tried again
    known = f"{out_dir}/wandb.id"
    run = wandb.init(project=wandb_project, name=os.environ.get("WANDB_NAME", os.path.basename(out_dir)), dir=out_dir,
                     config=config, resume="allow", id=open(known).read() if os.path.isfile(known) else None)
    with open(known, "w") as f:
        f.write(run.id)
    wandb.define_metric("*", step_metric="step")  # wandb's own count goes on where a resumed run repeats steps
if resume and rank == 0:
    drop_rows_after(progress["step"])
    before, now = json.load(open(f"{out_dir}/config.json")), json.loads(json.dumps(config))
    for key in (k for k in now if k != "resume" and before.get(k) != now[k]):
        say(f"resume: {key} was {before.get(key)!r}, is now {now[key]!r}")
    shutil.copy(f"{out_dir}/config.json", f"{out_dir}/config.before-{progress['step']}.json")
    say(f"resume: step {progress['step']} of {out_dir}")
if rank == 0:
    with open(f"{out_dir}/config.json.new", "w") as f:
        json.dump(config, f, indent=1)
    os.replace(f"{out_dir}/config.json.new", f"{out_dir}/config.json")
    with open(f"{out_dir}/source.diff", "w") as f:  # the command, the commit and what differs from it
        f.write(" ".join(sys.argv) + "\n")
        here = os.path.dirname(os.path.abspath(__file__))
        for command in (["rev-parse", "HEAD"], ["status", "--short"], ["diff", "HEAD"]) if shutil.which("git") else ():
            f.write(subprocess.run(["git", "-C", here, *command], capture_output=True, text=True).stdout)
if bach_dir:
    pixels = pixels.to(dev)
    dist.broadcast(pixels, 0)
say(f"{text}\ndata: {source.about}")


def evaluate(step):
    """
    A point of the BACH curve, on all ranks; returns on rank 0 what metrics.jsonl shows of it. Rank 0 probes alone, so
    a failure there costs the point and not the run. One in the forward, such as out of memory, leaves the sharded
    teacher half gathered and other ranks in a collective, which the next one here would answer with other tensors: it
    ends the run, and leaves a note by which the resumed one passes over this point.
    """
    if not bach_dir:
        return {}
    start, note = time.time(), f"{out_dir}/bach_failed_{step}"
    if os.path.exists(note):
        say(f"step {step}: no BACH, it ended the run before ({note})")
        return {"bach": None, "bach_error": open(note).read()} if rank == 0 else {}
    try:
        with without_fp8(teacher["backbone"]), torch.compiler.set_stance("force_eager"):  # its shapes are others
            features = eval_bach.embed(teacher["backbone"], pixels, norm_mean, norm_std, dev)
    except Exception as e:
        with open(note, "w") as f:
            f.write(" ".join(f"{type(e).__name__}: {e}".split()))
        saver.finish()  # the resumed run needs it
        raise
    if rank != 0:
        return {}
    try:
        row = {"step": step, "images": progress["samples"], "embed_seconds": round(time.time() - start, 1)}
        row |= eval_bach.bach_row(features)
        row["protocol"] += ", teacher in bf16" if dev == "cuda" else ""  # eva embeds in fp32
        row["seconds"] = round(time.time() - start, 1)
        write_row("bach.jsonl", row)
    except Exception as e:
        reason = " ".join(f"{type(e).__name__}: {e}".split())
        say(f"step {step}: no BACH, training goes on: {reason}")
        return {"bach": None, "bach_error": reason}
    say(f"step {step}: BACH {row['bach']:.3f} +- {row['std']:.3f}, mean cosine {row['mean_cosine']:.3f}, "
        f"effective rank {row['effective_rank']:.1f}; took {row['seconds']} s")
    return {k: row[k] for k in ("bach", "plateau", "clean", "knn", "mean_cosine", "effective_rank")} | {
        f"bach_{k}": row[k] for k in ("std", "seeds", "protocol", "embed_seconds", "seconds")}


def targets(logits, head, temp):
    """Teacher logits -> probabilities."""
    if centering == "sinkhorn":
        return model.sinkhorn(logits, temp)
    next_centers[head] = model.update_center(centers[head], logits)
    return model.softmax_center(logits, centers[head], temp)


def spreading(cls):
    """The term that keeps class tokens apart, summed over the two global crops, unweighted; cls (2B, D)."""
    if kde == "none":
        return cls.new_zeros((), dtype=torch.float32)
    if kde == "koleo":
        return sum(model.koleo_loss(x) for x in cls.chunk(2))
    form = model.kde_loss if kde == "uniformity" else model.kde_loss_openmidnight
    return sum(form(x, kde_kappa) for x in cls.chunk(2))


def crowding(cls):
    """
    Signs of collapse (eval_bach.spread) in the student's class tokens (2B, D) of this rank's global crops, half of them
    masked. In bf16 the rank of tokens that all but coincide is that of their rounding: trust the cosine there.
    """
    found = eval_bach.collapse_metrics(cls.detach().float().cpu()) if cls.isfinite().all() else {}
    return {"cls_rank": found.get("effective_rank", math.nan), "cls_cosine": found.get("mean_cosine", math.nan)}


def exchange():
    """
    What ranks must hear of each other, at log points and saves: unreadable tiles, of which each file is named once and
    too many stop the run. Returns whether a signal has reached any.
    """
    everyone = [None] * world
    dist.all_gather_object(everyone, (bad_messages, len(signals)))
    bad_messages.clear()
    for message in (m for messages, _ in everyone for m in messages):
        file = message.split(": ")[0]
        if file not in bad_tiles:
            bad_tiles[file] = message
            say(f"unreadable, another tile was drawn instead: {message}")
    if len(bad_tiles) > max_bad_tiles:
        stop(f"{len(bad_tiles)} unreadable files (max_bad_tiles = {max_bad_tiles}):\n" + "\n".join(bad_tiles.values()))
    return any(signalled for _, signalled in everyone)


def check_steps():
    """How many steps were skipped since the last look, and whether these are too many."""
    new, progress["bad_steps"] = bad_steps.item() - progress["bad_steps"], bad_steps.item()
    if new:
        say(f"step {progress['step']}: loss or gradient was not finite in {new} steps since the last row, which were "
            f"skipped ({progress['bad_steps']} so far)")
    if progress["bad_steps"] > max_bad_steps:
        stop(f"{progress['bad_steps']} steps were not finite (max_bad_steps = {max_bad_steps})")


signals = []  # a preemption: SIGTERM, or SIGUSR1 some time before (sbatch --signal=USR1@300)


def ignore_signals(worker):
    """Those that go to all processes of a job must not end the data workers before the step and the save are done."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, lambda number, frame: signals.append(number))
atexit.register(lambda: [p.kill() for p in multiprocessing.active_children()])  # they would ignore Python's SIGTERM
if progress["step"] == 0:
    blank = dict.fromkeys(("loss", "dino", "ibot", "kde", "grad_norm", "lr", "images_per_s"))
    write_row("metrics.jsonl", {"step": 0, **blank, **evaluate(0)})
offset = progress["samples"] - progress["step"] * images
batches = iter(torch.utils.data.DataLoader(
    data.Batches(source, config, grid, rank, world, offset), batch_size=None, num_workers=workers,
    sampler=range(progress["step"], max_steps), pin_memory=dev == "cuda",
    multiprocessing_context="fork" if workers else None, worker_init_fn=ignore_signals))
bar = tqdm(total=max_steps, initial=progress["step"], unit="step", disable=rank != 0 or not sys.stderr.isatty())
clock = {"start": time.time(), "step": progress["step"], "data": 0.0}
next_centers = {}  # taken over only if the step is
bad_messages = []  # of this rank, since the last exchange
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
        stop("a tile could not be replaced, every draw failed:\n" + "\n".join(dict.fromkeys(batch["bad"])))
    crops = [data.augment(batch["global_crops"], batch["global_colour"], config, dev)]  # (2B, 3, S, S)
    if local_crops:
        crops.append(data.augment(batch["local_crops"], batch["local_colour"], config, dev))  # (L*B, 3, s, s)
    masks, masked, mask_weights = (batch[k].to(dev, non_blocking=True) for k in ("masks", "masked", "mask_weights"))
    # teacher: unmasked global crops
    with torch.no_grad():
        seen = teacher["backbone"](crops[0])
        dino_targets = targets(teacher["dino_head"](seen["cls"]), "dino", now["teacher_temp"])  # (2B, K)
        ibot_targets = targets(  # (M, K)
            teacher["ibot_head"](seen["patches"].flatten(0, 1)[masked]), "ibot", now["teacher_temp"])
    # student: masked global crops, local crops
    out = student["backbone"](crops, [masks, None][: len(crops)])
    logits = student["dino_head"](torch.cat([o["cls"] for o in out]))  # ((2 + L) * B, K)
    on_global, on_local = logits.split([2 * batch_size, local_crops * batch_size])
    on_masked = student["ibot_head"](out[0]["patches"].flatten(0, 1)[masked])  # (M, K)
    # losses
    dino = sum(model.dino_loss(on_global, on_local, dino_targets, student_temp))
    ibot = model.ibot_loss(on_masked, ibot_targets, mask_weights, 2 * batch_size, student_temp)
    spread = spreading(out[0]["cls"])
    loss = dino + ibot_weight * ibot + kde_weight * spread
    del logits, on_global, on_local, on_masked, dino_targets, ibot_targets  # their gradient is made; 3 GB in ViT-g
    loss.backward()
    # clip, finite check, step, average
    norms = sharding.clip_gradients(student, clip_grad)  # of backbone and heads, before clipping, over all ranks
    terms = torch.stack([loss, dino, ibot, spread]).detach()
    dist.all_reduce(terms)
    finite = torch.isfinite(torch.cat([terms, norms])).all()  # on all ranks alike; read at log points only
    optimizer.found_inf = (~finite).float()  # by which fused AdamW leaves weights and moments as they were
    optimizer.step()
    centers.update({head: torch.where(finite, center, centers[head]) for head, center in next_centers.items()})
    sharding.update_ema(teacher, student, now["momentum"], finite)
    bad_steps += ~finite
    optimizer.zero_grad()
    bad_messages += batch["bad"]
    progress["step"] = done = step + 1
    progress["samples"] += images
    bar.update()
    # log, evaluate, save
    last, preempted = done == max_steps, False
    evaluating = last or (eval_interval and done % eval_interval == 0)
    if done % log_interval == 0 or evaluating:
        check_steps()
        preempted = exchange()
        seconds, steps = max(time.time() - clock["start"], 1e-9), done - clock["step"]
        row = dict(zip(("loss", "dino", "ibot", "kde"), (terms / world).tolist()))
        row = {"step": done, **row, "grad_norm": norms.square().sum().sqrt().item(), "lr": now["lr"],
               **{f"grad_norm_{k}": v for k, v in zip(student, norms.tolist())}, "teacher_temp": now["teacher_temp"],
               "wd": now["wd"], **crowding(out[0]["cls"]),
               "images_per_s": round(steps * images / seconds, 2), "data_wait": round(clock["data"] / seconds, 3),
               "bad_steps": progress["bad_steps"], "bad_tiles": len(bad_tiles)}
        row |= {"peak_gb": torch.cuda.max_memory_allocated() / 1e9} if dev == "cuda" else {}
        text = f"loss {row['loss']:.4f}, gradient {row['grad_norm']:.2f}, {row['images_per_s']:.1f} images/s"
        bar.set_postfix_str(text)
        if bar.disable:
            say(f"step {done}/{max_steps}: {text}")
        # a signal leaves little time, a probe's point costs a minute or more
        write_row("metrics.jsonl", {**row, **(evaluate(done) if evaluating and (last or not preempted) else {})})
        clock = {"start": time.time(), "step": done, "data": 0.0}
    if last or preempted or (save_interval and done % save_interval == 0):
        saving = time.time()
        check_steps()
        preempted = exchange() or preempted
        try:
            export_teacher(done)
            saver.save(done, state())  # last: a run that resumes here has its export and its rows
            if last or preempted:
                saver.finish()
        except ValueError as e:
            stop(e)
        say(f"saved: {out_dir}/ckpt/{done}, {out_dir}/teacher/{done}.pth")
        clock["start"] += time.time() - saving
    if preempted and not last:
        say(f"stopped by a signal after step {done}: go on with the same command and --resume=true")
        break
    if done % 100 == 0:
        gc.collect()

# ---- finish ---------------------------------------------------------------------------------------------------------
bar.close()
del batches  # its workers end now, not by the kill above
if progress["step"] == max_steps:
    say(f"done: {max_steps} steps, {out_dir}")
dist.destroy_process_group()
