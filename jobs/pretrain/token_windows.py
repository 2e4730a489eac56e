"""A byte-level BPE vocabulary and the stream of token windows that training reads."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from pedro.model_protocols import Tokenizer

UNK, BOS, EOS, PAD = "<unk>", "<s>", "</s>", "<pad>"
SPECIAL = (UNK, BOS, EOS, PAD)  # ids 0 to 3: unk, bos and eos as Llama has them


def train_tokenizer(texts: Iterable[str], size: int) -> Any:
    """A fast tokenizer of `size` entries. A text begins with a space that decoding takes away, as Llama's do, so an
    answer that is tokenised apart from its prompt is the word that would have followed it."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d"), "isolated"),  # numbers digit by digit
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.normalizer = normalizers.Prepend(" ")
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token=UNK, bos_token=BOS, eos_token=EOS, pad_token=PAD, padding_side="left"
    )


class Stream:
    """Token ids of all documents, end to end, cut into windows of T+1 (the last token of a window begins the next).

    `batch` draws from an endless order of windows that is a function of the seed alone.
    """

    def __init__(self, ids: np.ndarray, context: int, seed: int) -> None:
        self.ids, self.context, self.seed = ids, context, seed
        self.windows = (len(ids) - 1) // context
        assert self.windows > 0, f"{len(ids)} ids are less than a window of {context + 1}"
        self._epoch, self._order = -1, np.zeros(0, dtype=np.int64)

    def batch(self, first: int, rows: int) -> torch.Tensor:
        """Windows `first` ... `first + rows` of the order [rows, T+1]."""
        starts = [self._window(number) * self.context for number in range(first, first + rows)]
        return torch.from_numpy(np.stack([self.ids[at : at + self.context + 1] for at in starts]).astype(np.int64))

    def _window(self, number: int) -> int:
        epoch, index = divmod(number, self.windows)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, np.random.default_rng([self.seed, epoch]).permutation(self.windows)
        return int(self._order[index])


def pack(tokenizer: Tokenizer, groups: Sequence[Sequence[str]], seed: int) -> tuple[np.ndarray, list[int]]:
    """The ids of all documents in an order drawn by the seed, each as BOS, text, EOS; and the tokens of each group."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    rows, counts = [], []
    for texts in groups:
        ids = tokenizer(list(texts), add_special_tokens=False).input_ids
        rows += [np.array([bos, *row, eos], dtype=np.uint16) for row in ids]
        counts.append(sum(map(len, ids)) + 2 * len(ids))
    order = np.random.default_rng(seed).permutation(len(rows))
    return np.concatenate([rows[index] for index in order]), counts


def save_ids(ids: np.ndarray, path: Path) -> None:
    np.save(path, ids, allow_pickle=False)


def load_ids(path: Path) -> np.ndarray:
    ids: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    return ids
