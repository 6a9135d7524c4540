"""From the data group to the token store it names; the demo and the testbeds build themselves."""

from blip3o_lit.config.checks import paths_of
from blip3o_lit.config.data import DataConfig


def token_stores(data: DataConfig) -> dict[str, float | None]:
    """Return the token stores of a run with their weights; None where it has none.

    `data.tokens`, where given, wins over every name; other stores are built first.
    """
    return paths_of("data.tokens", data.tokens) or {_built_store(data): None}


def _built_store(data: DataConfig) -> str:
    if data.name == "linear_gaussian":
        from blip3o_lit.testbeds.linear_gaussian import linear_gaussian_store

        return str(linear_gaussian_store(data.linear_gaussian))
    if data.name == "ambiguous":
        from blip3o_lit.testbeds.ambiguous import ambiguous_store

        return str(ambiguous_store(data.ambiguous))
    from blip3o_lit.extraction.demo import demo_store

    scenes, masked = data.demo, data.name in ("demo_masked", "demo_half_text")
    words = data.name in ("demo_text", "demo_half_text")
    return str(demo_store(scenes.images, scenes.validation_images, masked, words))
