"""Every config states a question and a launch line, changes what its body says, fits, and follows its lineage."""
import ast
import json
import re

import numpy as np
import pytest
from conftest import ROOT

import model
from bench import configs
from prepare.stats import train_config

TRAIN = {p.stem: p for p in sorted((ROOT / "config").glob("*.py"))
         if p.stem != "baselines" and not p.stem.startswith("context")}  # test_context.py has context.py's
ABLATE = {p.stem: p for p in sorted((ROOT / "config/ablate").glob("*.py"))}
# a lineage's or a size's own constants; all others ask one question and change one to five things
RECIPES = {"toy", "vitg", "vitg_openmidnight_head", "vitg_openmidnight", "vithplus", "vit7b", "vits_1gpu"}


def resolve(*files):
    """train.py's keys after these files."""
    return train_config([str(file) for file in files])


def parent_of(path):
    """The config that a file execs, as a list; [] for train.py's own defaults."""
    named = re.findall(r'with_name\("(\w+\.py)"\)', path.read_text())
    assert len(named) <= 1
    return [path.with_name(name) for name in named]


def changed(parent, path):
    before, after = resolve(*parent), resolve(*parent, path)
    return {key: after[key] for key in after if after[key] != before[key]}


@pytest.mark.parametrize("path", [*TRAIN.values(), *ABLATE.values()], ids=lambda p: p.stem)
def test_a_config_differs_from_its_parent_by_exactly_the_keys_of_its_body(path):
    parent = [TRAIN["toy"]] if path in ABLATE.values() else parent_of(path)
    targets = [target for node in ast.parse(path.read_text()).body if isinstance(node, ast.Assign)
               for target in node.targets]
    names = [node.id for target in targets for node in ast.walk(target) if isinstance(node, ast.Name)]
    assert sorted(changed(parent, path)) == sorted(names)
    if path.stem not in RECIPES:
        assert len(targets) <= 6  # out_dir and five
    if path.stem != "toy" and path.parent.name == "config":
        assert resolve(path)["out_dir"] == f"out/{path.stem}"


@pytest.mark.parametrize("name", ABLATE)
def test_an_ablation_changes_the_same_on_any_parent(name):
    """level_sampling names the list of what it is applied to."""
    of_toy, of_vitg = (changed([TRAIN[parent]], ABLATE[name]) for parent in ("toy", "vitg"))
    assert (of_toy.pop("out_dir"), of_vitg.pop("out_dir")) == (f"out/toy_{name}", f"out/vitg_{name}")
    if name == "level_sampling":
        assert of_toy.pop("sample_list") == "data/toy/levels.txt" and of_vitg.pop("sample_list") == "data/levels.txt"
    assert of_toy == of_vitg


@pytest.mark.parametrize("path", [*TRAIN.values(), *ABLATE.values()], ids=lambda p: p.stem)
def test_a_header_states_question_parent_launch_line_and_result(path):
    head = [line for line in path.read_text().splitlines() if line.startswith("#")]
    stated = dict(re.match(r"# (\w+): +(\S.*)", line).groups() for line in head[:4])
    assert list(stated) == ["question", "parent", "run", "result"]
    assert stated["run"].count(str(path.relative_to(ROOT))) == 1
    if path in ABLATE.values():
        return
    parent = parent_of(path)
    assert stated["parent"] == (f"config/{parent[0].name}" if parent else "train.py")
    if not path.stem.startswith("toy"):  # a number comes with when, what code and how many seeds
        assert re.match(r"not run yet$|\d{4}-\d\d-\d\d, [0-9a-f]{7,40}, \d+ seeds?\b", stated["result"])


def test_every_config_fits_its_gpus_and_hours_follow_from_tflop():
    for path in TRAIN.values():
        config, found = configs.estimate(path.relative_to(ROOT))
        assert found["memory_gb"] < (config["gpu_memory_gb"] or 80), path
    config, found = configs.estimate("config/vitg.py")
    assert found["tflop"] == pytest.approx(248.8, abs=0.05)
    assert configs.hours(config, found) == pytest.approx([27.5, 17.1875])  # 137,500 steps x s / 3600


