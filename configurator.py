"""
Configuration as plain Python variables: defaults in the script, overrides in files and flags.

    lr = 2e-4                          # in train.py, above the call
    config = configure(globals())      # then: python train.py config/vitg.py --lr=1e-4

Config files are exec'd left to right, so they may compute (`lr = 2 * lr`) and may exec a parent config; flags win
wherever they stand. Keys are the public variables of a plain type that stand above the call; UPPER_CASE names are
constants, not keys. Derive values after the call, under names that are not keys.
"""
import ast
import copy
import difflib
import os
import sys
import traceback
import types

TYPES = (int, float, bool, str, tuple, list, type(None))


def configure(namespace, argv=None):
    """
    Apply config files and --key=value flags to the plain variables of `namespace`, in place.

    Returns a dict of every key and its final value. Raises SystemExit with one line on anything it does not understand,
    before any variable has changed. `argv` defaults to the command line.
    """
    keys = {k: v for k, v in namespace.items() if k[:1] != "_" and not k.isupper() and isinstance(v, TYPES)}
    final, flags, argv = copy.deepcopy(keys), [], sys.argv[1:] if argv is None else argv
    for i, arg in enumerate(argv):
        if arg.startswith("-"):
            flags.append(parse_flag(arg, argv[i + 1 : i + 2], keys))
        elif arg.endswith(".py"):
            final.update(run_file(arg, final, keys))
        else:
            stop(f"unexpected argument '{arg}': config files end in .py and flags look like --key=value")
    final.update(flags)
    if os.environ.get("RANK", "0") == "0":
        for k, default in keys.items():
            if final[k] != default or type(final[k]) is not type(default):
                print(f"config: {k} = {final[k]!r} (default {default!r})")
    namespace.update(final)
    return final


def run_file(path, values, keys):
    """Exec a file in a scratch copy of `values`; return its public variables, imports and functions aside."""
    scratch = {**copy.deepcopy(values), "__file__": path, "__name__": "config"}
    try:
        with open(path) as f:
            exec(compile(f.read(), path, "exec"), scratch)
    except Exception as e:
        lines = [frame.lineno for frame in traceback.extract_tb(e.__traceback__) if frame.filename == path]
        line = e.lineno if isinstance(e, SyntaxError) else lines[-1] if lines else None
        stop(f"{path}{f', line {line}' if line else ''}: {type(e).__name__}: {' '.join(str(e).split())}")
    ignored = (types.ModuleType, types.FunctionType, types.BuiltinFunctionType, type)
    found = {k: v for k, v in scratch.items() if k[:1] != "_" and (k in keys or not isinstance(v, ignored))}
    return {k: check(k, v, keys, path) for k, v in found.items()}


def parse_flag(arg, following, keys):
    name, equals, text = arg.lstrip("-").partition("=")
    if name in ("h", "help"):
        stop("the keys, with their meaning, are the variables above configure() in the script; set one by --key=value")
    if not equals or not arg.startswith("--"):
        taken = following and not following[0].startswith("-") and not following[0].endswith(".py")
        value = following[0] if taken else "true" if isinstance(keys.get(name), bool) else "VALUE"
        hint = nearest(name, keys) if name not in keys else ""
        stop(f"flag '{arg}' has no value: write --{name}={text or value}{hint}")
    if isinstance(keys.get(name), str):
        return name, text  # verbatim, so that --name=2024 and --name=a=b stay text
    return name, check(name, literal(text), keys, f"flag {arg}")


def literal(text):
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


def check(name, value, keys, source):
    """Return `value` in the type of the key's default; int -> float and list -> tuple are the only conversions."""
    if name not in keys:
        stop(f"{source}: unknown key '{name}'{nearest(name, keys)}")
    default = keys[name]
    if type(default) is float and type(value) is int:
        return float(value)
    if type(default) is tuple and type(value) is list:
        return tuple(value)
    fits = isinstance(value, TYPES) if default is None else isinstance(value, type(default))
    if not fits or (isinstance(value, bool) and not isinstance(default, (bool, type(None)))):
        one = f"--{name}={value!r}," if source.startswith("flag") else f"({value!r},)"
        hint = f"; write {one}" if isinstance(default, tuple) else ""
        stop(f"{source}: key '{name}' expects {type(default).__name__} (default {default!r}), got {value!r}{hint}")
    return value


def nearest(name, keys):
    close = difflib.get_close_matches(name, keys, 1, 0.5)
    return f"; did you mean '{close[0]}'?" if close else ""


def stop(message):
    raise SystemExit(f"configurator: {message}")
