"""The shipped extract is what its README says: valid, split by article, licensed, and made by the script in dev/.

Guards: a question of the test whose paragraph was trained on, and figures in the README that nobody counted.
"""

import re
import subprocess
import sys
from pathlib import Path

import largebatch
from largebatch.evaluate import SquadDataset

EXTRACT = Path(largebatch.__file__).parent / "assets" / "squad_extract"


def test_split_by_article(extract: dict[str, SquadDataset]) -> None:
    train, test = extract["train"], extract["test"]
    assert not {e.title for e in train} & {e.title for e in test}
    assert not {e.context for e in train} & {e.context for e in test}
    assert not {e.id for e in train} & {e.id for e in test}
    assert sum(path.stat().st_size for path in EXTRACT.iterdir()) < 1_500_000


def test_the_readme_counts_right(extract: dict[str, SquadDataset]) -> None:
    readme = (EXTRACT / "README.md").read_text(encoding="utf-8")
    for name, dataset in extract.items():
        row = re.search(rf"\| `{name}\.json` \| (\d+) \| ([\d,]+) \| (.*) \|", readme)
        assert row is not None
        titles = list(dict.fromkeys(example.title for example in dataset))
        assert row.groups() == (str(dataset.num_articles), f"{len(dataset):,}", ", ".join(titles))
    assert "never" in readme.lower()
    assert "published" in readme


def test_the_licence_lies_beside_it_and_the_canary_stays() -> None:
    licence = (EXTRACT / "LICENSE").read_text(encoding="utf-8")
    assert "CC BY-SA 4.0" in licence
    assert "https://creativecommons.org/licenses/by-sa/4.0/" in licence
    assert "Rajpurkar" in licence
    for name in ("train", "test"):
        assert "canary GUID" in (EXTRACT / f"{name}.json").read_text(encoding="utf-8")[-200:]


def test_the_script_makes_it_again(shared_data: Path, tmp_path: Path) -> None:
    script = Path(__file__).resolve().parents[2] / "dev" / "squad_extract.py"
    source = shared_data / "squad" / "squaddev_v1.1.json.xz"
    subprocess.run([sys.executable, str(script), str(source), str(tmp_path)], check=True, capture_output=True)
    for name in ("train.json", "test.json"):
        assert (tmp_path / name).read_bytes() == (EXTRACT / name).read_bytes()
