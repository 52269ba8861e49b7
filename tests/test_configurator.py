"""The configurator's contract, one test a row."""
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

import configurator
from configurator import configure, train_keys


def defaults():
    return dict(lr=0.1, clip_grad=3.0, steps=10, resume=False, name="base", scale=(0.3, 1.0), tags=["a"],
                extra=None, mix=())


def write(tmp_path, text, name="a.py"):
    path = tmp_path / name
    path.write_text(text)
    return str(path)


def stopped(namespace, argv):
    """The one line that configure stops with; nothing may have been applied by then."""
    before = dict(namespace)
    with pytest.raises(SystemExit) as e:
        configure(namespace, argv)
    assert namespace == before, "a refused command line must not change a variable"
    message = str(e.value)
    assert "\n" not in message and len(message) > 20, message
    return message


def test_numpys_scalars_among_the_defaults_become_pythons():
    """The bug: a run that ends well, and a teacher that cannot be read; or a key that is none."""
    np = pytest.importorskip("numpy")
    namespace = {"lr": np.float64(0.5), "steps": np.int64(3), "scale": (np.float32(0.5),), "ndarray": np.ndarray}
    config = configure(namespace, ["--lr=1"])
    assert config == {"lr": 1.0, "steps": 3, "scale": (0.5,)} and namespace == config | {"ndarray": np.ndarray}
    assert [type(v) for v in (config["lr"], namespace["steps"], *config["scale"])] == [float, int, float]


def test_only_public_plain_variables_are_keys():
    namespace = dict(defaults(), _private=1, path=Path("."), CONSTANT=3, function=len, module=sys)
    assert set(configure(namespace, [])) == set(defaults())
    for name in ("_private", "path", "CONSTANT", "function", "module"):
        assert "unknown key" in stopped(namespace, [f"--{name}=1"])


def test_files_apply_left_to_right_and_flags_win_wherever_they_stand(tmp_path):
    a, b = write(tmp_path, "lr = 1.0\nsteps = 1", "a.py"), write(tmp_path, "lr = 2.0", "b.py")
    assert configure(defaults(), [a, b])["lr"] == 2.0
    assert configure(defaults(), [b, a])["lr"] == 1.0
    for argv in (["--lr=5", a, b], [a, "--lr=5", b], [a, b, "--lr=5"]):
        config = configure(defaults(), argv)
        assert (config["lr"], config["steps"]) == (5.0, 1)
    assert configure(defaults(), ["--lr=5", "--lr=6"])["lr"] == 6.0


def test_a_file_may_compute_import_and_exec_a_parent(tmp_path):
    parent = write(tmp_path, "lr = 0.5\nname = 'parent'", "parent.py")
    child = write(tmp_path, f"import math\nfrom math import sqrt\n_half = 0.5\nexec(open({parent!r}).read())\n"
                            "def double(x): return 2 * x\nlr = double(lr) * sqrt(4) * _half", "child.py")
    namespace = defaults()
    config = configure(namespace, [child])
    assert config["lr"] == 1.0 and config["name"] == "parent"
    assert set(namespace) == set(defaults()), "imports and helpers must not leak into the script"


def test_a_file_works_on_a_scratch_copy(tmp_path):
    namespace = defaults()
    tags = namespace["tags"]
    configure(namespace, [write(tmp_path, "tags.append('b')")])
    assert namespace["tags"] == ["a", "b"] and tags == ["a"]


def test_unknown_keys_stop_with_source_and_suggestion(tmp_path):
    path = write(tmp_path, "clip_grda = 30.0")
    message = stopped(defaults(), [path])
    assert path in message and "'clip_grda'" in message and "'clip_grad'" in message
    message = stopped(defaults(), ["--stpes=3"])
    assert "--stpes" in message and "'steps'" in message


@pytest.mark.parametrize("flag, key, value", [
    ("--clip_grad=3", "clip_grad", 3.0), ("--lr=1e-3", "lr", 1e-3), ("--scale=[0.1,0.2]", "scale", (0.1, 0.2)),
    ("--scale=(0.1,0.2)", "scale", (0.1, 0.2)), ("--resume=true", "resume", True), ("--resume=False", "resume", False),
    ("--name=2024", "name", "2024"), ("--name=a=b", "name", "a=b"), ("--name=true", "name", "true"),
    ("--name=", "name", ""),
    ("--extra=3", "extra", 3), ("--extra=(1,2)", "extra", (1, 2)), ("--extra=some text", "extra", "some text"),
    ("--extra=true", "extra", True), ("--steps=-3", "steps", -3), ("--scale=(1,2)", "scale", (1.0, 2.0)),
    ("--mix=(('a',1,2.5),)", "mix", (("a", 1, 2.5),))])
