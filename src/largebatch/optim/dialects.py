"""What other packages mean by LAMB, as arguments of ours."""

from typing import Any


def dialect(name: str) -> dict[str, Any]:
    return {}
