"""
Configuration as plain Python variables: defaults in the script, overrides in files and flags.

    lr = 2e-4                          # in train.py, above the call
    config = configure(globals())      # then: python train.py config/vitg.py --lr=1e-4

Config files are exec'd from left to right, so they may compute (`lr = 2 * lr`) and may exec a parent config. Flags win
wherever they stand. Keys are the public variables of a plain type that are defined above the call; UPPER_CASE names are
constants, not keys. Derive other values after the call, under names that are not keys. --help shows the comments beside
keys, which are the only place that explains them.
"""
import ast
import copy
import difflib
import io
import math
import os
import sys
import textwrap
import tokenize
import traceback
import types

TYPES = (int, float, bool, str, tuple, list, type(None))
ALIASES = {"lr": "base_lr", "learning_rate": "base_lr", "bs": "batch_size", "batch": "batch_size", "model": "arch",
           "epochs": "max_steps", "wd": "weight_decay", "grad_clip": "clip_grad", "pretrained": "weights"}
HERE = os.path.dirname(os.path.abspath(__file__))


def train_keys():
    """The keys of train.py with their defaults. Importing train.py would start a run; this executes its key block."""
    with open(f"{HERE}/train.py") as f:
        text, keys = f.read(), {}
    exec(text[text.index("# ---- run ") : text.index("\nconfig = configure(globals())")], keys)
    del keys["__builtins__"]
    return keys


def configure(namespace, argv=None, shared=""):
    """
    Apply config files and --key=value flags to the plain variables of `namespace`, in place.

    Returns a dict of every key and its final value. Raises SystemExit with one line on anything it does not understand,
    before any variable has changed. `argv` defaults to the command line. `shared` is the file of keys that are not the
    script's own, where --help finds what they mean.
    """
    keys = {k: v for k, v in namespace.items() if k[:1] != "_" and not k.isupper() and isinstance(v, TYPES)}
    final, flags, said, delta = copy.deepcopy(keys), {}, [], ""
    argv = sys.argv[1:] if argv is None else argv
    if {"-h", "--help"} & set(argv):
        print(help_text(namespace, keys, shared))
        sys.exit()
    for arg, following in zip(argv, [*argv[1:], "-"]):
        if arg.startswith("-"):
            name, value = parse_flag(arg, following, keys)
            flags[name] = value
        elif arg.endswith(".py"):
            if os.path.basename(os.path.dirname(os.path.abspath(arg))) == "ablate":
                delta = arg
            elif delta:
                stop(f"{delta} changes a recipe, and {arg} after it would undo that: write {arg} {delta}")
            found = run_file(arg, final, keys)
            changes = ", ".join(f"{k} = {v!r}" for k, v in found.items() if v != final[k])
            said.append(textwrap.shorten(f"config: {arg}: {changes}", 158, placeholder=" ..."))
            final |= found
        else:
            stop(f"unexpected argument '{arg}': config files end in .py and flags look like --key=value")
    if changed := ", ".join(f"{k} = {v!r} (default {keys[k]!r})" for k, v in flags.items() if v != final[k]):
        said.append(f"config: {changed}")
    if (os.environ.get("RANK") or "0") == "0" and said:
        print("\n".join(said))
    final |= flags
    namespace.update(final)
    return final


def help_text(namespace, keys, shared):
    """Each key with its default and what its file says beside it, under that file's ruled headings."""
    about, left, heading = (namespace["__doc__"] or "").strip().partition("\n\n")[0], dict(keys), None
    lines = [textwrap.fill(about, 79), "", f"usage: python {sys.argv[0]} [FILE.py ...] [--key=value ...]"]
    for path in (namespace["__file__"], os.path.join(HERE, shared))[: 1 + bool(shared)]:
        for title, name, comment in assignments(path):
            if name in left:
                if (path, title) != heading:
                    lines += ["", textwrap.fill(os.path.basename(path) + ", " * bool(title) + title, 79)]
                heading, start = (path, title), f"  {name} = {left.pop(name)!r}"
                text = f"{start:28}  {comment}"
                lines.append(textwrap.fill(text, 79, subsequent_indent=30 * " ", break_on_hyphens=False))
    return "\n".join(lines)