def test_accepted_values(flag, key, value):
    assert repr(configure(defaults(), [flag])[key]) == repr(value), "of the same types, its elements too"


@pytest.mark.parametrize("flag", [
    "--steps=3.0", "--steps=1e3", "--steps=true", "--lr=true", "--lr=fast", "--resume=1", "--resume=yes",
    "--scale=0.3", "--tags=(1,2)", "--steps=None", "--lr=", "--scale=('a','b')", "--scale=('0.9',0.95)",
    "--scale=(None,1)", "--scale=(True,1)", "--scale=((1,),2)", "--tags=[1]", "--tags=['a',None]"])
def test_other_values_stop_with_key_type_default_and_value(flag):
    """The bug: an element of another type was a TypeError somewhere in the run, or text compared with numbers."""
    key, _, text = flag[2:].partition("=")
    message = stopped(defaults(), [flag])
    default = defaults()[key]
    assert f"'{key}'" in message and type(default).__name__ in message and repr(default) in message
    assert text.strip("()").split(",")[0].lower() in message.lower()


def test_files_are_checked_like_flags(tmp_path):
    assert configure(defaults(), [write(tmp_path, "clip_grad = 3\nscale = [0.1, 0.2]")])["scale"] == (0.1, 0.2)
    for text in ("steps = 3.5", "name = 2024", "lr = None", "import math\nlr = math.sqrt", "resume = 1"):
        assert "expects" in stopped(defaults(), [write(tmp_path, text)])


def test_values_are_pythons_own_ones(tmp_path):
    """The bug: a numpy scalar in a config, and teacher files that weights_only=True refuses."""
    text = "import numpy as np\nlr = 1e-3 * np.sqrt(.5)\nsteps = np.int64(3)\nresume = np.bool_(True)\n"
    text += "scale = (np.float32(.5), np.int64(1))\nextra = np.arange(2)\nname = np.str_('a')"
    text += "\nfrom pathlib import Path\nmix = (('slides', Path('a') / '*.svs', [np.float64(1)]),)"
    config = configure(defaults(), [write(tmp_path, text)])
    assert config["mix"] == (("slides", "a/*.svs", [1.0]),), "a path is its text"
    assert config["scale"] == (0.5, 1.0) and config["extra"] == [0, 1] and config["steps"] == 3
    for value in (*config.values(), *config["scale"], *config["mix"][0][2], *config["extra"]):
        assert type(value).__module__ == "builtins", value
    for text in ("scale = (0.1, object())", "scale = [object()]", "mix = ((1, object()),)", "extra = [{}]"):
        assert "expects" in stopped(defaults(), [write(tmp_path, text)])


@pytest.mark.parametrize("text", ["lr = float('nan')", "lr = 1e999", "scale = (0.1, -1e999)", "extra = (1, (1e999,))",
                                  "import numpy as np\nlr = np.float64(np.inf)", "lr = 10**400"])
def test_a_number_is_finite(text, tmp_path):
    """The bug: a learning rate that is none is trained with."""
    message = stopped(defaults(), [write(tmp_path, text)])
    assert "must be finite" in message or "too large" in message
    assert "must be finite" in stopped(defaults(), ["--lr=-1e999"])


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert configure(defaults(), ["--name=~/runs/a"])["name"] == "/home/me/runs/a"
    assert configure(defaults(), ["--name=~/a/*.svs,~/b,c~/d"])["name"] == "/home/me/a/*.svs,/home/me/b,c~/d"
    config = configure(defaults(), [write(tmp_path, "name = '~'\nmix = (('slides', '~/x', 1.0),)")])
    assert config["name"] == "/home/me" and config["mix"] == (("slides", "/home/me/x", 1.0),)
    assert configure(defaults(), ["--name=~root/a"])["name"].endswith("/a")
    assert "can't encode" in stopped(defaults(), ["--name=a\udcff"])
    assert "no such user" in stopped(defaults(), ["--name=~nobody-here/a"])


