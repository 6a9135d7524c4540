"""From the data group to the token store it names; the demo and the testbeds build themselves."""

from blip3o_lit.config.data import DataConfig


def token_store(data: DataConfig) -> str:
    """Return the folder or URL of the token store, built first where that is our task.

    `data.tokens`, where given, wins over every name.
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

    scenes, masked = data.demo, data.name == "demo_masked"
    return str(demo_store(scenes.images, scenes.validation_images, masked))
