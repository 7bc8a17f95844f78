"""Tokenizers: a Hugging Face tokenizer written as GGUF keys, and checked with llama.cpp's own tokenizer."""

import contextlib
import ctypes
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, TokenType

from prosparse_pipe.errors import GGUFError, UnsupportedModelError

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_TAIL}"
_QWEN2 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_TAIL}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_WORD = r"[^\r\n\p{L}\p{N}]?"
_TEKKEN = rf"{_WORD}{_UPPER}*{_LOWER}+|{_WORD}{_UPPER}+{_LOWER}*|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_TAIL}"
_GPT4O = (
    rf"{_WORD}{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|{_WORD}{_UPPER}+{_LOWER}*{_CONTRACTIONS}?"
    rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_TAIL}"
)

# (normal form of the pre-tokenizer, ignore_merges) -> tokenizer.ggml.pre
_PRE = {
    (("gpt2",), False): "gpt-2",
    (("digit", "gpt2"), False): "smollm",
    ((_QWEN2,), False): "qwen2",
    ((_LLAMA3,), True): "llama-bpe",
    ((_LLAMA3,), False): "smaug-bpe",
    ((_TEKKEN,), True): "tekken",
    ((_GPT4O,), False): "gpt-4o",
}

CHECK_STRINGS = (
    "Hello world",
    " leading and trailing ",
    "I'm sure they'll say it's what WE'VE got, don't you'd agree?",
    "1 12 123 1234 12345678 3.14159 2,718 7x9",
    "a  b   c    d\te\t\tf",
    "line\nline\n\nline\n\n\n  indented\r\n\twindows",
    "  2 spaces before a digit,   3 before this",
    "def f(x: int) -> int:\n    return x ** 2  # square\n",
    "naïve café Übermaß œuvre ЗДРАВСТВУЙ мир",
    "北京 東京 서울 こんにちは",
    "😀 👩‍👩‍👧‍👦 𝕳𝖊𝖑𝖑𝖔 ½ ² ① …",
    "!!! ??? ... ---- /* */ <<>> [](){} \\ ~`@#$%^&*_+=|",
    "https://example.org/a?b=c&d=e#f user@example.org C:\\dir",
    "",
    " ",
    "\n",
)


@dataclasses.dataclass
class Vocab:
    """A tokenizer in GGUF's terms.

    Attributes:
        model: `gpt2` (byte-level BPE) or `llama` (SentencePiece-like BPE with byte fallback).
        pre: name of the pre-tokenizer in llama.cpp.
        tokens, types: one per id up to the model's vocabulary size.
        scores: SentencePiece only.
        merges: byte-level BPE only.
        special: GGUF key part (bos, eos, ...) to id.
        flags: add_bos, add_eos, add_space_prefix.
        chat_template: Jinja text or None.
        first_only_prefix: the space prefix comes at the start only, which llama.cpp does not do after special tokens.
    """

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    scores: list[float]
    merges: list[str]
    special: dict[str, int]
    flags: dict[str, bool]
    chat_template: str | None
    first_only_prefix: bool = False

    def write(self, writer: GGUFWriter) -> None:
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        if self.scores:
            writer.add_token_scores(self.scores)
        if self.merges:
            writer.add_token_merges(self.merges)
        for kind, token in self.special.items():
            getattr(writer, f"add_{kind}_token_id")(token)
        writer.add_add_bos_token(self.flags["add_bos"])
        writer.add_add_eos_token(self.flags["add_eos"])
        writer.add_add_space_prefix(self.flags["add_space_prefix"])
        if self.chat_template:
            writer.add_chat_template(self.chat_template)


