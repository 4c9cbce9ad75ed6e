"""Break the package on purpose, one place at a time, and see that a test notices.

    make mutate                              all of them (a few minutes), by hand and before a release
    make mutate ARGS="rules/ gradients"      those whose file or reason has one of these words in it

Each entry of `table.MUTATIONS` names a file, a text that stands in it exactly once, what to write instead, and the
tests that have to fail then; only those count that `make test` runs. The package is copied to a temporary folder and
changed there, never in place. Every mutation runs in a fork of one process that has imported torch already, so it
costs the tests and not the imports.

Exits with 1 where fewer than 95 % of the mutations that are no equivalents are killed, and with 2 where the table does
not fit the code: a text that is not found, or tests that do not pass unchanged.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from table import MUTATIONS, Mutation

ROOT = Path(__file__).resolve().parents[2]
NEEDED = ("hf_ssam", "tests", "examples", "configs", "pyproject.toml", "README.md")
LIBRARIES = ("pytest", "torch", "datasets", "evaluate", "peft", "scipy.sparse.linalg", "transformers.trainer")
MODELS = tuple(f"transformers.models.{name}.modeling_{name}" for name in ("bert", "gpt2", "llama", "resnet", "t5"))
QUICK = ("-m", "not slow and not gpu", "-o", "timeout=0")
"""What `make test` runs; pytest-timeout's alarm would replace the one of `SECONDS`."""
SECONDS = 300
THRESHOLD = 0.95
PASSED, FAILED, TIMED_OUT = 0, 1, -signal.SIGALRM


def mutated(source: str, mutation: Mutation) -> str:
    """`source` with the mutation in it.

    Raises:
        ValueError: if its text does not stand there exactly once, or would not change.
    """
    if source.count(mutation.old) != 1 or mutation.old == mutation.new:
        raise ValueError(
            f"{mutation.file}: {source.count(mutation.old)} places read {mutation.old!r}; let the entry of "
            "tests/mutations/table.py name one."
        )
    return source.replace(mutation.old, mutation.new)


def tests_end(folder: Path, tests: tuple[str, ...]) -> int:
    """How pytest ends on `tests` in `folder`, in a fork: its exit code, or the signal that ended it, negative."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        signal.alarm(SECONDS)
        with open(os.devnull, "w") as null:
            os.dup2(null.fileno(), 1)
            os.dup2(null.fileno(), 2)
            os._exit(_run(folder, tests))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _run(folder: Path, tests: tuple[str, ...]) -> int:
    import pytest

    os.chdir(folder)
    sys.path.insert(0, str(folder))
    if not Path(importlib.import_module("hf_ssam").__file__).is_relative_to(folder):
        return pytest.ExitCode.USAGE_ERROR  # the package in place would be tested, which nobody has changed
    return pytest.main(["-x", "-q", *QUICK, "-p", "no:cacheprovider", "-p", "no:xdist", *tests])


def judged(folder: Path, mutation: Mutation) -> str:
    """`killed`, `survived` or `broken`: whether its tests notice the mutation, or cannot even be collected."""
    path = folder / "hf_ssam" / mutation.file
    source = path.read_text()
    path.write_text(mutated(source, mutation))
    try:
        end = tests_end(folder, mutation.tests)
    finally:
        path.write_text(source)
    return {PASSED: "survived", FAILED: "killed", TIMED_OUT: "killed"}.get(end, "broken")


@contextlib.contextmanager
def copy_of_the_package():
    """A temporary folder with what the tests need."""
    with tempfile.TemporaryDirectory(prefix="mutations-") as name:
        for part in NEEDED:
            source, target = ROOT / part, Path(name).resolve() / part
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(source, target, ignore=ignored) if source.is_dir() else shutil.copy(source, target)
        yield Path(name).resolve()


def chosen(words: list[str]) -> list[Mutation]:
    """The mutations that are asked for."""
    return [m for m in MUTATIONS if not words or any(word in f"{m.file} {m.why}" for word in words)]


def timed(call: Callable[[], str]) -> tuple[str, float]:
    """What `call` returns, and how many seconds it took."""
    begun = time.perf_counter()
    return call(), time.perf_counter() - begun


def main(words: list[str]) -> int:
    mutations = chosen(words)
    for mutation in mutations:
        mutated((ROOT / "hf_ssam" / mutation.file).read_text(), mutation)
    sys.dont_write_bytecode = True  # a changed file of the same length and second would be taken for the cached one
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    for name in (*LIBRARIES, *MODELS):
        importlib.import_module(name)
    live = [m for m in mutations if not m.equivalent]
    with copy_of_the_package() as folder:
        tests = tuple(sorted({test for m in live for test in m.tests}))
        end, seconds = timed(lambda: tests_end(folder, tests))
        if end != PASSED:
            print(f"the tests do not pass as they are (pytest ends with {end}): {' '.join(tests)}")
            return 2
        print(f"{len(tests)} tests or files pass unchanged ({seconds:.0f} s)", flush=True)
        counts = Counter(equivalent=len(mutations) - len(live))
        for mutation in live:
            verdict, seconds = timed(lambda m=mutation: judged(folder, m))
            counts[verdict] += 1
            print(f"{verdict:9} {seconds:5.0f} s  {mutation.file}: {mutation.why}", flush=True)
    share = counts["killed"] / max(1, len(live))
    print(", ".join(f"{n} {verdict}" for verdict, n in counts.items()) + f": {share:.1%} of {len(live)} killed")
    return 2 if counts["broken"] else int(share < THRESHOLD)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except ValueError as error:
        print(error)
        sys.exit(2)