def test_flags_without_equals_get_a_hint():
    assert "--lr=1e-3" in stopped(defaults(), ["--lr", "1e-3"])
    assert "--resume=true" in stopped(defaults(), ["--resume"])
    assert "--steps=VALUE" in stopped(defaults(), ["--steps", "--lr=1"])
    assert "--lr=3" in stopped(defaults(), ["-lr=3"])
    assert "'lr'" in stopped(defaults(), ["--lrr", "3"])


@pytest.mark.parametrize("typed, key", [
    ("lr=1e-4", "base_lr"), ("bs=8", "batch_size"), ("batch=8", "batch_size"), ("epochs=3", "max_steps"),
    ("grad_clip=1", "clip_grad"), ("model=toy", "arch"), ("num_workers=1", "workers")])
def test_what_people_type_leads_to_the_key(typed, key):
    assert stopped(train_keys(), [f"--{typed}"]).endswith(f"; did you mean '{key}'?")
    assert stopped(train_keys(), ["--dataset=1"]).endswith("; --help lists the keys"), "and to none that is only alike"
    assert stopped(train_keys(), ["--mpps=0.5"]).endswith("; write --mpps=0.5,")


def test_a_delta_before_its_parent_is_refused_with_the_right_order(tmp_path):
    """The bug: the parent took back the delta's keys, and its baseline was trained in silence."""
    (tmp_path / "ablate").mkdir()
    parent, delta = write(tmp_path, "lr = 1.0"), write(tmp_path / "ablate", "lr = 2.0", "b.py")
    assert stopped(defaults(), [delta, "--steps=1", parent]).endswith(f": write {parent} {delta}")
    assert configure(defaults(), [parent, delta, delta])["lr"] == 2.0


SCRIPTS = [str(path.relative_to(ROOT)) for path in sorted([*ROOT.glob("*.py"), *ROOT.glob("[bp]*e*/*.py")])
           if re.search(r"^ +configure\(|= configure\(|main\(configure|^    run\(", path.read_text(), re.M)
           and path.name not in ("configurator.py", "slides.py")]


@pytest.mark.parametrize("file", SCRIPTS)
def test_help_shows_every_key_with_its_default_and_comment(file, script, monkeypatch, capsys):
    keys, real = {}, configurator.help_text
    monkeypatch.setattr(configurator, "help_text", lambda *args: keys.update(args[1]) or real(*args))
    with pytest.raises(SystemExit) as e:
        script(file, "config/toy.py", "--help")
    lines = capsys.readouterr().out.splitlines()
    assert not e.value.code and max(map(len, lines)) < 80 and keys
    said = " ".join(" ".join(lines).split())
    for key, default in keys.items():
        assert f" {key} = {default!r}" in said
    if file == "train.py":
        assert "train.py, losses ibot_weight = 1.0 weight of the masked-patch term; DINO's is 1 kde =" in said
    if file == "prepare/features.py":  # its own workers; slides are slides.py's
        assert "workers = 2 processes that read ahead" in said and "slides.py slides = '' glob of whole" in said


def test_bad_files_and_stray_words_stop_with_one_line(tmp_path):
    assert "missing.py" in stopped(defaults(), [str(tmp_path / "missing.py")])
    assert "line 2" in stopped(defaults(), [write(tmp_path, "lr = 1.0\nsteps = = 2")])
    assert "line 2: ZeroDivisionError" in stopped(defaults(), [write(tmp_path, "steps = 2\nlr = 1 / 0")])
    assert "'toy'" in stopped(defaults(), ["toy"])


def test_optimised_python_refuses_the_same():
    code = "from configurator import configure; lr = 0.1; configure(globals(), ['--lr=x'])"
    for options in ([], ["-O"]):
        run = subprocess.run([sys.executable, *options, "-c", code], cwd=ROOT, capture_output=True, text=True)
        assert run.returncode == 1 and run.stderr.strip().count("\n") == 0 and "'lr'" in run.stderr


def test_rank_0_prints_only_what_differs(capsys, monkeypatch):
    configure(defaults(), ["--lr=0.2", "--steps=10"])
    assert capsys.readouterr().out == "config: lr = 0.2 (default 0.1)\n"
    monkeypatch.setenv("RANK", "1")
    configure(defaults(), ["--lr=0.2"])
    assert capsys.readouterr().out == ""
