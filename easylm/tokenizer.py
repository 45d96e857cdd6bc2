"""Tokenizers: load one from anywhere, carry it in a checkpoint, write it beside exported weights.

Every tokenizer here is a `PreTrainedTokenizerFast`, which is its tokenizer.json and nothing more:
transformers 4 and 5 give the same ids for it, whereas classes such as `LlamaTokenizer` rebuild the
pipeline in their own way in each version. transformers takes seconds to import, so the functions
that need it import it.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterable
from typing import TYPE_CHECKING

from easylm import storage
from easylm.chat import TULU
from easylm.errors import InputError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

_NAMED_TOKENS = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
)
# What LLaMA-like models name in tokenizer_config.json. transformers 5 also writes names that 4 does
# not know, TokenizersBackend foremost.
_CLASSES_OF_4 = (
    "LlamaTokenizer",
    "LlamaTokenizerFast",
    "CodeLlamaTokenizer",
    "CodeLlamaTokenizerFast",
    "GPT2Tokenizer",
    "GPT2TokenizerFast",
    "PreTrainedTokenizerFast",
)
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


def load_tokenizer(
    path: str | os.PathLike[str], chat_template: str | None = "tulu"
) -> PreTrainedTokenizerFast:
    """Loads a tokenizer and gives it the chat template to train with.

    Args:
        path: a Hugging Face folder, a folder or file with a sentencepiece `tokenizer.model`, a
            `tokenizer.json` (local or gs://), or a name on the Hugging Face hub.
        chat_template: `tulu`, or `own` for the template that comes with the tokenizer, or the path
            of a jinja file; None for whatever comes with it, if anything.

    Raises:
        InputError: nothing is there, it is not a tokenizer this can read exactly, or it lacks an
            end-of-sequence token or the template asked for.
    """
    path = os.fspath(path)
    files = _read_files(path)
    if files is None:
        tokenizer = _from_hub(path)
    elif "tokenizer.json" not in files and "tokenizer.model" in files:
        tokenizer = _from_sentencepiece(files["tokenizer.model"], path)
    else:
        tokenizer = load_tokenizer_files(files, path)
    require_eos(tokenizer, path)
    if chat_template is not None:
        set_chat_template(tokenizer, os.fspath(chat_template), path)
    return tokenizer


def require_eos(tokenizer: PreTrainedTokenizerFast, where: str) -> None:
    """Raises InputError unless the tokenizer, which `where` names, can end an answer."""
    if tokenizer.eos_token is None:
        raise InputError(
            f"{where}: the tokenizer names no eos_token, so an answer could not end; "
            f"add eos_token to its tokenizer_config.json"
        )


def set_chat_template(tokenizer: PreTrainedTokenizerFast, chat_template: str, where: str) -> None:
    """Gives a tokenizer the chat template to train with; see `load_tokenizer`.

    Raises:
        InputError: there is no such template, or it is none; `where` names the tokenizer in the
            message.
    """
    if chat_template == "tulu":
        tokenizer.chat_template = TULU
    elif chat_template != "own":
        if not storage.exists(chat_template):
            raise InputError(
                f"chat_template: found {chat_template!r}; wanted 'tulu', 'own' or a jinja file"
            )
        try:
            tokenizer.chat_template = storage.read_bytes(chat_template).decode()
        except UnicodeDecodeError as error:
            raise InputError(
                f"{chat_template}: not UTF-8 text; wanted a jinja template ({error})"
            ) from None
        _require_jinja(tokenizer.chat_template, chat_template)
    elif tokenizer.chat_template is None:
        raise InputError(f"{where}: the tokenizer has no chat template; use chat_template='tulu'")
    else:
        try:
            own = tokenizer.get_chat_template()
        except ValueError as error:  # several, none of them the default
            raise InputError(f"{where}: {error}") from None
        if not isinstance(own, str):
            raise InputError(f"{where}: chat_template: found {own!r}; wanted a jinja template")
        _require_jinja(own, f"own template of {where}")


def _require_jinja(template: str, where: str) -> None:
    """Compiles a chat template, with the tags that transformers adds, and renders nothing."""
    import jinja2
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        render_jinja_template(conversations=[], chat_template=template)
    except jinja2.TemplateSyntaxError as error:
        raise InputError(
            f"{where}, line {error.lineno}: not a jinja template: {error.message}; correct it, or "
            "use chat_template='tulu'"
        ) from None


def tokenizer_files(tokenizer: PreTrainedTokenizerFast) -> dict[str, bytes]:
    """The files of a Hugging Face folder that give this tokenizer back, as name to content.

    The chat template is inside tokenizer_config.json, where transformers 4 and 5 both look.
    """
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["truncation"] = state["padding"] = None
    names = {
        name: str(token)
        for name in _NAMED_TOKENS
        if (token := tokenizer.special_tokens_map.get(name)) is not None
    }
    config: dict[str, object] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": tokenizer.model_max_length,
        **names,
    }
    if tokenizer.chat_template is not None:
        config["chat_template"] = tokenizer.chat_template
    return {
        "tokenizer.json": _json_bytes(state),
        "tokenizer_config.json": _json_bytes(config),
        "special_tokens_map.json": _json_bytes(names),
    }


def tokenizer_files_in(folder: str) -> dict[str, bytes]:
    """The tokenizer files in a folder, name to content; none where there is no tokenizer."""
    present = storage.list_files(folder)
    files = {name: storage.read_bytes(f"{folder}/{name}") for name in _FILES if name in present}
    whole = files.keys() & {"tokenizer.json", "tokenizer.model", "vocab.json"}
    return files if whole else {}


def load_in_transformers_4(files: dict[str, bytes]) -> bool:
    """Whether transformers 4 makes of these files the tokenizer that transformers 5 does.

    Not if a file is damaged, nor if their class came with 5, nor if they hold the chat template in
    a file of its own or the extra special tokens as a list, where 4 does not look or fails.

    Args:
        files: file name to content, of a tokenizer that `load_tokenizer_files` takes.
    """
    if _damage(files):
        return False
    config = json.loads(files.get("tokenizer_config.json", b"{}"))
    # Without a class, the model's type decides.
    known = config.get("tokenizer_class") in (None, *_CLASSES_OF_4)
    template = files.get("chat_template.jinja")
    inside = template is None or config.get("chat_template") == template.decode()
    return known and inside and not isinstance(config.get("extra_special_tokens"), list)


def load_tokenizer_files(
    files: dict[str, bytes], where: str = "tokenizer"
) -> PreTrainedTokenizerFast:
    """Loads what `tokenizer_files` gives, or the tokenizer files of any Hugging Face folder.

    Args:
        files: file name to content.
        where: the name of their place, for error messages.

    Raises:
        InputError: the files do not make a fast tokenizer.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    # Files without tokenizer.json (GPT-2, OPT) need the class that knows how to build one.
    loader = PreTrainedTokenizerFast if "tokenizer.json" in files else AutoTokenizer
    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items():
            storage.write_bytes(os.path.join(folder, name), content)
        try:
            tokenizer = loader.from_pretrained(folder)
        except Exception as error:
            # The tokenizers library raises the bare class, and transformers what it stumbles over.
            kinds = (AttributeError, KeyError, OSError, RecursionError, TypeError, ValueError)
            if type(error) is not Exception and not isinstance(error, kinds):
                raise
            reason = _damage(files) or f": the tokenizer files cannot be read: {error}"
            raise InputError(f"{where}{reason}") from error
    return _require_fast(tokenizer, where)


def _damage(files: dict[str, bytes]) -> str:
    """Which of a tokenizer's files is not what its name says, and why; empty if all are."""
    for name, content in files.items():
        if name == "tokenizer.model":
            continue
        try:
            text = content.decode()
            value = json.loads(text) if name.endswith(".json") else {}
        except (ValueError, RecursionError) as error:
            wanted = "valid JSON" if name.endswith(".json") else "UTF-8 text"
            return f"/{name}: not {wanted}: {error}"
        if not isinstance(value, dict):
            return f"/{name}: found a {type(value).__name__}; wanted a JSON object"
    return ""


def train_tokenizer(texts: Iterable[str], vocab_size: int, folder: str | os.PathLike[str]) -> None:
    """Trains a LLaMA-style tokenizer and writes it as a Hugging Face folder.

    Byte-pair encoding by sentencepiece with LLaMA's settings: `<unk>`, `<s>`, `</s>` are 0, 1, 2,
    then 256 bytes; digits and newlines stand alone; text is not normalized. The same texts give
    the same ids.

    Args:
        texts: what it is trained on.
        vocab_size: the number of ids, an upper limit: small texts give fewer.
        folder: a new one, local or gs://, written whole or not at all.

    Raises:
        InputError: the folder exists, or the texts are empty or have more characters than fit
            `vocab_size`.
    """
    import io

    import sentencepiece

    # No piece may contain a newline, as in LLaMA's own vocabulary: it would swallow the end of
    # the chat template's "<|assistant|>\n" together with the first word of the answer.
    lines = (line for text in texts for line in text.split("\n") if line)
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines,
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            byte_fallback=True,
            character_coverage=0.99995,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        needed = re.search(r"smaller than required_chars. \d+ vs (\d+)", str(error))
        if not needed:
            raise InputError(f"the texts make no tokenizer of {vocab_size} ids: {error}") from error
        raise InputError(
            f"data.tokenizer_vocab_size: found {vocab_size}; wanted at least {needed[1]}: so many "
            "different characters are in the texts, with the bytes and special tokens"
        ) from error
    tokenizer = _from_sentencepiece(model.getvalue(), "the trained tokenizer")
    tokenizer.chat_template = TULU
    with storage.write_folder(os.fspath(folder)) as unfinished:
        for name, content in tokenizer_files(tokenizer).items():
            storage.write_bytes(f"{unfinished}/{name}", content)


def _read_files(path: str) -> dict[str, bytes] | None:
    """The tokenizer files at `path`; None when `path` can only be a name on the hub."""
    path = path if storage.is_bucket(path) else os.path.expanduser(path)
    if storage.is_folder(path):
        files = tokenizer_files_in(path)
        if not files:
            raise InputError(
                f"{path}: no tokenizer in this folder; wanted tokenizer.json or tokenizer.model"
            )
        return files
    if storage.exists(path):
        name = "tokenizer.json" if path.endswith(".json") else "tokenizer.model"
        return {name: storage.read_bytes(path)}
    if not _HUB_NAME.fullmatch(path) or path.startswith("."):
        raise InputError(
            f"{path}: no such folder or file{storage.missing_hint(path)}; wanted a folder with "
            "tokenizer.json or tokenizer.model, or a name on the Hugging Face hub"
        )
    return None


def _from_hub(name: str) -> PreTrainedTokenizerFast:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast
    from transformers.utils import cached_file

    try:
        exact = cached_file(name, "tokenizer.json", _raise_exceptions_for_missing_entries=False)
        loader = PreTrainedTokenizerFast if exact else AutoTokenizer
        tokenizer = loader.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise InputError(
            f"{name}: no such folder here, and the Hugging Face hub gave no tokenizer of that name "
            f"({str(error).strip().splitlines()[0].rstrip('.')}). Check the spelling, the network, "
            "HF_ENDPOINT, and for a private or gated model HF_TOKEN"
        ) from error
    return _require_fast(tokenizer, name)


def _require_fast(tokenizer, where: str) -> PreTrainedTokenizerFast:
    if not tokenizer.is_fast:
        raise InputError(
            f"{where}: {type(tokenizer).__name__} is not a fast tokenizer; wanted tokenizer.json "
            f"(transformers writes one with AutoTokenizer...save_pretrained)"
        )
    return tokenizer


def _from_sentencepiece(model: bytes, where: str) -> PreTrainedTokenizerFast:
    """Builds the fast LLaMA tokenizer whose ids are those of the sentencepiece model."""
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2
    from tokenizers import AddedToken, processors
    from transformers import PreTrainedTokenizerFast

    proto = sentencepiece_model_pb2.ModelProto()
    try:
        proto.ParseFromString(model)
    except DecodeError as error:
        raise InputError(
            f"{where}: not a sentencepiece model; for a tiktoken file give the Hugging Face "
            f"folder with tokenizer.json instead"
        ) from error
    _require_llama_style(proto, where)
    backend = _bpe(proto)
    kind = sentencepiece_model_pb2.ModelProto.SentencePiece
    special = [p.piece for p in proto.pieces if p.type in (kind.UNKNOWN, kind.CONTROL)]
    backend.add_special_tokens([AddedToken(s, normalized=False, special=True) for s in special])
    trainer = proto.trainer_spec
    bos = trainer.bos_piece
    backend.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, trainer.bos_id)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=bos,
        eos_token=trainer.eos_piece,
        unk_token=trainer.unk_piece,
        clean_up_tokenization_spaces=False,
    )


