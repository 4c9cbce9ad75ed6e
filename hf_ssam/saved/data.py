"""What a run was trained on: written beside its model, and read again by whoever looks at the model afterwards.

The file is called `_data.json`: it may name local files, and what begins with an underscore is never pushed to the
Hub.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from datasets import Dataset, DatasetDict, load_from_disk

from .errors import UsageError
from .files import READERS, described, read_file, read_folder, read_named

FILE = "_data.json"
SETS: dict[str, Callable[[], DatasetDict]] = {}
"""Data sets that a program brings with it, by name; the examples enter their offline ones."""


@dataclass(frozen=True)
class RunData:
    """Data by name, enough to read them again.

    Attributes:
        dataset_name: on the Hub, or a folder.
        dataset_config_name: its configuration.
        file: a file of examples, or a folder of them (images by class, or what `datasets` writes).
        offline: a set of `SETS`.
        split: of a data set that has several.
        columns: what the model reads: one column, or the two of a pair.
        label_column: what it is to say.
        max_samples: only the first so many were used.
        labels: the model's classes by number.
        seed: the run's.
    """

    dataset_name: str | None = None
    dataset_config_name: str | None = None
    file: str | None = None
    offline: str | None = None
    split: str = "train"
    columns: list[str] = field(default_factory=list)
    label_column: str | None = None
    max_samples: int | None = None
    labels: list[str] | None = None
    seed: int | None = None

    @property
    def name(self) -> str:
        """How tables and figures call it; empty where it is nothing."""
        if self.file:
            return _short(self.file)
        if self.offline:
            return f"{self.offline} (offline), {self.split}"
        config = f" {self.dataset_config_name}" if self.dataset_config_name else ""
        return f"{_short(self.dataset_name)}{config}, {self.split}" if self.dataset_name else ""

    def read(self) -> Dataset:
        """The examples.

        Raises:
            UsageError: they are not there, or no longer.
        """
        data = self._read()
        if isinstance(data, DatasetDict):
            if self.split not in data:
                raise UsageError(f"--split {self.split}: the data has {described(data)}")
            data = data[self.split]
        return data.select(range(min(self.max_samples or len(data), len(data))))

    def _read(self) -> Dataset | DatasetDict:
        if self.offline:
            return _brought(self.offline)
        if self.dataset_name and not self.file:
            return _named(self.dataset_name, self.dataset_config_name)
        place = Path(self.file or "")
        if not place.is_dir():
            return read_file(place)
        holds_files = any(path.suffix in {*READERS, ".arrow"} for path in place.iterdir())
        return _named(str(place)) if holds_files else read_folder(place, least=1)

    def write(self, folder: Path) -> None:
        """Leave it in `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / FILE).write_text(json.dumps(asdict(self), indent=2) + "\n")


def beside(folder: str) -> RunData | None:
    """What the run in `folder` was trained on (a checkpoint's run is the folder round it); None where nothing says so.

    Raises:
        UsageError: the file that says so is damaged.
    """
    for path in (Path(folder) / FILE, Path(folder).parent / FILE):
        if path.is_file():
            try:
                return RunData(**json.loads(path.read_text()))
            except (ValueError, TypeError) as error:
                raise UsageError(f"{path} is damaged ({error}): name the data with --data") from error
    return None


def _brought(name: str) -> DatasetDict:
    if name not in SETS:
        raise UsageError(
            f"{name} is a data set that comes with the examples: name the data with --data, or run the script in "
            "examples/ that measures this"
        )
    return SETS[name]()


def _short(place: str) -> str:
    """The end of a long path; a name on the Hub has two parts."""
    return "/".join(Path(place).parts[-2:])


def _named(name: str, config: str | None = None) -> Dataset | DatasetDict:
    return load_from_disk(name) if (Path(name) / "dataset_info.json").is_file() else read_named(name, config)
