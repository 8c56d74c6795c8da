"""Make the corpus that the demo is shipped with, from one text file of 18 classic books.

    python dev/demo_corpus.py gutenberg.txt.xz src/largebatch/assets/demo_corpus

The source has one paragraph per line, a title line in brackets at the head of each book and a blank line after each.
A whole book is no use as a document: the held-out split takes whole documents. So each book becomes runs of
consecutive paragraphs of at least 8,000 characters (one chapter of a short-chaptered novel), separated by blank lines.
Title lines are left out, and so are the distributor's trailer that one of the books still carries and the one book
whose author died less than seventy years ago (in the public domain in the United States, not everywhere).
"""

import argparse
import lzma
from pathlib import Path

RUN_CHARACTERS = 8000
LEFT_OUT = "The Adventures of Buster Bear"  # Thornton W. Burgess, 1874-1965
TRAILER = "End of Project Gutenberg"


def runs(paragraphs: list[str]) -> list[list[str]]:
    """Consecutive paragraphs in runs of at least `RUN_CHARACTERS`; a short last one joins the run before it."""
    found: list[list[str]] = [[]]
    for paragraph in paragraphs:
        if sum(map(len, found[-1])) >= RUN_CHARACTERS:
            found.append([])
        found[-1].append(paragraph)
    if len(found) > 1 and sum(map(len, found[-1])) < RUN_CHARACTERS // 2:
        last = found.pop()
        found[-1] += last
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="the books, .txt or .txt.xz")
    parser.add_argument("out", type=Path, help="the folder for gutenberg.txt.xz")
    arguments = parser.parse_args()

    opener = lzma.open if arguments.source.suffix == ".xz" else open
    with opener(arguments.source, "rt", encoding="utf-8") as file:
        books = [book.split("\n") for book in file.read().strip("\n").split("\n\n")]
    documents = []
    for title, *paragraphs in books:
        if LEFT_OUT in title:
            continue
        trailer = next((i for i, text in enumerate(paragraphs) if text.startswith(TRAILER)), len(paragraphs))
        of_book = runs(paragraphs[:trailer])
        documents += of_book
        print(f"{title.strip('[]')}: {len(of_book)} documents, {sum(map(len, paragraphs[:trailer])):,} characters")
    content = "\n\n".join("\n".join(document) for document in documents) + "\n"
    if TRAILER.split()[-1] in content:
        raise SystemExit("a distributor's notice is still in the text")
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / "gutenberg.txt.xz"
    path.write_bytes(lzma.compress(content.encode(), preset=9 | lzma.PRESET_EXTREME))
    print(f"{path}: {len(documents)} documents, {len(content):,} characters, {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
