"""What leaves the project: weights for transformers and timm, embeddings of tiles, and the package itself."""
import json
import sys
import tomllib
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ROOT, one_line
from PIL import Image
from test_timm import MODELS, PX, differs, recorded  # noqa: F401 (a fixture)
from test_timm import write as write_timm
from test_train import bit_equal
from test_weights import V2, V3, equal_to, fill, same

import eval_bach
import model
from configurator import configure
from prepare import embed
from prepare.export import mlp_ratio

V2 = replace(V2, ffn_hidden=256, pos_offset=0.0)
REG = replace(V2, registers=4, pos_antialias=True, norm_eps=1e-2)
KINDS = {  # class of transformers: our networks that it can be
    "Dinov2Model": [V2, replace(V2, ffn="swiglu", num_heads=4)],
    "Dinov2WithRegistersModel": [REG, replace(REG, ffn="swiglu", qkv_bias=False), replace(REG, registers=0)],
    "DINOv3ViTModel": [V3, replace(V3, ffn="swiglu", rope_base=50.0, norm_eps=1e-2), replace(V3, mask_k_bias=False),
                       replace(V3, registers=0, qkv_bias=False, local_cls_norm=True)]}
NORM = ((0.7, 0.6, 0.5), (0.2, 0.25, 0.3))


def teacher(path, arch, step=5, **config):
    """A teacher's file with random weights that all show; the network."""
    vit = fill(model.ViT(arch))
    fields = {key: getattr(arch, key) for key in (*"num_heads norm_eps rope_base mask_k_bias".split(),
                                                  *"pos_antialias pos_offset".split())}
    config = {"norm": NORM, "global_px": 56 if arch.pos == "learned" else 64, **config}
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"teacher": vit.state_dict(), "arch": fields, "step": step, "config": config}, path)
    return vit


@pytest.fixture
def export(script, tmp_path):
    """export(weights, *flags): the folder, written anew."""
    pytest.importorskip("safetensors")
    def run(weights, *flags):
        out = tmp_path / f"export{len(list(tmp_path.glob('export*')))}"
        script("prepare/export.py", f"--weights={weights}", f"--out={out}", *flags)
        return out
    return run


@pytest.mark.parametrize("kind, arch", [(kind, arch) for kind, archs in KINDS.items() for arch in archs])
def test_transformers_computes_the_features_of_a_teacher_and_we_load_them_again(kind, arch, tmp_path, export):
    transformers = pytest.importorskip("transformers")
    vit = teacher(tmp_path / "5.pth", arch)
    folder = export(tmp_path / "5.pth")
    net, told = transformers.AutoModel.from_pretrained(folder, output_loading_info=True)
    assert type(net).__name__ == kind and not any(told[key] for key in ("missing_keys", "unexpected_keys"))
    p = arch.patch_size
    for px in ((4 * p, 4 * p), (3 * p, 5 * p)):
        assert equal_to(net.eval(), vit, px) < 1e-5
    ours = model.load_backbone(folder)
    same(ours, vit)
    assert ours.arch.num_heads == arch.num_heads and ours.arch.norm_eps == arch.norm_eps
    assert model.stored_norm(folder) == NORM
    pixels = np.random.default_rng(0).integers(0, 256, (4 * p, 4 * p, 3), dtype=np.uint8)
    x = transformers.AutoImageProcessor.from_pretrained(folder)(Image.fromarray(pixels), return_tensors="pt")
    expected = (pixels / 255 - NORM[0]) / NORM[1]
    assert np.abs(x["pixel_values"][0].permute(1, 2, 0).numpy() - expected).max() < 1e-5


