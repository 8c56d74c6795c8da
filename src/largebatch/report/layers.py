"""Parameter names -> the rows of a trust-ratio figure: order, short names, groups."""

from collections.abc import Sequence
from dataclasses import dataclass

# Words that say where a module hangs rather than what it is; dropped where the name stays unique without them.
_FILLER = {"module", "model", "bert", "encoder", "self", "dense", "layer", "layers", "cls", "weight"}
_BLOCKS = {"layer", "layers", "blocks", "h"}  # what the number after them counts
NAMED_ROWS = 40  # more rows than this are not named one by one


@dataclass(frozen=True)
class Group:
    """Consecutive rows `start` to `stop` (exclusive) of one kind of parameter at increasing depth."""

    label: str
    start: int
    stop: int


def arrange(names: Sequence[str]) -> tuple[list[str], list[Group]]:
    """Order the layers for a figure and say how its rows are labelled.

    Up to 40 layers keep the model's order and are named one by one. More are sorted by kind, then depth ("query weight
    of blocks 0 to 23"), so that a kind is one band with one label and a trend with depth shows inside it.
    """
    if len(names) <= NAMED_ROWS:
        return list(names), [Group(label, i, i + 1) for i, label in enumerate(short_names(names))]
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(_kind(name), []).append(name)
    ordered: list[str] = []
    groups: list[Group] = []
    labels = dict(zip(kinds, short_names(list(kinds)), strict=True))
    for kind, members in kinds.items():
        members.sort(key=_depth)
        groups.append(Group(_group_label(labels[kind], members), len(ordered), len(ordered) + len(members)))
        ordered += members
    return ordered, groups


def short_names(names: Sequence[str]) -> list[str]:
    """Names without the words that carry nothing; whole where two would become the same."""
    short = [_shorten(name) for name in names]
    return [s if short.count(s) == 1 else name for s, name in zip(short, names, strict=True)]


def _shorten(name: str) -> str:
    parts = [part for part in name.split(".") if part]
    following = [*parts[1:], ""]
    kept = [
        p for p, after in zip(parts, following, strict=True) if p not in _FILLER and not (p.isalpha() and p in after)
    ]
    if any(part in _BLOCKS for part in parts):
        kept = [f"L{part}" if part.isdigit() else part for part in kept]
    return " ".join(part.replace("_", " ") for part in kept) or name


def _kind(name: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def _depth(name: str) -> tuple[int, ...]:
    return tuple(int(part) for part in name.split(".") if part.isdigit())


def _group_label(label: str, members: Sequence[str]) -> str:
    label = label.replace("*", "").replace("  ", " ").strip() or "layers"
    return label if len(members) == 1 else f"{label} {_extent(members)}"


def _extent(members: Sequence[str]) -> str:
    depths = [depth for depth in map(_depth, members) if depth]
    simple = all(len(depth) == 1 for depth in depths)
    if not (depths and simple):
        return f"×{len(depths)}"
    block = "L" if any(part in _BLOCKS for part in next(iter(members)).split(".")) else ""
    return f"{block}{depths[0][0]}–{depths[-1][0]}"