def _require_llama_style(proto, where: str) -> None:
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    kinds = {piece.type for piece in proto.pieces}
    checks = {
        "model_type": (trainer.model_type == trainer.BPE, "BPE"),
        "byte_fallback": (trainer.byte_fallback, "true"),
        "normalization": (not normalizer.precompiled_charsmap, "identity"),
        "add_dummy_prefix": (normalizer.add_dummy_prefix, "true"),
        "remove_extra_whitespaces": (not normalizer.remove_extra_whitespaces, "false"),
        "treat_whitespace_as_suffix": (not trainer.treat_whitespace_as_suffix, "false"),
        "user_defined_symbols": (proto.SentencePiece.USER_DEFINED not in kinds, "none"),
        "bos_id and eos_id": (trainer.bos_id >= 0 and trainer.eos_id >= 0, "both"),
    }
    wrong = [f"{name}: wanted {wanted}" for name, (fine, wanted) in checks.items() if not fine]
    if not proto.pieces or wrong:
        raise InputError(
            f"{where}: not a LLaMA-style sentencepiece model ({'; '.join(wrong) or 'no pieces'}); "
            f"give the Hugging Face folder with tokenizer.json instead"
        )


def _bpe(proto) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models, normalizers

    vocab = {piece.piece: index for index, piece in enumerate(proto.pieces)}
    normal = [piece for piece in proto.pieces if piece.type == proto.SentencePiece.NORMAL]
    merges = []
    # sentencepiece joins the pair whose joint piece scores best; here the first rule wins.
    for piece in sorted(normal, key=lambda piece: -piece.score):
        text = piece.piece
        pairs = ((text[:cut], text[cut:]) for cut in range(1, len(text)))
        merges += [(left, right) for left, right in pairs if left in vocab and right in vocab]
    backend = Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=merges,
            unk_token=proto.trainer_spec.unk_piece,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1, right=0),
        ]
    )
    return backend


def _json_bytes(value: object) -> bytes:
    return (json.dumps(value, ensure_ascii=False, indent=2) + "\n").encode()