def test_timm_gets_its_own_names_and_values(recorded, tmp_path, export):  # noqa: F811
    st = pytest.importorskip("safetensors.torch")
    name, tensors, config, outputs = recorded
    folder = export(write_timm(tmp_path / name, tensors, config), "--to=timm")
    written, about = st.load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    if name not in ("kaiko", "virchow2"):  # these lose what others lack: no layer-scale, positions of registers
        bit_equal(written, tensors)
    for px in PX:
        assert differs(model.load_backbone(folder), px, outputs[px]) < 2e-5
    assert model.stored_norm(folder) == model.stored_norm(tmp_path / name)
    stated = about["model_args"]
    for key in stated.keys() & MODELS[name][1].keys():
        assert stated[key] == MODELS[name][1][key], key
    width = written["blocks.0.mlp.fc1_g.bias" if name == "dinov3_plus" else "blocks.0.mlp.fc1.bias"]
    assert int(stated["embed_dim"] * stated["mlp_ratio"]) == len(width)
    if name in ("h_optimus", "dinov2_reg", "gigapath", "dinov3", "dinov3_plus", "dinov3_qkvb"):
        assert about["architecture"] == MODELS[name][0]


def test_transformers_has_every_learned_architecture_that_has_a_name():
    ratios = {name: mlp_ratio(arch) for name, arch in model.ARCHS.items() if arch.pos == "learned"}
    assert len(ratios) > 10 and set(ratios.values()) == {4}


def test_a_bias_of_zeros_is_none_to_timm(tmp_path, export):
    vit = teacher(tmp_path / "5.pth", V3)
    for name, t in (stored := torch.load(tmp_path / "5.pth"))["teacher"].items():
        t *= not name.endswith("qkv.bias")
    torch.save(stored, tmp_path / "6.pth")
    for file, biased in (("5.pth", True), ("6.pth", False)):
        folder = export(tmp_path / file, "--to=timm")
        about = json.loads((folder / "config.json").read_text())
        assert about["model_args"]["qkv_bias"] == about["architecture"].endswith("_qkvb") == biased
        same(model.load_backbone(folder), vit if biased else model.load_backbone(tmp_path / "6.pth"))


def test_the_card_has_the_runs_config_and_its_bach_rows_until_then(tmp_path, export):
    teacher(tmp_path / "x/teacher/5.pth", REG, out_dir="out/x", mpps=(0.5, 1.0), base_lr=3e-4)
    rows = [{"step": step, "bach": 0.5 + step / 100, "std": 0.01, "protocol": "eva-bach: cls"} for step in (0, 5, 10)]
    (tmp_path / "x/bach.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    card = (export(tmp_path / "x/teacher/5.pth") / "README.md").read_text()
    for part in ("# x, step 5", "56 x 56 px at 0.5, 1.0 um/px", "mean [0.7, 0.6, 0.5]", '"base_lr": 0.0003', "0.5500"):
        assert part in card
    assert "0.6000" not in card and "eva-bach: cls" in card and "another rule" not in card
    teacher(tmp_path / "y/7.pth", replace(V2, pos_offset=0.1))
    assert "At 56 x 56 px features equal" in (export(tmp_path / "y/7.pth") / "README.md").read_text()


REFUSED = [  # network, flags, message
    (V2, ["--to=onnx"], "to=onnx: give hf .* or timm"), (V2, ["--out="], "give --weights=FILE and --out=FOLDER"),
    (V2, ["--weights=absent.pth"], "absent.pth: no such weight file"), (V2, ["--out=full"], "not an empty folder"),
    (replace(V2, ffn_hidden=200), [], "no MLP of 200 hidden units at a width of 128; export it with --to=timm"),
    (REG, ["--to=timm"], "another norm_eps than 0.01"), (replace(V3, rope_base=50.0), ["--to=timm"], "rope_base"),
    (replace(V3, mask_k_bias=False), ["--to=timm"], "no bias of keys"), (V2, None, "pip install safetensors")]


@pytest.mark.parametrize("arch, flags, message", REFUSED)
def test_what_cannot_be_exported_is_one_line_and_writes_nothing(arch, flags, message, tmp_path, export, monkeypatch):
    monkeypatch.chdir(tmp_path)
    teacher(tmp_path / "5.pth", arch)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/a").touch()
    if flags is None:
        monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with one_line(message):
        export("5.pth", *(flags or ()))
    assert not list(tmp_path.glob("export*")) and len(list(tmp_path.glob("full/*"))) == 1


# ---- embeddings of tiles --------------------------------------------------------------------------------------------

@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Five images in folders of several depths, one of them damaged, and a teacher; the working folder."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for i, name in enumerate(("a/1.png", "a/2.jpg", "b/deep/1.png", "c.tif", "b/bad.png")):
        file = tmp_path / "in" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (60 + i, 70, 3), dtype=np.uint8)).save(file)
    file = tmp_path / "in/b/bad.png"
    file.write_bytes(file.read_bytes()[:200])
    teacher(tmp_path / "5.pth", REG)
    return tmp_path


