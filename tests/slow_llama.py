"""LLaMA's sentencepiece tokenizer as it was before fast ones, without any help from easylm."""

import pathlib
import re
from collections.abc import Iterable

import numpy as np
import sentencepiece


def train_model(texts: Iterable[str], vocab_size: int, folder: pathlib.Path) -> pathlib.Path:
    """Trains a sentencepiece model with LLaMA's settings; returns its file."""
    prefix = folder / "tokenizer"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for text in texts for line in text.splitlines()),
        model_prefix=str(prefix),
        model_type="bpe",
        vocab_size=vocab_size,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        minloglevel=2,
    )
    return prefix.with_suffix(".model")


class SlowLlama:
    """What transformers 4.31 and EasyLM made of Tülu's format, from sentencepiece itself.

    They cut the text at special tokens, which take the white space beside them away; what is left
    between them goes to sentencepiece piece by piece. Masks are lengths of encoded prefixes.
    """

    def __init__(self, model_file, bos="<s>", eos="</s>"):
        self.processor = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
        self.bos, self.eos = bos, eos
        self.ids = {bos: self.processor.bos_id(), eos: self.processor.eos_id()}

    def encode(self, text: str) -> list[int]:
        """Token ids; special tokens are cut out wherever the text spells them."""
        pieces = re.split("(" + "|".join(self.ids) + ")", text)
        ids = []
        for index, piece in enumerate(pieces):
            if index % 2:
                ids.append(self.ids[piece])
                continue
            piece = piece.lstrip() if index > 0 else piece
            ids += self.processor.encode(piece.rstrip() if index < len(pieces) - 1 else piece)
        return ids

    def example(self, messages: list[dict]) -> tuple[list[int], list[int]]:
        """Ids and mask of a conversation."""
        text, seams = self.bos, []
        for message in messages:
            text += f"<|{message['role']}|>\n"
            seams.append(len(self.encode(text)))
            is_answer = message["role"] == "assistant"
            text += message["content"].strip() + (f"{self.eos}\n" if is_answer else "\n")
            seams.append(len(self.encode(text)))
        ids = self.encode(text.strip())
        mask = np.zeros(len(ids), int)
        for message, start, end in zip(messages, seams[::2], seams[1::2], strict=True):
            mask[start:end] = message["role"] == "assistant"
        return ids, mask.tolist()
