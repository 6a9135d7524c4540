"""The words of errors that several kinds of towers share."""

from collections.abc import Iterable

from blip3o_lit.config.errors import UserError, nearest


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def mismatch(error: Exception) -> str:
    """Return the first difference that a failed load_state_dict names, which is its second line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[1:2] or lines[:1])[:200]


def unknown_model(model: str, library: str, models: Iterable[str], advice: str = "") -> UserError:
    guess = nearest(model.partition(".")[0], models)
    hint = f"did you mean towers.*.model={guess}? " if guess else ""
    return UserError(f"towers.*.model={model} is no {library} model: {hint}{advice}".rstrip())


def unknown_weights(weights: str | None, model: str, tags: list[str]) -> UserError:
    guess = nearest(str(weights), tags)
    hint = f"did you mean {guess}? " if guess else ""
    return UserError(
        f"towers.*.pretrained={weights} is neither a file nor a tag of {model}: "
        f"{hint}tags are {', '.join(tags) or 'none'}"
    )