FLAGS = ("--image_dir=in", "--weights=5.pth", "--input_px=56", "--device=cpu")
SOUND = ["a/1.png", "a/2.jpg", "b/deep/1.png", "c.tif"]


@pytest.mark.parametrize("feature, columns", [("cls", slice(128)), ("patches", slice(128, 256)), ("both", slice(256))])
def test_embeddings_are_the_probes_of_every_image_that_can_be_read(feature, columns, folder, capsys, monkeypatch):
    monkeypatch.setattr(embed, "CHUNK", 2)
    view = eval_bach.View(56, concat=True)
    pixels, _ = eval_bach.load_images([f"in/{file}" for file in SOUND], view)
    expected = eval_bach.embed(model.load_backbone("5.pth"), pixels, *NORM, "cpu", view)[:, columns].numpy()
    with pytest.raises(SystemExit) as stop:
        embed.main(configure(vars(embed).copy(), [*FLAGS, f"--feature={feature}", "--out=new/e.npz"]))
    assert stop.value.code == 1
    said = capsys.readouterr().out
    assert "left out: in/b/bad.png: " in said and "4 images" in said and "1 left out" in said
    with np.load("new/e.npz") as found:
        assert found["files"].tolist() == SOUND and found["features"].dtype == np.float32
        np.testing.assert_allclose(found["features"], expected, atol=1e-5)
        assert (found["norm"] == NORM).all() and found["feature"] == feature and len(str(found["weights_sha256"])) == 64
    assert "b/bad.png" in (folder / "new/e.npz.left_out.csv").read_text()
    assert sorted(path.name for path in folder.glob("new/*")) == ["e.npz", "e.npz.left_out.csv"]


def test_embeddings_in_parquet_are_those_in_npz(folder, script):
    parquet = pytest.importorskip("pyarrow.parquet")
    (folder / "in/b/bad.png").unlink()
    for out in ("e.npz", "e.parquet"):
        assert "0 left out" in script("prepare/embed.py", *FLAGS, f"--out={out}")
    table, found = parquet.read_table("e.parquet"), np.load("e.npz")
    assert table["file"].to_pylist() == SOUND
    assert np.array_equal(np.stack(table["feature"].to_numpy()), found["features"])
    assert json.loads(table.schema.metadata[b"norm"]) == [list(part) for part in NORM]
    assert not list(folder.glob("*.csv"))


def test_what_cannot_be_embedded_is_one_line(folder, script, monkeypatch):
    for flags, message in (((*FLAGS, "--out=e.csv"), "give .* --out=FILE.npz or FILE.parquet"),
                           ((*FLAGS, "--out=e.npz", "--feature=all"), "give cls, patches .* or both"),
                           ((*FLAGS, "--out=e.npz", "--input_px=60"), "no multiple of the patch, 14 px"),
                           ((*FLAGS, "--out=e.npz", "--image_dir=in/b/none"), "give --image_dir=FOLDER"),
                           ((*FLAGS, "--out=e.npz", "--weights=none.pth"), "none.pth: no such weight file")):
        with one_line(message):
            script("prepare/embed.py", *flags)
    for file in SOUND:
        (folder / "in" / file).unlink()
    with one_line("none of 1 images can be read, such as .*bad.png"):
        script("prepare/embed.py", *FLAGS, "--out=e.npz")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with one_line("pip install pyarrow, or give a .npz"):
        script("prepare/embed.py", *FLAGS, "--out=e.parquet")


# ---- the package ----------------------------------------------------------------------------------------------------

def test_an_installation_has_every_module_and_the_folders_that_they_read():
    built = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert built["py-modules"] == sorted(path.stem for path in ROOT.glob("*.py"))
    assert built["packages"] == ["bench", "prepare"]
