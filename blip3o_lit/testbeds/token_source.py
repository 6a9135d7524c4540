"""From the data group to the token store it names; the demo and the testbeds build themselves."""

from __future__ import annotations

from blip3o_lit.config.data import DataConfig


def token_store(data: DataConfig) -> str:
    """Return the path or URL of the token store, building it first where that is our task.

    Args:
        data: The data group; `data.tokens`, where given, wins over every name.

    Returns:
        A directory, or the URL of one.
    """
    if data.tokens:
        return data.tokens
    if data.name == "linear_gaussian":
        from blip3o_lit.testbeds.linear_gaussian import linear_gaussian_store

        return str(linear_gaussian_store(data.linear_gaussian))
    if data.name == "ambiguous":
        from blip3o_lit.testbeds.ambiguous import ambiguous_store

        return str(ambiguous_store(data.ambiguous))
    from blip3o_lit.extraction.demo import demo_store

    return str(demo_store(masked=data.name == "demo_masked"))