def assignments(path):
    """Yields (ruled heading above, name, comment beside) of what a file assigns outside of functions and classes."""
    with tokenize.open(path) as f:
        text = f.read()
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    comments = {token.start[0]: token.string for token in tokens if token.type == tokenize.COMMENT}
    ruled = [line for line, comment in comments.items() if comment.startswith("# ----")]
    for block in ast.parse(text).body:
        for node in block.body if isinstance(block, ast.If) else [block]:  # if __name__ == "__main__"
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                title = [comments[line].strip("# -") for line in ruled if line < node.lineno]
                beside = [comments.get(line, "").strip("# ") for line in range(node.lineno, node.end_lineno + 1)]
                yield (title or [""])[-1], node.targets[0].id, " ".join(beside)


def run_file(path, values, keys):
    """Exec a file in a scratch copy of `values`; return its public variables, except imports and functions."""
    scratch = {**copy.deepcopy(values), "__file__": path, "__name__": "config"}
    try:
        with open(path) as f:
            exec(compile(f.read(), path, "exec"), scratch)
    except Exception as e:
        lines = [frame.lineno for frame in traceback.extract_tb(e.__traceback__) if frame.filename == path]
        if isinstance(e, SyntaxError):
            lines = [e.lineno]
        where = f"{path}, line {lines[-1]}" if lines else path
        stop(f"{where}: {type(e).__name__}: {' '.join(str(e).split())}")
    ignored = (types.ModuleType, types.FunctionType, types.BuiltinFunctionType, type)
    found = {}
    for k, v in scratch.items():
        if k[:1] != "_" and (k in keys or not isinstance(v, ignored)):
            found[k] = check(k, v, keys, path)
    return found


def parse_flag(arg, following, keys):
    """(key, value) of a flag; `following`, the next argument, only serves a hint."""
    name, equals, text = arg.lstrip("-").partition("=")
    if not equals or not arg.startswith("--"):
        value = text or following
        if value.startswith("-") or value.endswith(".py"):
            value = "true" if isinstance(keys.get(name), bool) else "VALUE"
        hint = "" if name in keys else nearest(name, keys)
        stop(f"flag '{arg}' has no value: write --{name}={value}{hint}")
    value = text if isinstance(keys.get(name), str) else literal(text)  # so that --name=2024 and --name=a=b stay text
    return name, check(name, value, keys, f"flag {arg}")


def literal(text):
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


def check(name, value, keys, source):
    """Return `value` in the type of the key's default, or stop."""
    if name not in keys:
        stop(f"{source}: unknown key '{name}'{nearest(name, keys)}")
    default = keys[name]
    try:
        return fit(value, default)
    except (ValueError, OverflowError) as e:
        hint = f"; {e}" if str(e) else ""
    if isinstance(default, tuple) and not isinstance(value, (tuple, list)):
        hint = f"; write --{name}={value!r}," if source.startswith("flag") else f"; write ({value!r},)"
    stop(f"{source}: key '{name}' expects {type(default).__name__} (default {default!r}), got {value!r}{hint}")


def fit(value, default):
    """
    `value` in the type of `default`, an element of a tuple in that of the default's first; ValueError if it has
    another. Only int -> float and list -> tuple are converted, and numpy's types, as a teacher file with them would not
    load. In text, which may be several paths with commas between them, ~ is the home folder.
    """
    kind, value = type(default), value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, os.PathLike):
        value = str(value)
    if kind is float and type(value) is int:
        value = float(value)
    if kind is tuple and type(value) is list:
        value = tuple(value)
    if type(value) not in (TYPES if default is None else (kind,)):
        raise ValueError
    if isinstance(value, (tuple, list)):
        return type(value)(fit(element, default[0] if default else None) for element in value)
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("a number must be finite")
    if isinstance(value, str):
        value.encode()  # ValueError if it is not UTF-8: it could not be printed
        value = ",".join(map(os.path.expanduser, value.split(",")))
        if value.startswith("~"):
            raise ValueError("there is no such user; if the name begins with ~, write ./~")
    return value


def nearest(name, keys):
    close = [key for key in (ALIASES.get(name),) if key in keys] or difflib.get_close_matches(name, keys, 1, 0.6)
    return f"; did you mean '{close[0]}'?" if close else "; --help lists the keys"


def stop(message):
    raise SystemExit(f"configurator: {message}")
