"""What we lean on in transformers, accelerate and torch is there, as it was read, and is all named in one table."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from functools import cache, cached_property
from importlib.util import find_spec
from pathlib import Path
from pydoc import locate
from types import CodeType
from typing import Any

import pytest
from transformers import Trainer

import hf_ssam
from hf_ssam import SSAMSeq2SeqTrainer, SSAMTrainer
from hf_ssam.trainer.host import HOOKS, READ_IN, TRAINER, Hook, Host

PACKAGE = Path(hf_ssam.__file__).parent
VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def codes(code: CodeType) -> Iterator[CodeType]:
    """A code object and those nested in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from codes(constant)


def functions(owner: Any) -> Iterator[Any]:
    """Every function that a class has, its parents' too, without decorators; a module's own."""
    for part in inspect.getmro(owner) if inspect.isclass(owner) else (owner,):
        for value in vars(part).values():
            value = value.__func__ if isinstance(value, classmethod | staticmethod) else value
            value = value.fget if isinstance(value, property) else value
            value = inspect.unwrap(value.func if isinstance(value, cached_property) else value)
            if inspect.isfunction(value):
                yield value


def words(owner: Any) -> set[str]:
    """Every name and string that the functions of `owner` mention: the attributes that its instances get are there."""
    found: set[str] = set()
    for code in (c for function in functions(owner) for c in codes(function.__code__)):
        found.update(code.co_names)
        for constant in code.co_consts:
            found.update(c for c in (constant if isinstance(constant, tuple) else (constant,)) if isinstance(c, str))
    return found


def is_there(hook: Hook) -> bool:
    owner = locate(hook.owner)
    assert owner is not None, f"{hook.owner} is gone"
    if hook.use == "reads":
        return hasattr(owner, hook.name) or hook.name in words(owner)
    if not callable(getattr(owner, hook.name, None)):
        return False
    if not hook.parameters and hook.use == "calls":
        return takes_nothing_more(owner, hook.name)
    signature = inspect.signature(getattr(owner, hook.name)).parameters
    names = [n for n in signature if n != "self"]
    if hook.use == "overrides":
        return tuple(names) == hook.parameters
    required = [
        n for n in names if signature[n].default is inspect.Parameter.empty and signature[n].kind not in VARIADIC
    ]
    return names[: len(hook.parameters)] == list(hook.parameters) and set(required) <= {*hook.parameters}


def takes_nothing_more(owner: Any, name: str) -> bool:
    """Whether a method can be called bare; of a function in C, that it exists."""
    if not inspect.isclass(owner):
        return True
    inspect.signature(getattr(owner, name)).bind(None)
    return True


@pytest.mark.parametrize("hook", HOOKS, ids=lambda hook: f"{hook.owner}.{hook.name}")
def test_hook_is_there_as_it_was_read(hook):
    if hook.owner.startswith("deepspeed.") and find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed: pip install -c constraints.txt deepspeed")
    assert is_there(hook), f"{hook.use} {hook.owner}.{hook.name}{hook.parameters}: {hook.why}"


@pytest.mark.parametrize(
    "hook",
    [
        Hook(TRAINER, "_prepare_for_lunch", "overrides", (), ""),
        Hook(TRAINER, "_prepare_for_training", "overrides", ("max_steps",), ""),
        Hook(TRAINER, "_get_num_items_in_batch", "calls", ("batch_samples",), ""),
        Hook(TRAINER, "_get_num_items_in_batch", "calls", ("samples", "device"), ""),
        Hook(TRAINER, "current_flops", "reads", (), ""),
        Hook("torch", "_foreach_nothing", "calls", (), ""),
    ],
    ids=lambda hook: hook.name,
)
def test_hook_that_moved_is_noticed(hook):
    assert not is_there(hook)


@pytest.mark.parametrize(
    "hook", [h for h in HOOKS if h.use == "overrides" and h.name.startswith("_")], ids=lambda h: h.name
)
def test_hook_that_we_override_is_still_called(hook):
    """A private method is called by the Trainer or by nobody."""
    callers = [
        f.__name__ for f in functions(locate(hook.owner)) if hook.name in words_of(f) and f.__name__ != hook.name
    ]
    assert callers, f"nothing in {hook.owner} calls {hook.name}"


def words_of(function: Any) -> set[str]:
    return {name for code in codes(function.__code__) for name in code.co_names}


def test_hooks_name_every_method_of_the_trainer_that_we_override():
    ours = {
        name
        for cls in SSAMSeq2SeqTrainer.__mro__
        if cls.__module__.startswith("hf_ssam")
        for name in vars(cls)
        if hasattr(Trainer, name) and not name.startswith("__")
    }
    assert ours == {h.name for h in HOOKS if h.owner == TRAINER and h.use == "overrides"}


@cache
def trees() -> dict[Path, ast.Module]:
    return {path: ast.parse(path.read_text()) for path in PACKAGE.rglob("*.py")}


@cache
def own_names() -> set[str]:
    """Every name that the package gives: classes, functions, variables, fields, attributes of `self`."""
    names: set[str] = set()
    for tree in trees().values():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names.add(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_self(node.value):
                names.add(node.attr)
    return names


def is_self(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and node.id == "self"


def test_hooks_name_every_private_name_of_others_that_we_use():
    named, own = {h.name for h in HOOKS}, own_names()
    for path, tree in trees().items():
        for node in ast.walk(tree):
            found = {node.attr} if isinstance(node, ast.Attribute) else set()
            found |= {alias.name for alias in node.names} if isinstance(node, ast.ImportFrom) else set()
            private = {n for n in found if re.match(r"_[a-z]|_[A-Z]", n)} - own - named
            assert not private, f"{path.name}:{node.lineno} uses {', '.join(private)}, which HOOKS does not name"


def test_host_has_what_the_mixins_ask_of_it():
    """Attributes of `self` in a mixin are ours, a hook, a public method of every Trainer, or in `Host`."""
    ours = {n for cls in SSAMTrainer.__mro__ if cls.__module__.startswith("hf_ssam") for n in vars(cls)} | own_names()
    known = ours | {h.name for h in HOOKS} | {*asked_of_a_host()} | {n for n in vars(Trainer) if n[0] != "_"}
    mixins = [
        node
        for path, tree in trees().items()
        if path.parent.name in ("trainer", "hub")
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and node.name.endswith("Mixin")
    ]
    assert len(mixins) > 5
    for node in (n for mixin in mixins for n in ast.walk(mixin)):
        if isinstance(node, ast.Attribute) and is_self(node.value):
            assert node.attr in known, f"self.{node.attr} is not in Host"


def asked_of_a_host() -> list[str]:
    return [n for n in Host.__annotations__ if n not in vars(Host) and not n.startswith("_")]


@pytest.mark.parametrize("name", asked_of_a_host())
def test_host_is_what_a_trainer_is(name):
    assert is_there(Hook(TRAINER, name, "reads", (), "Host"))


def test_hooks_were_read_in_the_versions_that_are_tested():
    """Whoever moves a pin in constraints.txt reads the hooks again, and says so in READ_IN."""
    pins = dict(re.findall(r"^(\w+)==(\S+)$", (PACKAGE.parent / "constraints.txt").read_text(), re.MULTILINE))
    assert {name: pins[name] for name in READ_IN} == READ_IN
