"""The tokenizer in a GGUF file's metadata, as a `tokenizers.Tokenizer`: byte-level BPE ("gpt2") and SentencePiece ("llama")."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from gguf import TokenType
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

_LLAMA3_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# How each pre-tokenizer that `tokenizer.ggml.pre` may name cuts text before merging; None: GPT-2's regex (ByteLevel's own).
_SPLITS = {
    "gpt-2": None,
    "smollm": None,  # after cutting digits apart
    "llama-bpe": _LLAMA3_SPLIT,
    "qwen2": _LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}"),
}
_SPACE = "▁"  # how SentencePiece writes a space


def build_tokenizer(meta: dict[str, Any]) -> tuple[Tokenizer, dict[str, Any]]:
    """The tokenizer and the content of its tokenizer_config.json. Control tokens become special tokens, one id each.

    `meta` is GGUF metadata by key. Raises ValueError that names a tokenizer of another kind.
    """
    kind, pre = meta.get("tokenizer.ggml.model"), meta.get("tokenizer.ggml.pre")
    if kind == "gpt2" and pre in _SPLITS:
        tokenizer = _byte_level(meta, pre)
    elif kind == "llama":
        tokenizer = _sentence_piece(meta)
    else:
        raise ValueError(f"GGUF tokenizer {kind!r}/{pre!r} is not supported; supported: llama, gpt2 with {', '.join(_SPLITS)}")
    tokens: list[str] = meta["tokenizer.ggml.tokens"]
    of_type = list(zip(tokens, meta["tokenizer.ggml.token_type"], strict=True))
    special = [AddedToken(t, special=True, normalized=False) for t, k in of_type if k in (TokenType.CONTROL, TokenType.UNKNOWN)]
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t, k in of_type if k == TokenType.USER_DEFINED])

    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown")):
        token = meta.get(f"tokenizer.ggml.{theirs}_token_id")
        if token is not None and token < len(tokens):
            settings[f"{ours}_token"] = tokens[token]
    if meta.get("tokenizer.chat_template"):
        settings["chat_template"] = meta["tokenizer.chat_template"]
    if meta.get("tokenizer.ggml.add_bos_token", kind == "llama") and "bos_token" in settings:
        bos = settings["bos_token"]
        pair, ids = [bos, "$A", bos, "$B"], [(bos, meta["tokenizer.ggml.bos_token_id"])]
        tokenizer.post_processor = processors.TemplateProcessing(single=[bos, "$A"], pair=pair, special_tokens=ids)
    return tokenizer, settings


def _byte_level(meta: dict[str, Any], pre: str) -> Tokenizer:
    tokens: list[str] = meta["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in meta["tokenizer.ggml.merges"]]
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=pre == "llama-bpe"))
    split = _SPLITS[pre]
    first: list[pre_tokenizers.PreTokenizer] = []
    if pre == "smollm":
        first = [pre_tokenizers.Digits(individual_digits=True)]
    elif split is not None:
        first = [pre_tokenizers.Split(Regex(split), behavior="isolated")]
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*first, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentence_piece(meta: dict[str, Any]) -> Tokenizer:
    """SentencePiece's BPE: of all neighbours that form a piece, those that form the best-scored one merge first."""
    tokens: list[str] = meta["tokenizer.ggml.tokens"]
    scores: list[float] = meta["tokenizer.ggml.scores"]
    vocab = {token: i for i, token in enumerate(tokens)}
    types = meta["tokenizer.ggml.token_type"]

    def merges() -> Iterator[tuple[str, str]]:
        for i in sorted((i for i, kind in enumerate(types) if kind == TokenType.NORMAL), key=lambda i: -scores[i]):
            halves = ((tokens[i][:cut], tokens[i][cut:]) for cut in range(1, len(tokens[i])))
            yield from ((left, right) for left, right in halves if left in vocab and right in vocab)

    unknown = tokens[meta.get("tokenizer.ggml.unknown_token_id", 0)]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=list(merges()), unk_token=unknown, fuse_unk=True, byte_fallback=True))
    prefix = meta.get("tokenizer.ggml.add_space_prefix", True)
    replace = normalizers.Replace(" ", _SPACE)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), replace]) if prefix else replace
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence([decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    return tokenizer
