"""A checkpoint as a folder to share: `python -m blip3o_lit.export ckpt=RUN out=DIR`."""

from pathlib import Path

from blip3o_lit.base.words import pasteable
from blip3o_lit.cli.command import run_command
from blip3o_lit.config.commands import ExportConfig

KEPT = "the export may lack files: give the same line again"


def export(config: ExportConfig) -> Path | None:
    """Write config.json, model.safetensors and README.md, and upload them where asked.

    Or, by `format`, graphs that run without this package.
    """
    from blip3o_lit.checkpoints.export import chosen, push, write_export
    from blip3o_lit.checkpoints.load import load

    loaded = load(chosen(config.ckpt, config.ema, config.soup), as_stored=True)
    average = loaded.facts.get("average")
    if average is not None and config.ema is not None:
        print(
            f"ema {average['width']:g}, of {average['stored']} stored averages: "
            f"{average['missed']:.1%} of its profile missed"
        )
    out = Path(config.out) if config.out else None
    if out is not None and config.format != "safetensors":
        from blip3o_lit.checkpoints.graph_export import write_graphs

        for name, inputs in write_graphs(loaded, out, config.format, config.graph_solver).items():
            print(f"graph: {out / name}, of {' and '.join(inputs)}")
    elif out is not None:
        write_export(loaded, out)
        print(f"exported: {out}")
        print(f"next: python -m blip3o_lit.generate {pasteable('ckpt', out)} tokens=DIR out=DIR")
    if config.push_to_hub:
        print(f"uploaded: {push(loaded, config.push_to_hub, config.private)}")
    return out


def main() -> None:
    run_command("export", ExportConfig, export, KEPT)


if __name__ == "__main__":
    main()
