"""
Configuration as plain Python variables: defaults in the script, overrides in files and flags.

    lr = 2e-4                          # in train.py, above the call
    config = configure(globals())      # then: python train.py config/vitg.py --lr=1e-4

Config files are exec'd from left to right, so they may compute (`lr = 2 * lr`) and may exec a parent config. Flags win
wherever they stand. Keys are the public variables of a plain type that are defined above the call; UPPER_CASE names are
constants, not keys. Derive other values after the call, under names that are not keys.
"""
import ast
import copy
import difflib
import math
import os
import sys
import traceback
import types

TYPES = (int, float, bool, str, tuple, list, type(None))


def train_keys():
    """The keys of train.py with their defaults. Importing train.py would start a run; this executes its key block."""
    with open(os.path.join(os.path.dirname(os.path.abspath(__file__)), "train.py")) as f:
        text, keys = f.read(), {}
    exec(text[text.index("# ---- run ") : text.index("\nconfig = configure(globals())")], keys)
    del keys["__builtins__"]
    return keys


def configure(namespace, argv=None):
    """
    Apply config files and --key=value flags to the plain variables of `namespace`, in place.

    Returns a dict of every key and its final value. Raises SystemExit with one line on anything it does not understand,
    before any variable has changed. `argv` defaults to the command line.
    """
    keys = {k: plain(v) for k, v in namespace.items() if k[:1] != "_" and not k.isupper()}
    keys = {k: v for k, v in keys.items() if isinstance(v, TYPES)}
    final, flags = copy.deepcopy(keys), {}
    argv = sys.argv[1:] if argv is None else argv
    for arg, following in zip(argv, [*argv[1:], "-"]):
        if arg.startswith("-"):
            name, value = parse_flag(arg, following, keys)
            flags[name] = value
        elif arg.endswith(".py"):
            final |= run_file(arg, final, keys)
        else:
            stop(f"unexpected argument '{arg}': config files end in .py and flags look like --key=value")
    final |= flags
    for k, default in keys.items() if (os.environ.get("RANK") or "0") == "0" else ():
        if final[k] != default or type(final[k]) is not type(default):
            print(f"config: {k} = {final[k]!r} (default {default!r})")
    namespace.update(final)
    return final


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
    if name in ("h", "help"):
        stop("the keys, with their meaning, are the variables above configure() in the script; set one by --key=value")
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


def plain(value):
    """`value` without numpy's types: a teacher file with them would not load."""
    if type(value) in (tuple, list):
        return type(value)(map(plain, value))
    return value.tolist() if hasattr(value, "tolist") and not isinstance(value, type) else value


def fit(value, default):
    """
    `value` in the type of `default`, an element of a tuple in that of the default's first; ValueError if it has
    another. Only int -> float and list -> tuple are converted, and numpy's types. In text, which may be several paths
    with commas between them, ~ is the home folder.
    """
    kind, value = type(default), plain(value)
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
    close = difflib.get_close_matches(name, keys, 1, 0.5)
    return f"; did you mean '{close[0]}'?" if close else ""


def stop(message):
    raise SystemExit(f"configurator: {message}")
