"""diffusers' own pipelines around a VAE alone, and the ends of their `__call__`, run from their source.

A text encoder and a transformer are needed for the denoising only. What comes after it is cut out of `__call__` by its
syntax tree and run as it stands on a real pipeline object without those parts, so no formula is written down here.
"""

from __future__ import annotations

import ast
import inspect
import sys
import textwrap
from typing import Any

import torch


def bare(pipeline: Any, **parts: Any) -> Any:
    """A pipeline with these parts (the VAE under its own name) and None for every other that has no default."""
    takes = inspect.signature(pipeline.__init__).parameters.values()
    missing = [p.name for p in takes if p.name != "self" and p.default is p.empty and p.name not in parts]
    built = pipeline(**dict.fromkeys(missing), **parts)
    built.set_progress_bar_config(disable=True)
    return built


def end(pipe: Any, since: str | None = None, **names: Any) -> Any:
    """The first thing that `pipe.__call__` returns, run from a statement on with these local names.

    Args:
        pipe: the pipeline object, such as `bare` builds it.
        since: text of the first statement, in `ast.unparse`'s spelling (single quotes); None means the first statement
            of the outermost block that decides about `output_type` and decodes.
        names: the local names. Arguments of `__call__` that are not among them have their defaults; `output_type` is
            "pt" and `return_dict` False unless given.
    """
    call = inspect.unwrap(type(pipe).__call__)
    defaults = {p.name: p.default for p in inspect.signature(call).parameters.values() if p.default is not p.empty}
    names = defaults | {"output_type": "pt", "return_dict": False} | names
    return run(call, since, None, self=pipe, **names)[0]


def run(function: Any, since: str | None, until: str | None, **names: Any) -> Any:
    """What a function of diffusers returns, or its locals, run from one of its outermost statements up to another.

    Args:
        function: of diffusers, with or without decorators.
        since: text of the first statement to run, "" for the first of all; None as in `end`.
        until: text of the first statement, after it, that is not run; None means the end.
        names: the local names when it begins.

    Returns:
        What it returns; the dictionary of its local names where it returns nothing or stops at `until`.
    """
    function = inspect.unwrap(function)
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    assert isinstance(tree, ast.FunctionDef)
    body = tree.body
    if since is None and not any(_decides(statement) for statement in body):
        # Some pipelines end within the block of their progress bar.
        body = [inner for outer in body for inner in (outer.body if isinstance(outer, ast.With) else [outer])]
    texts = [ast.unparse(statement) for statement in body]
    first = next(i for i, text in enumerate(texts) if (_decides(body[i]) if since is None else since in text))
    after = range(first + 1, len(texts))
    last = len(texts) if until is None else next(i for i in after if until in texts[i])
    cut = ast.parse("def cut(): return locals()").body[0]
    assert isinstance(cut, ast.FunctionDef)
    cut.args.kwonlyargs = [ast.arg(name) for name in names]
    cut.args.kw_defaults = [None] * len(names)
    cut.body = body[first:last] + cut.body
    space = dict(vars(sys.modules[function.__module__]))
    exec(compile(ast.fix_missing_locations(ast.Module([cut], [])), function.__qualname__, "exec"), space)
    with torch.no_grad():
        return space["cut"](**names)


def _decides(statement: ast.stmt) -> bool:
    return (
        isinstance(statement, ast.If)
        and "output_type" in ast.unparse(statement.test)
        and "decode" in ast.unparse(statement)
    )
