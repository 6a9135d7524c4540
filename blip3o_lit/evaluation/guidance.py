"""The curve over guidance scale: every score of one solver by scale, and the best scale of each."""

from typing import Any

from blip3o_lit.config.solver import solver_from_label

BEST = {"named_all": max, "named_digit": max, "recall": max, "similarity": max} | {
    "frechet_token": min,
    "precision": max,
    "recall_of_set": max,
}
"""Scores of the curve, and which value of each is best."""
NAMES = {"recall_of_set": "recall"}
"""Where a score has another name in the evaluation; `recall` there is that of a set's manifold."""


def guidance_curve(labels: list[str], result: dict[str, Any]) -> dict[str, Any]:
    """Return the points of guided estimators and the best scales.

    `recall` is that of captions at 1 from generated tokens, by the read-out of the similarity.
    """
    points = []
    for label in labels:
        solver = solver_from_label(label)
        scores, retrieval = result["estimators"][solver.label], result["retrieval"]
        source = "generated" if solver.label == result["headline"] else solver.label
        by_source = retrieval.get(str(retrieval.get("similarity_by")), retrieval)
        found = by_source.get(source, {}).get("image_to_text", {})
        point = {"scale": solver.guidance_scale, "estimator": solver.label, "nfe": scores["nfe"]}
        values = {
            "recall": found.get("R@1"),
            "similarity": retrieval.get("similarity", {}).get(source),
        }
        for name in BEST:
            if name not in values:
                values[name] = scores.get(NAMES.get(name, name))
        points.append(point | {name: v for name, v in values.items() if v is not None})
    best = {}
    for name, choose in BEST.items():
        known = [point for point in points if name in point]
        if known:
            best[name] = choose(known, key=lambda point: point[name])["scale"]  # noqa: B023
    return {"points": points, "best": best}