def test_baselines_are_named_before_a_file_or_an_image_is_read(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = script("eval_bach.py", ROOT / "config/baselines.py", "--dry_run=true")
    named = [line for line in said.splitlines() if line.startswith("data/weights/")]
    assert len(named) == 10 and "midnight: cls 224 px, norm half, no such file" in said


def test_clip3_is_what_vitg_is():
    assert changed([TRAIN["vitg"]], TRAIN["vitg_clip3"]) == {"out_dir": "out/vitg_clip3"}
    assert resolve(TRAIN["vitg_clip3"])["clip_grad"] == 3.0
    with pytest.raises(SystemExit, match="this file wants vitg.py's 3"):
        resolve(TRAIN["vit7b"], TRAIN["vitg_clip3"])
    with pytest.raises(SystemExit, match="write .*vitg_clip3.py .*clip30.py$"):
        resolve(TRAIN["vitg"], ABLATE["clip30"], TRAIN["vitg_clip3"])


def test_corrected_and_released_recipes_differ_only_where_the_known_mistakes_are():
    def differing(path):
        return {key: value for key, value in changed(parent_of(path), path).items() if key != "out_dir"}

    assert differing(TRAIN["vitg_openmidnight_head"]) == {
        "kde": "openmidnight", "hed": "openmidnight", "exact_reads": False,
        "slides": "", "sample_list": "data/levels.txt"}  # by level: their scale is the scanner's
    assert differing(TRAIN["vitg_openmidnight"]) == {
        "pos_embed_init": "random", "pos_interp": "offset", "base_lr": 2e-4, "max_steps": 250_000,
        "schedule_steps": 10_000_000, "mask_ratio": (0.1, 0.5)}
    assert differing(TRAIN["vithplus_dinov2_recipe"]).keys() == {"arch", "weights", "local_px"}
    ours = resolve(TRAIN["vitg"])
    assert ours["blur_prob"] == (0.0, 0.9, 0.5) and not ours["sample_list"] and ours["pos_embed_init"] == "resample"


def peak(config, ranks=8):
    return config["base_lr"] * (config["batch_size"] * ranks / 1024) ** 0.5


@pytest.mark.parametrize("name", ["vitg", "vitg_openmidnight_head", "vitg_clip3"])
def test_schedules_of_openmidnight_s_current_recipe_are_the_reference_s(name):
    golden, config = np.load(ROOT / "tests/golden/schedules.npz"), resolve(TRAIN[name])
    want = json.loads(str(golden["meta"]))
    assert config["max_steps"] == want["epochs"] * want["iters_per_epoch"]
    assert config["batch_size"] * 8 == want["global_batch"]
    got = [model.schedules(step, config, peak(config)) for step in golden["iteration"].tolist()]
    for key in ("lr", "wd", "momentum", "teacher_temp", "last_layer_lr"):
        theirs = golden["weight_decay" if key == "wd" else key]
        assert [row[key] for row in got] == pytest.approx(theirs, rel=1e-9, abs=1e-15), key


@pytest.mark.parametrize("name, ranks, lr, at_stop", [
    ("vitg_openmidnight", 8, 1.2247e-4, dict(lr=1.223e-4, wd=0.0402, momentum=0.994009)),
    ("vitg_openmidnight_head", 8, 1.8371e-4, dict(lr=1e-6, wd=0.2, momentum=1.0)),
    ("vitg", 8, 1.8371e-4, dict(lr=1e-6, wd=0.2, momentum=1.0)),
    ("vithplus", 8, 5.29e-4, dict(lr=0.999 * 5.29e-4, wd=0.0405, momentum=0.99201)),
    ("vit7b", 256, 4e-4, dict(wd=0.04, momentum=0.994)),  # Meta's 4,096 images; 5e-5 x 4 x sqrt(4) there
    ("vits_1gpu", 2, 4e-4, {}),  # OpenMidnight's 256 images
])
def test_peaks_and_ends_of_each_lineage(name, ranks, lr, at_stop):
    config = resolve(TRAIN[name])

    def at(step):
        return model.schedules(step, config, peak(config, ranks))

    top, frozen = at(config["warmup_steps"]), config["freeze_last_layer"]
    assert top["lr"] == pytest.approx(lr, rel=1e-3) and top["last_layer_lr"] == top["lr"]
    assert at(frozen - 1)["last_layer_lr"] == 0 < at(frozen)["last_layer_lr"]
    assert at(0)["teacher_temp"] == 0.04 and at(config["teacher_temp_warmup"])["teacher_temp"] == 0.07
    end = at(config["max_steps"])
    assert {key: end[key] for key in at_stop} == pytest.approx(at_stop, rel=2e-3)


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
    config = resolve(TRAIN[name])
    assert {key: config[key] for key in constants} == constants


ROWS = {  # label of docs/recipe.md -> texts that a cell must hold, of a config's keys
    "images per step": "{batch_size} x 8",
    "steps (M tiles)": "{max_steps:,} ({tiles:.3g}",
    "lr x sqrt(images / 1024)": "{lr}",
    "weight decay": "{weight_decay:g}|{weight_decay_end:g}",
    "momentum": "{momentum:g}",
    "last layer frozen": "{freeze_last_layer:,}",
    "clip, each part alone": "{clip_grad:g}",
    "AdamW betas": "{betas[0]}, {betas[1]}",
    "lr of block i of L": "{layer_decay:g}",
    "drop path, all blocks": "{drop_path:g}",
    "DINO head": "{dino_hidden}, {dino_bottleneck}, {dino_prototypes}, {last}",
    "iBOT head": "{ibot_hidden}, {ibot_bottleneck}, {ibot_prototypes}",
    "masked share of half the globals": "{mask_ratio[0]}-{mask_ratio[1]}",
    "crops": "x {global_px}|{local_crops} x {local_px}",
    "spreading term, 0.05": "{sign}"}


@pytest.mark.parametrize("column, name", [
    (0, "vitg_openmidnight"), (1, "vitg_openmidnight_head"), (2, "vitg"), (3, "vithplus"), (4, "vit7b")])
def test_the_recipe_page_states_the_configs_constants(column, name):
    config, page = resolve(TRAIN[name]), (ROOT / "docs/recipe.md").read_text()
    config["tiles"] = config["max_steps"] * config["batch_size"] * 8 / 1e6
    config["lr"] = f"{config['base_lr']:.0e}".replace("e-0", "e-")
    config["last"] = "weight norm" if config["head_weight_norm"] else "plain"
    config["sign"] = "gathers" if config["kde"] == "openmidnight" else "spreads"
    rows = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| ")]
    table = {label: cells for label, *cells in rows}
    for label, template in ROWS.items():
        cell = column
        while table[label][cell].startswith(("same", "as now", "as released")):
            cell -= 1
        for text in template.format(**config).split("|"):
            assert text in table[label][cell], label
    if name in ("vitg_openmidnight", "vitg"):
        assert f"{peak(config):.4e}".replace("e-0", "e-") in page
