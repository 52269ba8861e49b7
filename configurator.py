"""
Configuration as plain Python variables: defaults in the script, overrides in files and flags.

    lr = 2e-4                          # in train.py, above the call
    config = configure(globals())      # then: python train.py config/vitg.py --lr=1e-4

Config files are exec'd from left to right, so they may compute (`lr = 2 * lr`) and may exec a parent config. Flags win
wherever they stand. Keys are the public variables of a plain type that are defined above the call; UPPER_CASE names are
constants, not keys. Derive other values after the call, under names that are not keys. --help reads keys' comments.
"""
import ast
import copy
import difflib
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
    before any variable has changed. `argv` defaults to the command line. --help finds other scripts' keys in `shared`.
    """
    keys = {k: plain(v) for k, v in namespace.items() if k[:1] != "_" and not k.isupper()}
    keys = {k: v for k, v in keys.items() if isinstance(v, TYPES)}
    argv = sys.argv[1:] if argv is None else argv
    if {"-h", "--help"} & set(argv):
        print(help_text(namespace, keys, shared))
        sys.exit()
    final, flags, said, delta = copy.deepcopy(keys), {}, [], ""
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
    if changes := ", ".join(f"{k} = {v!r} (default {keys[k]!r})" for k, v in flags.items() if v != final[k]):
        said.append(f"config: {changes}")
    if said and (os.environ.get("RANK") or "0") == "0":
        print("\n".join(said))
    final |= flags
    namespace.update(final)
    return final


def run(script, main, *given):
    """main(*given), the work of a script. What its user can mend ends it with one line."""
    try:
        main(*given)
    except ModuleNotFoundError as e:
        raise SystemExit(f"{script}: {e.name} is missing: pip install {e.name}") from None
    except (ValueError, OSError, RuntimeError) as e:
        raise SystemExit(f"{script}: {' '.join(str(e).split())}") from None
    except KeyboardInterrupt:
        raise SystemExit(f"{script}: interrupted") from None


def help_text(namespace, keys, shared):
    """Each key with its default and what its file says beside it, under that file's ruled headings."""
    about = textwrap.fill(namespace["__doc__"].strip().partition("\n\n")[0], 79)
    lines = [f"usage: python {os.path.relpath(sys.argv[0])} [FILE.py ...] [--key=value ...]"]
    found = list(assignments(namespace["__file__"]))
    if shared:
        found += assignments(os.path.join(HERE, shared))
    left, above = dict(keys), ""
    for heading, name, comment in found:
        if name in left:
            if heading != above:
                lines += ["", heading]
            above, start = heading, f"  {name} = {left.pop(name)!r}"
            lines.append(f"{start:28}  {comment}")
    wrap = textwrap.TextWrapper(79, subsequent_indent=30 * " ", break_on_hyphens=False)
    return "\n".join([about, "", *map(wrap.fill, lines)])


def assignments(path):
    """Yields (heading, first word, comment beside) of the statements of a script and of its `if __name__` block."""
    word, comment, column, heading = "", "", 0, os.path.basename(path)
    with tokenize.open(path) as f:
        for kind, text, (_, start), _, _ in tokenize.generate_tokens(f.readline):
            if kind == tokenize.NAME and start == column:
                word = text
            elif text == "__name__":
                column = 4
            elif kind == tokenize.COMMENT and text.startswith("# ----"):
                heading = f"{os.path.basename(path)}, {text.strip('# -')}"
            elif kind == tokenize.COMMENT:
                comment = text.strip("# ")
            elif kind in (tokenize.NEWLINE, tokenize.NL):
                yield heading, word, comment
                word = comment = ""


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
        return fit(plain(value), default)
    except (ValueError, OverflowError) as e:
        hint = f"; {e}" if str(e) else ""
    if isinstance(default, tuple) and not isinstance(value, (tuple, list)):
        hint = f"; write --{name}={value!r}," if source.startswith("flag") else f"; write ({value!r},)"
    stop(f"{source}: key '{name}' expects {type(default).__name__} (default {default!r}), got {value!r}{hint}")


def plain(value):
    """`value` without numpy's types: a teacher file with them would not load."""
    if type(value) in (tuple, list):
        return type(value)(map(plain, value))
    return value.tolist() if hasattr(value, "tolist") and not isinstance(value, type) else value


def fit(value, default):
    """
    `value` in the type of `default`, an element of a tuple in that of the default's first; ValueError if it has
    another. Only int -> float, list -> tuple and Path -> str are converted. In text, which may be several paths
    with commas between them, ~ is the home folder.
    """
    kind = type(default)
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