def read_vocab(tokenizer: Any, n_vocab: int, stop_tokens: list[int] | None = None) -> Vocab:
    """Reads a Hugging Face tokenizer (fast) into GGUF's terms.

    Args:
        tokenizer: as AutoTokenizer gives it.
        n_vocab: rows of the embedding; ids beyond the tokenizer become unused tokens.
        stop_tokens: eos ids of generation_config.json.

    Raises:
        UnsupportedModelError: no fast tokenizer, not BPE, a pre-tokenizer that llama.cpp does not have, or ids
            beyond n_vocab.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UnsupportedModelError(
            f"the tokenizer {type(tokenizer).__name__} has no tokenizer.json form", "save it with tokenizer.json"
        )
    definition = json.loads(backend.to_str())
    model = definition["model"]
    if model.get("type") != "BPE":
        raise UnsupportedModelError(
            f"a {model.get('type')} tokenizer cannot be exported", "byte-level BPE and SentencePiece BPE are supported"
        )
    by_id = {index: text for text, index in tokenizer.get_vocab().items()}
    if by_id and max(by_id) >= n_vocab:
        raise UnsupportedModelError(
            f"the tokenizer has {max(by_id) + 1} tokens, the model's embedding only {n_vocab}", "resize the embedding"
        )
    merges = [pair.split(" ", 1) if isinstance(pair, str) else list(pair) for pair in model["merges"]]
    sentencepiece = bool(model.get("byte_fallback"))
    tokens, types = _tokens_and_types(definition, by_id, n_vocab, sentencepiece, tokenizer.unk_token_id)
    space_prefix, first_only = _space_prefix(definition) if sentencepiece else (False, False)
    plain, encoded = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    return Vocab(
        model="llama" if sentencepiece else "gpt2",
        pre="default" if sentencepiece else pre_tokenizer_name(definition),
        tokens=tokens,
        types=types,
        scores=_scores(tokens, merges) if sentencepiece else [],
        merges=[] if sentencepiece else [" ".join(part.replace(" ", "\u0120") for part in pair) for pair in merges],
        special=_special(tokenizer, stop_tokens or []),
        flags={
            "add_bos": len(encoded) > len(plain) and encoded[0] == tokenizer.bos_token_id,
            "add_eos": len(encoded) > len(plain) and encoded[-1] == tokenizer.eos_token_id,
            "add_space_prefix": space_prefix,
        },
        chat_template=_chat_template(tokenizer),
        first_only_prefix=first_only,
    )


def pre_tokenizer_name(definition: dict[str, Any]) -> str:
    """llama.cpp's name (`tokenizer.ggml.pre`) for the pre-tokenizer of a tokenizer.json.

    Raises:
        UnsupportedModelError: llama.cpp has none that splits like this one, as far as we know.
    """
    form = _normal_form(definition.get("pre_tokenizer"))
    name = _PRE.get((form, bool(definition["model"].get("ignore_merges"))))
    if name is None:
        raise UnsupportedModelError(
            f"no pre-tokenizer of llama.cpp is known to split like this one: {' then '.join(form) or 'none'}",
            f"known: {', '.join(sorted(set(_PRE.values())))}",
        )
    return name


def _normal_form(part: dict[str, Any] | None) -> tuple[str, ...]:
    """The splitting steps: `digit`, `gpt2` (ByteLevel's own regex) or a regex; steps that never split are left out."""
    if part is None:
        return ()
    kind = part["type"]
    if kind == "Sequence":
        return tuple(step for child in part["pretokenizers"] for step in _normal_form(child))
    if kind == "ByteLevel":
        prefix = ("space prefix",) if part.get("add_prefix_space") else ()
        return (*prefix, *(("gpt2",) if part.get("use_regex", True) else ()))
    if kind == "Digits":
        return ("digit" if part.get("individual_digits") else "digits",)
    if kind == "Split" and part.get("behavior") == "Isolated" and not part.get("invert"):
        pattern = part["pattern"]
        return ("digit" if pattern.get("Regex") == r"\p{N}" else pattern.get("Regex") or repr(pattern.get("String")),)
    return (kind,)


def restore_pre_tokenizer(tokenizer: Any, gguf_path: Path | str) -> None:
    """Gives a tokenizer that transformers rebuilt from a GGUF the pre-tokenizer which that GGUF names.

    transformers (5.23) rebuilds every byte-level BPE tokenizer with GPT-2's splitting, whatever tokenizer.ggml.pre
    says: "x  2" becomes other tokens than those SmolLM2 was trained with.
    """
    from gguf import GGUFReader
    from tokenizers import Regex, pre_tokenizers

    backend = getattr(tokenizer, "backend_tokenizer", None)
    field = GGUFReader(gguf_path).get_field("tokenizer.ggml.pre")
    if backend is None or field is None or _normal_form(json.loads(backend.to_str()).get("pre_tokenizer")) != ("gpt2",):
        return
    steps = next((form for (form, _), name in _PRE.items() if name == field.contents()), None)
    if steps is None or steps == ("gpt2",):
        return
    parts: list[Any] = []
    for step in steps:
        if step == "digit":
            parts.append(pre_tokenizers.Digits(individual_digits=True))
        elif step == "gpt2":
            parts.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True))
        else:
            parts.append(pre_tokenizers.Split(Regex(step), "isolated"))
    if steps[-1] != "gpt2":
        parts.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    backend.pre_tokenizer = pre_tokenizers.Sequence(parts)


def _tokens_and_types(
    definition: dict[str, Any], by_id: dict[int, str], n_vocab: int, sentencepiece: bool, unk: int | None
) -> tuple[list[str], list[int]]:
    added = {token["id"]: token for token in definition["added_tokens"]}
    tokens, types = [], []
    for index in range(n_vocab):
        text = by_id.get(index)
        if text is None:
            tokens.append(f"[PAD{index}]")
            types.append(TokenType.UNUSED)
            continue
        kind = TokenType.NORMAL
        if index in added:
            control = added[index]["special"] or (text.startswith("<|") and text.endswith("|>"))
            kind = TokenType.CONTROL if control else TokenType.USER_DEFINED
            if sentencepiece and index == unk:
                kind = TokenType.UNKNOWN
        elif sentencepiece and len(text) == 6 and text.startswith("<0x"):
            kind = TokenType.BYTE
        tokens.append(text)
        types.append(kind)
    return tokens, [int(kind) for kind in types]


