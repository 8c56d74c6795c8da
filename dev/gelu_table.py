"""Print the two tables of models/native/gelu.c: cubics for GELU and its slope, around 32 points.

    python dev/gelu_table.py

Each cubic goes through the function at the four Chebyshev nodes of its interval, reckoned in float64.
"""

import math

import numpy as np

POINTS, PER_UNIT = 32, 5.25


def tail(x: float) -> float:
    """Return what the normal distribution has above x."""
    return 0.5 * math.erfc(x / math.sqrt(2))


def slope(x: float) -> float:
    """Return GELU's derivative at x, less 1/2."""
    return 0.5 - tail(x) + x * math.exp(-x * x / 2) / math.sqrt(2 * math.pi)


def cubics(function: object, last: float) -> np.ndarray:
    """Return [4, POINTS]: the coefficients of 1, r, r^2 and r^3; at the last point the constant ``last``."""
    nodes = 0.5 * np.cos((2 * np.arange(4) + 1) * np.pi / 8)
    table = np.zeros((4, POINTS))
    for point in range(POINTS - 1):
        values = [function((point + r) / PER_UNIT) for r in nodes]
        table[:, point] = np.polyfit(nodes, values, 3)[::-1]
    table[0, -1] = last
    return table


if __name__ == "__main__":
    for name, function, last in (("tails", tail, 0.0), ("slopes", slope, 0.5)):
        print(f"static const float {name}[4][POINTS] = {{")
        for row in cubics(function, last):
            numbers = [f"{value:.8e}f" for value in row]
            lines = [", ".join(numbers[i : i + 6]) for i in range(0, POINTS, 6)]
            print("    {" + ",\n     ".join(lines) + "},")
        print("};\n")
