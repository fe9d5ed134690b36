"""Makes the embedded sample text, vitoats/data/sample_text.txt.gz, from the Jargon File (public domain).

    apt-get download jargon-text && dpkg -x jargon-text_*.deb jargon
    python tools/make_sample_text.py jargon/usr/share/doc/jargon-text/jargon.txt.gz

Paragraphs of prose are kept, without their line breaks; a form feed ends a document.
"""

import gzip
import sys
from pathlib import Path

SHORTEST = 150  # characters of a paragraph; shorter ones are headings, lists and quotations
DOCUMENT = 4_000  # characters after which a new document begins
LARGEST = 1_000_000  # characters in all
TARGET = Path(__file__).parent.parent / "vitoats" / "data" / "sample_text.txt.gz"


def main(source: str) -> None:
    """Writes the sample."""
    with gzip.open(source, "rt", encoding="utf-8", errors="replace") as file:
        blocks = file.read().split("\n\n")
    paragraphs = [" ".join(block.split()) for block in blocks]
    documents, current = [], ""
    for paragraph in (p for p in paragraphs if len(p) >= SHORTEST and "�" not in p):
        current += paragraph + "\n\n"
        if len(current) >= DOCUMENT:
            documents.append(current)
            current = ""
    text = "\f".join([*documents, current])[:LARGEST]
    TARGET.write_bytes(gzip.compress(text.encode(), mtime=0))
    print(f"{len(documents) + 1} documents, {len(text):,} characters, {TARGET.stat().st_size:,} bytes")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(f"give the file of the text:\n{__doc__}")
    main(sys.argv[1])