def _scores(tokens: list[str], merges: list[list[str]]) -> list[float]:
    """Scores that make llama.cpp merge in the order of the merge list: minus the rank of a token's first merge."""
    rank: dict[str, int] = {}
    for position, pair in enumerate(merges):
        rank.setdefault("".join(pair), position)
    return [-float(rank.get(token, len(merges))) for token in tokens]


def _space_prefix(definition: dict[str, Any]) -> tuple[bool, bool]:
    """(a space is put before the text, only at its very start)."""
    steps = [definition.get("normalizer"), definition.get("pre_tokenizer")]
    while steps:
        part = steps.pop()
        if part is None:
            continue
        steps += part.get("normalizers", []) + part.get("pretokenizers", [])
        if part["type"] == "Prepend":
            return True, False
        if part["type"] == "Metaspace":
            scheme = part.get("prepend_scheme", "always" if part.get("add_prefix_space", True) else "never")
            return scheme != "never", scheme == "first"
    return False, False


def _special(tokenizer: Any, stop_tokens: list[int]) -> dict[str, int]:
    ids = {kind: getattr(tokenizer, f"{kind}_token_id", None) for kind in ("bos", "eos", "unk", "pad")}
    special = {kind: int(index) for kind, index in ids.items() if index is not None}
    template = _chat_template(tokenizer) or ""
    for index in stop_tokens:  # e.g. Llama 3: <|eot_id|> ends a turn, <|end_of_text|> the text
        if index != special.get("eos") and str(tokenizer.convert_ids_to_tokens(index)) in template:
            special.setdefault("eot", int(index))
    return special


def _chat_template(tokenizer: Any) -> str | None:
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, dict):
        template = template.get("default")
    return template or None


@contextlib.contextmanager
def quiet_llama_log() -> Iterator[list[str]]:
    """Takes llama.cpp's log lines, which would go to stderr, into a list."""
    import llama_cpp

    lines: list[str] = []

    def collect(_level: int, text: bytes, _data: ctypes.c_void_p) -> None:
        lines.append(text.decode("utf-8", "replace"))

    callback = llama_cpp.llama_log_callback(collect)
    llama_cpp.llama_log_set(callback, ctypes.c_void_p(0))
    try:
        yield lines
    finally:
        from llama_cpp import _logger

        llama_cpp.llama_log_set(_logger.llama_log_callback, ctypes.c_void_p(0))


def check_vocab(path: Path, tokenizer: Any, vocab: Vocab) -> None:
    """Compares llama.cpp's tokenizer, as loaded from a GGUF, with the Hugging Face tokenizer on tricky strings.

    Raises:
        GGUFError: llama.cpp cannot load the vocabulary, or a string gives other tokens; the message names it.
    """
    import llama_cpp

    strings = list(CHECK_STRINGS)
    control = [text for text, kind in zip(vocab.tokens, vocab.types, strict=True) if kind == TokenType.CONTROL]
    if control and not vocab.first_only_prefix:
        strings += [f"{token}user\nHi 42{token}\n" for token in control[:8]]
    with quiet_llama_log() as log:
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_model_default_params()
        params.vocab_only = True
        model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
        if not model:
            raise GGUFError(
                f"llama.cpp cannot load the vocabulary of {path.name}: {last_error(log)}", "please report it"
            )
        try:
            handle = llama_cpp.llama_model_get_vocab(model)
            for text in strings:
                expected = list(tokenizer(text, add_special_tokens=False)["input_ids"])
                got = _tokenize(handle, text)
                if got != expected:
                    raise GGUFError(
                        f"llama.cpp splits {text!r} into {got}, transformers into {expected}",
                        f"tokenizer.ggml.pre is {vocab.pre}; the file was not kept",
                    )
        finally:
            llama_cpp.llama_model_free(model)


def _tokenize(handle: Any, text: str) -> list[int]:
    import llama_cpp

    data = text.encode()
    room = len(data) + 16
    ids = (llama_cpp.llama_token * room)()
    count = llama_cpp.llama_tokenize(handle, data, len(data), ids, room, False, True)
    return list(ids[: max(count, 0)])


def last_error(log: list[str]) -> str:
    """The last line of llama.cpp's log that speaks of an error."""
    lines = [line.strip() for line in "".join(log).splitlines() if line.strip()]
    return next(
        (line for line in reversed(lines) if "error" in line.lower() or "fail" in line.lower()), "no reason given"
    )
