"""Data from the Hub, a local folder or a local file. Whatever cannot work is a `UsageError` that names it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, load_dataset, load_from_disk

from .errors import UsageError

READERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".csv": ("csv", {"keep_default_na": False}),
    ".tsv": ("csv", {"keep_default_na": False, "delimiter": "\t"}),
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".parquet": ("parquet", {}),
    ".txt": ("text", {}),
}


def read_named(name: str, config: str | None = None, **options: Any) -> DatasetDict:
    """The data set that is on the Hub, or in a local folder.

    Raises:
        UsageError: it is neither.
    """
    try:
        if (Path(name) / "dataset_dict.json").is_file():
            return load_from_disk(name)
        return load_dataset(name, config, **options)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(
            f"the data set {name} is neither a local folder nor to be had from the Hub ({reason})"
        ) from error


def read_file(path: Path) -> Dataset:
    """The rows of a local file.

    Raises:
        UsageError: it is missing, empty, unreadable, or of no known kind.
    """
    if not path.is_file():
        raise UsageError(f"there is no file {path}")
    if path.suffix not in READERS:
        raise UsageError(f"{path} is of no known kind: give a file that ends in {', '.join(READERS)}")
    empty = UsageError(f"{path} is empty: it has no examples")
    if not path.stat().st_size:
        raise empty
    reader, options = READERS[path.suffix]
    try:
        return load_dataset(reader, data_files=str(path), split="train", **options)
    except Exception as error:  # each reader has exceptions of its own, and all mean the same
        reason = " ".join(str(error.__cause__ or error).split())
        if "corresponds to no data" in reason:  # a table with a head and no rows
            raise empty from error
        way = ": save it as UTF-8" if "'utf-8' codec" in reason else ""
        raise UsageError(f"{path} could not be read as {reader} ({reason}){way}") from error


def read_folder(place: Path, least: int) -> Dataset:
    """The images below `place`, in a folder for each class.

    Raises:
        UsageError: there is no such folder, a class has no images, or there are fewer than `least` classes.
    """
    import PIL.Image  # an extra

    if not place.is_dir():
        raise UsageError(f"there is no folder {place}")
    classes = sorted(folder.name for folder in place.iterdir() if folder.is_dir())
    endings = PIL.Image.registered_extensions()
    for name in classes or [""]:
        if not any(path.suffix.lower() in endings for path in (place / name).iterdir()):
            raise UsageError(f"{place / name} holds no images: it needs some, as JPEG or PNG files")
    if len(classes) < least:
        found = f"at least {'two' if least == 2 else 'one'}: it has {len(classes)}"
        raise UsageError(f"{place} needs a folder of images for each class, and {found}")
    return read_named("imagefolder", data_dir=str(place), drop_labels=False)["train"]


def described(raw: DatasetDict) -> str:
    """The splits of `raw` and their sizes."""
    return ", ".join(f"{len(rows)} {split} examples" for split, rows in raw.items()) or "no splits"
