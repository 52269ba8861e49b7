"""Every config says a question, the launch line, what it costs; changes what its body says; follows its lineage."""
import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import configurator
import data
import model

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "bench"))  # behind the root, two of whose files have namesakes there
import configs  # noqa: E402

TRAIN = {p.stem: p for p in sorted((ROOT / "config").glob("*.py")) if p.stem != "baselines"}
ABLATE = {p.stem: p for p in sorted((ROOT / "config/ablate").glob("*.py"))}
# a lineage's or a size's own constants; all others ask one question and change one to five things
RECIPES = {"toy", "vitg", "vitg_openmidnight_head", "vitg_openmidnight", "vithplus", "vit7b", "vits_1gpu"}
VITG = [name for name in TRAIN if name.startswith("vitg_")]


def resolve(*files):
    """train.py's keys after these files."""
    keys = final = data.train_keys()
    for file in files:
        final = {**final, **configurator.run_file(str(file), final, keys)}
    return final


def parent_of(path):
    """The config that a file execs, or None for train.py's own defaults."""
    named = re.findall(r'with_name\("(\w+\.py)"\)', path.read_text())
    assert len(named) <= 1
    return path.with_name(named[0]) if named else None


def assigned(path):
    """Statements of a config's body, as the public names that each gives a value."""
    found = [[n.id for target in node.targets for n in ast.walk(target) if isinstance(n, ast.Name)]
             for node in ast.parse(path.read_text()).body if isinstance(node, ast.Assign)]
    return [names for names in found if not names[0].startswith("_")]


def changed(path, parent):
    after, before = resolve(*([parent] if path in ABLATE.values() else []), path), resolve(*[parent] * bool(parent))
    return {key: after[key] for key in after if after[key] != before[key]}


@pytest.mark.parametrize("path", [*TRAIN.values(), *ABLATE.values()], ids=lambda p: p.stem)
def test_a_config_differs_from_its_parent_by_exactly_the_keys_of_its_body(path):
    parent = ROOT / "config/toy.py" if path in ABLATE.values() else parent_of(path)
    statements = assigned(path)
    if path.stem == "toy_pretrain":  # both sides of the tile are one number
        assert resolve(path)["tile_px"] == resolve(path)["global_px"]
    assert changed(path, parent).keys() == {name for names in statements for name in names}
    assert sum(len(names) for names in statements) == len({name for names in statements for name in names})
    if path.stem not in RECIPES:
        assert len([s for s in statements if s != ["out_dir"]]) <= 5
    if path.stem != "toy" and path.parent.name == "config":
        assert resolve(path)["out_dir"] == f"out/{path.stem}"


def test_every_header_states_question_parent_launch_line_and_result():
    for name, path in {**TRAIN, **ABLATE, "baselines": ROOT / "config/baselines.py"}.items():
        text = path.read_text()
        head = [line for line in text.splitlines() if line.startswith("#")]
        labels = [m[1] for line in head if (m := re.match(r"# (\w+): ", line))]
        assert labels[:2] == ["question", "run"], name
        costly, answered = "nproc" in text or "1gpu" in name, not name.startswith("toy_")
        assert labels[2:] == ["cost"] * costly + ["result"] * answered, name
        file = str(path.relative_to(ROOT))
        assert next(line for line in head if line.startswith("# run:")).split("#")[1].count(file) == 1, name
        if name not in ("baselines", "toy"):
            stated = re.search(r"parent: (\S+)", text)[1]
            parent = parent_of(path)
            assert stated == (f"config/{parent.name}" if parent else "train.py") or path in ABLATE.values()
        if name in TRAIN and "cost" in labels:  # a number comes with when, what code and how many seeds
            dated = r"\d{4}-\d\d-\d\d, [0-9a-f]{7,40}, \d+ seeds?\b"
            assert re.search(rf"(?m)^# result:   (not run yet$|{dated})", text), name


def test_every_config_fits_and_costs_what_its_header_says():
    """A dry run each: --dry_run=true passes, and TFLOP, memory and hours are those that the code computes."""
    for name, path in {**TRAIN, **ABLATE}.items():
        assert configs.header(path) == path.read_text(), f"{name}: run python bench/configs.py"
    for name in ("toy", "toy_pretrain", "toy_continue"):
        assert "total " in configs.dry_run(f"config/{name}.py", "--device=cpu")
    text = (ROOT / "config/vitg.py").read_text()
    assert "248.8 TFLOP a step" in text and "27.5 h at 0.72 s, 17.2 h at 0.45 s" in text  # 137,500 steps x s / 3600


