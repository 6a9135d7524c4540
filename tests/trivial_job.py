"""A job of a sweep that costs no training: a known function of its rate, with planned faults.

Called as a launcher's command: overrides, then hydra.run.dir=FOLDER. It writes the files of a run:
metrics.csv as it goes, result.json at its end.
"""

import json
import math
import os
import signal
import sys
import time
from pathlib import Path


def main() -> None:
    values = dict(word.split("=", 1) for word in sys.argv[1:])
    folder = Path(values["hydra.run.dir"])
    rate = math.log10(float(values["optimizer.lr"]))
    fault = {"2": "crash", "5": "nan", "8": "memory"}.get(folder.name)
    if fault == "crash":
        raise RuntimeError("planned crash")
    if fault == "memory":
        os.kill(os.getpid(), signal.SIGKILL)  # What the kernel does when memory runs out.
    best = math.nan if fault == "nan" else 0.9 - (rate + 3) ** 2 / 10
    with (folder / "starts.txt").open("a") as file:
        file.write("start\n")
    lines = ["step,val/cosine\n"]
    for step in (1, 2, 3):
        time.sleep(float(os.environ.get("TRIVIAL_SECONDS", "0")))
        lines.append(f"{step},{best * step / 3}\n")
        (folder / "metrics.csv.tmp").write_text("".join(lines))
        (folder / "metrics.csv.tmp").replace(folder / "metrics.csv")
    result = {"finished": True, "best": {"step": 3, "cosine": best}, "estimator": "mean"}
    if fault == "nan":
        result["best"] = {"step": None, "cosine": None}
    (folder / "result.json.tmp").write_text(json.dumps(result))
    (folder / "result.json.tmp").replace(folder / "result.json")


if __name__ == "__main__":
    main()
