"""Make the question-answering extract that the demo is shipped with, from the SQuAD v1.1 development set.

    python dev/squad_extract.py squad-dev-v1.1.json src/largebatch/assets/squad_extract

Articles in which every answer stands at its offset are put in the order of the SHA-256 of their titles, so that nobody
chose them: the first 3 are test.json, the next 12 are train.json. Nothing within an article is changed, and the file's
other keys (a canary string that asks to keep it out of pre-training text) are kept.
"""

import argparse
import hashlib
import json
from pathlib import Path

from largebatch.evaluate.squad_data import read_json, read_squad, read_text

NUM_TEST_ARTICLES = 3
NUM_TRAIN_ARTICLES = 12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="the official development set, .json, .json.gz or .json.xz")
    parser.add_argument("out", type=Path, help="the folder for train.json and test.json")
    arguments = parser.parse_args()

    dataset = read_squad(arguments.source, on_bad_answer="skip")
    bad_ids = set(dataset.bad_answers)
    bad_titles = {example.title for example in dataset if example.id in bad_ids}
    content = read_json(arguments.source, read_text(arguments.source))
    articles = [article for article in content["data"] if article["title"] not in bad_titles]
    articles.sort(key=lambda article: hashlib.sha256(article["title"].encode()).hexdigest())

    arguments.out.mkdir(parents=True, exist_ok=True)
    end = NUM_TEST_ARTICLES + NUM_TRAIN_ARTICLES
    for name, part in (("test", articles[:NUM_TEST_ARTICLES]), ("train", articles[NUM_TEST_ARTICLES:end])):
        path = arguments.out / f"{name}.json"
        text = json.dumps({**content, "data": part}, ensure_ascii=False, separators=(",", ":"))
        path.write_text(text + "\n", encoding="utf-8")
        print(f"{read_squad(path)}; {path.stat().st_size} bytes; " + ", ".join(a["title"] for a in part))


if __name__ == "__main__":
    main()
