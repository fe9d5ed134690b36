"""Makes the texts by which docs/language-models.md compares methods: free prose of four kinds, one JSON line a document.

    apt-get install anarchism postgresql-doc-15 python3.11-doc
    pip install lxml mwparserfromhell
    pip download --no-deps gensim==4.4.0
    python tools/make_texts.py --gensim gensim-4.4.0-*.whl --output texts

"An Anarchist FAQ" (GPL-2) and PostgreSQL's manual (PostgreSQL licence) calibrate; Python's manual (PSF licence) and an
encyclopaedia (CC-BY-SA; the sample of Wikipedia in gensim's tests) are measured on. The encyclopaedia's first article is left
out, because it is about the first text's subject.
"""

import argparse
import bz2
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path

import lxml.html
import mwparserfromhell
from lxml import etree

SHORTEST = 80  # characters of a paragraph; shorter ones are headings, lists and captions
MANUALS = {
    "anarchism": "/usr/share/doc/anarchism/html",
    "postgresql": "/usr/share/doc/postgresql-doc-15/html",
    "python-doc": "/usr/share/doc/python3.11/html",
}
DUMP = "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"


def main() -> None:
    """Writes the texts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gensim", type=Path, required=True, metavar="WHEEL", help="a wheel of gensim; it is not installed")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="where the files are written")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    for name, folder in MANUALS.items():
        write(args.output / f"{name}.jsonl", (page(file) for file in sorted(Path(folder).rglob("*.html"))))
    write(args.output / "encyclopaedia.jsonl", list(articles(args.gensim))[1:])


def page(file: Path) -> list[str]:
    """The paragraphs of an HTML page outside of tables and code."""
    paragraphs = lxml.html.fromstring(file.read_bytes()).iter("p")
    return [p.text_content() for p in paragraphs if next(p.iterancestors("table", "pre"), None) is None]


def articles(wheel: Path) -> Iterator[list[str]]:
    """The paragraphs of each article in a dump of Wikipedia, without markup; redirects are left out."""
    with zipfile.ZipFile(wheel) as packed, packed.open(DUMP) as file, bz2.open(file) as dump:
        for _, element in etree.iterparse(dump, tag="{*}text", recover=True):
            if element.text and not element.text.lower().startswith("#redirect"):
                lines = mwparserfromhell.parse(element.text).strip_code().splitlines()
                yield [line for line in lines if "|" not in line]  # markup is left over of pictures
            element.clear()


def write(file: Path, documents: Iterator[list[str]] | list[list[str]]) -> None:
    """Writes the long paragraphs of each document, and says how many characters they have."""
    joined = [[" ".join(paragraph.split()) for paragraph in document] for document in documents]
    texts = ["\n\n".join(p for p in paragraphs if len(p) >= SHORTEST) for paragraphs in joined]
    lines = [json.dumps({"text": text}) for text in texts if text]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{file}: {len(lines)} documents, {sum(map(len, texts)):,} characters")


if __name__ == "__main__":
    main()
