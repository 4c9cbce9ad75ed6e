"""Running text as blocks of equal length, an end token between texts: no batch of them is padded."""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import chain

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from .cli import UsageError
from .sources import FileArguments


@dataclass
class RunningTextArguments(FileArguments):
    """Which texts, and how long a block of them is."""

    text_column_name: str = field(default="text", metadata={"help": "The column with the text."})
    block_size: int = field(default=128, metadata={"help": "Tokens in a block."})
    max_train_blocks: int | None = field(default=None, metadata={"help": "Train on so many blocks."})
    max_eval_blocks: int | None = field(default=None, metadata={"help": "Evaluate on so many blocks."})


def blocks(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, data: RunningTextArguments, limit: int | None
) -> Dataset:
    """`rows` as blocks of ``input_ids``, at most `limit` of them; what is left of a thousand texts at the end is
    dropped.

    Raises:
        UsageError: there is less text than one block.
    """
    packed = rows.map(packer(tokenizer, data), batched=True, remove_columns=rows.column_names, desc="packing")
    if not len(packed):
        raise UsageError(f"{len(rows)} texts are less than one block: give a --block_size below {data.block_size}")
    return packed.select(range(min(limit or len(packed), len(packed))))


def packer(tokenizer: PreTrainedTokenizerBase, data: RunningTextArguments) -> Callable[[dict], dict]:
    """Texts -> blocks of `block_size` tokens, and the same as ``labels``: the model shifts them itself.

    Raises:
        UsageError: there is no end token to put between texts.
    """
    if tokenizer.eos_token_id is None:
        name = tokenizer.name_or_path
        raise UsageError(
            f"the tokenizer of {name} has no end token to put between texts: set `eos_token` in its folder"
        )

    def pack(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        texts = tokenizer(batch[data.text_column_name], add_special_tokens=False)["input_ids"]
        tokens = list(chain.from_iterable([*ids, tokenizer.eos_token_id] for ids in texts))
        starts = range(0, len(tokens) - data.block_size + 1, data.block_size)
        cut = [tokens[start : start + data.block_size] for start in starts]
        return {"input_ids": cut, "labels": cut}

    return pack