def test_baselines_are_named_before_a_file_or_an_image_is_read(tmp_path):
    command = [sys.executable, ROOT / "eval_bach.py", ROOT / "config/baselines.py", "--dry_run=true"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    said = [line for line in done.stdout.splitlines() if line.startswith("data/weights/")]
    assert done.returncode == 0 and len(said) == 10 and "midnight: cls 224 px, norm half, no such file" in done.stdout


def test_clip3_is_what_vitg_is_and_clip30_its_only_other():
    a, b, parent = (resolve(ROOT / f"config/{n}.py") for n in ("vitg_clip3", "vitg_clip30", "vitg"))
    assert {k for k in a if a[k] != parent[k]} == {"out_dir"} and a["clip_grad"] == 3.0
    assert {k: b[k] for k in a if a[k] != b[k]} == {"out_dir": "out/vitg_clip30", "clip_grad": 30.0}


@pytest.mark.parametrize("name", [name for name in ABLATE if f"vitg_{name}" in TRAIN])
def test_a_toy_twin_changes_what_its_original_changes(name):
    original, twin = TRAIN[f"vitg_{name}"], ABLATE[name]
    a, b = changed(original, parent_of(original)), changed(twin, ROOT / "config/toy.py")
    assert b.pop("out_dir") == f"out/toy_{name}" and a.pop("out_dir") == f"out/vitg_{name}"
    if name == "level_sampling":
        assert a.pop("sample_list") == "data/levels.txt" and b.pop("sample_list") == "data/toy/levels.txt"
    assert a == b


def test_corrected_and_released_recipes_differ_only_where_the_known_mistakes_are():
    ours, head, released = (resolve(TRAIN[n]) for n in ("vitg", "vitg_openmidnight_head", "vitg_openmidnight"))
    wrong = {"kde": "openmidnight", "hed": "openmidnight", "exact_reads": False,
             "slides": "", "sample_list": "data/levels.txt"}  # by level: their scale is the scanner's
    assert {k: v for k, v in head.items() if ours[k] != v and k != "out_dir"} == wrong
    early = {"pos_embed_init": "random", "pos_interp": "offset"}
    other = {"base_lr": 2e-4, "max_steps": 250_000, "schedule_steps": 10_000_000, "mask_ratio": (0.1, 0.5)}
    assert {k: v for k, v in released.items() if head[k] != v and k != "out_dir"} == early | other
    assert ours["blur_prob"] == (0.0, 0.9, 0.5) and not ours["sample_list"] and ours["pos_embed_init"] == "resample"


def peak(c, ranks=8):
    return c["base_lr"] * (c["batch_size"] * ranks / 1024) ** 0.5


def test_schedules_of_openmidnight_s_current_recipe_are_the_reference_s():
    z = np.load(ROOT / "tests/golden/schedules.npz")
    want = json.loads(str(z["meta"]))
    for name in ("vitg", "vitg_openmidnight_head", "vitg_clip3"):
        c = resolve(TRAIN[name])
        assert c["max_steps"] == want["epochs"] * want["iters_per_epoch"]
        assert c["batch_size"] * 8 == want["global_batch"]
        for i, step in enumerate(z["iteration"].tolist()):
            got = model.schedules(step, c, peak(c))
            for key, theirs in (("lr", "lr"), ("wd", "weight_decay"), ("momentum", "momentum"),
                                ("teacher_temp", "teacher_temp"), ("last_layer_lr", "last_layer_lr")):
                assert got[key] == pytest.approx(z[theirs][i], rel=1e-9, abs=1e-15), (name, step, key)


@pytest.mark.parametrize("name, ranks, lr, at_stop", [
    ("vitg_openmidnight", 8, 1.2247e-4, dict(lr=1.223e-4, wd=0.0402, momentum=0.994009)),
    ("vitg_openmidnight_head", 8, 1.8371e-4, dict(lr=1e-6, wd=0.2, momentum=1.0)),
    ("vitg", 8, 1.8371e-4, dict(lr=1e-6, wd=0.2, momentum=1.0)),
    ("vithplus", 8, 5.29e-4, dict(lr=0.999 * 5.29e-4, wd=0.0405, momentum=0.99201)),
    ("vit7b", 256, 4e-4, dict(wd=0.04, momentum=0.994)),  # Meta's 4,096 images; 5e-5 x 4 x sqrt(4) there
    ("vits_1gpu", 2, 4e-4, {}),  # OpenMidnight's 256 images
])
def test_peaks_and_ends_of_each_lineage(name, ranks, lr, at_stop):
    c = resolve(TRAIN[name])
    got = model.schedules(c["warmup_steps"], c, peak(c, ranks))
    assert got["lr"] == pytest.approx(lr, rel=1e-3) and got["last_layer_lr"] == got["lr"]
    assert model.schedules(c["freeze_last_layer"] - 1, c, peak(c, ranks))["last_layer_lr"] == 0
    assert model.schedules(c["freeze_last_layer"], c, peak(c, ranks))["last_layer_lr"] > 0
    assert model.schedules(0, c, 1)["teacher_temp"] == 0.04
    assert model.schedules(c["teacher_temp_warmup"], c, 1)["teacher_temp"] == 0.07
    end = model.schedules(c["max_steps"], c, peak(c, ranks))
    assert {k: end[k] for k in at_stop} == pytest.approx(at_stop, rel=2e-3)


OPENMIDNIGHT = dict(
    arch="dinov2_vitg14_reg", batch_size=48, min_lr=1e-6, warmup_steps=12_500, freeze_last_layer=1250,
    betas=(0.9, 0.999), weight_decay=0.04, weight_decay_end=0.2, momentum=0.994, momentum_end=1.0,
    teacher_temp_start=0.04, teacher_temp=0.07, teacher_temp_warmup=37_500, student_temp=0.1,
    centering="sinkhorn", clip_grad=3.0, layer_decay=1.0, patch_embed_lr=0.2, drop_path=0.4,
    global_px=224, local_px=98, local_crops=8, global_scale=(0.32, 1.0),
    local_scale=(0.05, 0.32), mask_prob=0.5, head_weight_norm=True, dino_hidden=2048, dino_bottleneck=384,
    dino_prototypes=131072, ibot_hidden=2048, ibot_bottleneck=256, ibot_prototypes=131072, kde_weight=0.05,
    kde_kappa=5.0, hed_prob=0.5, hed_nats=0.69, jitter=(0.2, 0.2, 0.1, 0.05), jitter_prob=0.8, gray_prob=0.2,
    blur_prob=(0.0, 0.9, 0.5), norm=None, tile_px=224, ibot_weight=1.0)
DINOV3_HEADS = dict(head_weight_norm=False, dino_hidden=8192, dino_bottleneck=512, dino_prototypes=262144,
                    ibot_hidden=4096, ibot_bottleneck=384, ibot_prototypes=98304, rope_rescale=2.0, layer_decay=0.98)
PATH_FM = DINOV3_HEADS | dict(
    arch="dinov3_vith16plus", batch_size=56, max_steps=250_000, schedule_steps=10_000_000, base_lr=8e-4, min_lr=1e-6,
    warmup_steps=12_500, teacher_temp_warmup=12_500, freeze_last_layer=1250, weight_decay=0.04, weight_decay_end=0.4,
    momentum=0.992, momentum_end=1.0, betas=(0.9, 0.999), clip_grad=3.0, patch_embed_lr=0.2, drop_path=0.3, local_px=96,
    local_crops=8, mask_ratio=(0.1, 0.5), keep_checkpoints=3, keep_every=12_500, compile=True, kde_weight=0.05)
DINOV3 = DINOV3_HEADS | dict(  # warm-ups and steps a twentieth
    arch="dinov3_vit7b16", batch_size=16, max_steps=50_000, base_lr=2e-4, warmup_steps=5000, teacher_temp_warmup=5000,
    freeze_last_layer=5000, weight_decay=0.04, weight_decay_end=0.04, momentum=0.994, momentum_end=0.994,
    betas=(0.9, 0.99), clip_grad=30.0, drop_path=0.4, local_px=112, mask_ratio=(0.1, 0.5), fp8="on")
ABLATION = dict(  # OpenMidnight's, at half its batch and twice its steps
    arch="dinov2_vits14_reg", batch_size=128, local_crops=4, local_px=98, drop_path=0.1, base_lr=8e-4, max_steps=50_000,
    warmup_steps=3000, freeze_last_layer=1000, teacher_temp_warmup=30_000, kde_weight=0.05, mask_ratio=(0.1, 0.45),
    dino_bottleneck=384)


@pytest.mark.parametrize("name, constants", [
    ("vitg", OPENMIDNIGHT | dict(base_lr=3e-4, max_steps=137_500, mask_ratio=(0.1, 0.45), kde="uniformity", hed="od")),
    ("vitg_openmidnight_head", OPENMIDNIGHT | dict(base_lr=3e-4, max_steps=137_500, mask_ratio=(0.1, 0.45))),
    ("vitg_openmidnight", OPENMIDNIGHT | dict(base_lr=2e-4, max_steps=250_000, schedule_steps=8000 * 1250,
                                              mask_ratio=(0.1, 0.5))),
    ("vithplus", PATH_FM), ("vit7b", DINOV3), ("vits_1gpu", ABLATION),
    ("vitg_norm_tcga", dict(norm=((0.7032, 0.5361, 0.6610), (0.2172, 0.2608, 0.2072))))])
def test_constants_of_each_lineage(name, constants):
    c = resolve(TRAIN[name])
    assert {k: c[k] for k in constants} == constants


def test_vith_plus_under_vitg_s_recipe_is_vitg_s_but_for_the_network():
    ours, plus = resolve(TRAIN["vitg"]), resolve(TRAIN["vithplus_dinov2_recipe"])
    assert {k for k in ours if plus[k] != ours[k]} == {"out_dir", "arch", "weights", "local_px"}


COLUMNS = ("vitg_openmidnight", "vitg_openmidnight_head", "vitg", "vithplus", "vit7b")
ROWS = {  # label of docs/recipe.md -> what its cell must hold of a config
    "images a step": lambda c: [f"{c['batch_size']} x 8"],
    "steps (M tiles)": lambda c: [f"{c['max_steps']:,} ({c['max_steps'] * c['batch_size'] * 8 / 1e6:.3g}"],
    "lr x sqrt(images / 1024)": lambda c: [f"{c['base_lr']:.0e}".replace("e-0", "e-")],
    "weight decay": lambda c: [f"{c['weight_decay']:g}", f"{c['weight_decay_end']:g}"],
    "momentum": lambda c: [f"{c['momentum']:g}"],
    "last layer frozen": lambda c: [f"{c['freeze_last_layer']:,}"],
    "clip, each part alone": lambda c: [f"{c['clip_grad']:g}"],
    "AdamW betas": lambda c: [f"{c['betas'][0]}, {c['betas'][1]}"],
    "lr of block i of L": lambda c: [f"{c['layer_decay']:g}"],
    "drop path, all blocks": lambda c: [f"{c['drop_path']:g}"],
    "DINO head": lambda c: [f"{c['dino_hidden']}, {c['dino_bottleneck']}, {c['dino_prototypes']}",
                            "weight norm" if c["head_weight_norm"] else "plain"],
    "iBOT head": lambda c: [f"{c['ibot_hidden']}, {c['ibot_bottleneck']}, {c['ibot_prototypes']}"],
    "masked share of half the globals": lambda c: [f"{c['mask_ratio'][0]}-{c['mask_ratio'][1]}"],
    "crops": lambda c: [f"x {c['global_px']}", f"{c['local_crops']} x {c['local_px']}"],
    "spreading term, 0.05": lambda c: ["gathers" if c["kde"] == "openmidnight" else "spreads"],
}


def test_the_recipe_page_states_the_configs_constants():
    table = re.findall(r"^\| (.*) \|$", (ROOT / "docs/recipe.md").read_text().split("## Constants")[1], re.M)
    table = {cells[0]: cells[1:] for cells in (line.split(" | ") for line in table) if cells[0] in ROWS}
    assert table.keys() == ROWS.keys()
    for label, cells in table.items():
        for i, name in enumerate(COLUMNS):
            while cells[i].startswith(("same", "as now", "as released")):
                cells[i] = cells[i - 1]
            for text in ROWS[label](resolve(TRAIN[name])):
                assert text in cells[i], (label, name)
    lr = (ROOT / "docs/recipe.md").read_text()
    for name in ("vitg_openmidnight", "vitg"):
        assert f"{peak(resolve(TRAIN[name])):.4e}".replace("e-0", "e-") in lr
