"""The seeds' pickles -> token shards: `python -m blip3o_lit.convert source=PATH out=DIR`."""

from blip3o_lit.base.words import pasteable
from blip3o_lit.cli.command import TOKENS_KEPT, run_command
from blip3o_lit.config.convert import ConvertConfig


def convert(config: ConvertConfig) -> None:
    """Convert, then say what the store holds and how to train on it."""
    from blip3o_lit.seeds.store import convert as run

    index = run(config)
    size = sum(shard.bytes for shard in index.shards) / 1e9
    splits = ", ".join(f"{count:,} {name}" for name, count in sorted(index.splits.items()))
    print(f"{config.out}: {splits}; {len(index.shards)} shards, {size:.2f} GB")
    if index.rejects:
        print(f"{index.rejects} rejected, each with its reason in {config.out}/rejects.jsonl")
    if len(index.splits) < 2:
        print("one split is empty: a store this small needs another validation_fraction or seed")
    tokens = [spec for spec in index.arrays.values() if spec.kind == "tokens"]
    for name, spec in index.arrays.items():
        if spec.cosine is not None:
            print(f"{name} in int8: mean cosine {spec.cosine:.6f} to the tokens of the pickles")
    print("no pictures: pickles hold none, so tokens are drawn with decoder=DIR alone")
    full = "cls_patch" if all(spec.cls for spec in tokens) else "patch_only"
    view = f"mode={index.reduced or full}"
    tokens_word = pasteable("data.tokens", config.out or "")
    print(f"next: python -m blip3o_lit.train data=tokens {tokens_word} {view}")


def main() -> None:
    run_command("convert", ConvertConfig, convert, TOKENS_KEPT)


if __name__ == "__main__":
    main()
