"""`optimizer.lr=auto`: the peak learning rate that a network's width asks for.

A step of Muon here has the size of AdamW's whatever a matrix's shape, so at one rate a wider
network moves further and its best rate is lower: by the spectral condition (Yang, Simon and
Bernstein 2023, arXiv:2310.17813) as the width to the power -1/2 for Muon's matrices and -1 for
AdamW's. docs/results.md measures both, and finds about that; the numbers are a little below the
best of Muon's, as longer runs want less.
"""

from blip3o_lit.config.errors import UserError

AUTO = "auto"
WIDTH = 128
BEST = {("muon", "dit"): (1.6e-2, 1 / 2), ("adamw", "dit"): (1.05e-2, 3 / 4)}
"""By optimizer and architecture: the best rate at that width, and the power that it falls with."""


def auto_rate(optimizer: str, architecture: str, width: int) -> float:
    """Return the peak learning rate of a network of a width, to two digits.

    Raises:
        UserError: For an optimizer or architecture whose rates nobody has measured.
    """
    if (optimizer, architecture) not in BEST:
        raise UserError(
            "optimizer.lr=auto is known for model.architecture=dit alone, and this is "
            f"{optimizer} with {architecture}: give a number, as optimizer.lr=1e-3"
        )
    best, power = BEST[optimizer, architecture]
    return float(f"{best * (WIDTH / width) ** power:.2g}")


def peak_rate(value: int | float | str) -> float | str:
    """Return a learning rate as it was given, as a number or the word `auto`.

    Raises:
        UserError: If it is neither, or not above zero.
    """
    if value == AUTO:
        return AUTO
    try:
        rate = float(value)
    except ValueError:
        rate = float("nan")
    if not rate > 0:
        raise UserError(f"optimizer.lr={value}: give a number above 0, or {AUTO}")
    return rate
