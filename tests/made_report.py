"""An evaluation as the report reads it, and a page as a browser does."""

from html.parser import HTMLParser

PICTURE = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAQAAAC1HAwCAAAAC0lEQVR42mNk+A8AAQUBAScY"
    "42YAAAAASUVORK5CYII="
)


HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&"


VOID = {"meta", "link", "img", "br", "hr", "input"}


def scores(cosine: float, frechet: float, **more: object) -> dict:
    return {
        "images": 512,
        "cosine": cosine,
        "cosine_ci95": [cosine - 0.0012, cosine + 0.0011],
        "cosine_centred": cosine - 0.0912,
        "cosine_pooled": cosine + 0.0083,
        "cosine_cls": cosine - 0.0317,
        "image_std": 0.0123,
        "p5": cosine - 0.0333,
        "p50": cosine + 0.0005,
        "p95": cosine + 0.0071,
        "above_0.7": 1.0,
        "above_0.8": 0.984,
        "above_0.9": 0.914,
        "mse": 0.31 * (1 - cosine),
        "r2": 1 - 4 * (1 - cosine),
        "norm_ratio": 0.9713,
        "frechet": frechet,
        **more,
    }


def evaluation() -> dict:
    curve = [
        {
            "solver": solver,
            "nfe": steps * cost,
            "images": 64,
            "cosine": 0.952 + 0.022 / (steps * cost) - 0.001 * cost,
            "frechet": 0.4 + 1.6 / (steps * cost),
            "seconds_per_image": 0.004 * steps * cost,
        }
        for solver, cost in (("euler", 1), ("heun", 2), ("rk4", 4))
        for steps in (1, 2, 4, 8)
    ]
    recall = {"image_to_text": {"R@1": 0.613, "R@5": 0.917}, "text_to_image": {"R@1": 0.551}}
    return {
        "split": "validation",
        "images": 512,
        "mode": "cls_patch",
        "tokens": "77ab01c2d3e4f5" * 4,
        "checkpoint": "3f2a91c0bb77aa01" * 4,
        "headline": "mean",
        "estimators": {
            "heun-10": scores(0.9532, 0.4837, nfe=20),
            "mean": scores(0.9741, 1.9312, nfe=1, psnr=28.41, psnr_thumbnail=26.72),
        },
        "baselines": {
            "mean_token": scores(0.7512, 14.23),
            "mlp": scores(0.8893, 4.417),
            "regression": scores(0.9862, 1.213),
            "ridge": scores(0.8417, 6.144),
        },
        "frechet_floor": {"frechet": 0.2223},
        "nfe_curve": curve,
        "position_cosine": [[0.9 + 0.0001 * (16 * i + j) for j in range(16)] for i in range(16)],
        "retrieval": {"read_out": "cls", "generated": recall, "true": recall},
        "verdict": "excellent",
        "standing": "excellent by the seeds' thresholds, below noise-free transformer",
        "zero_shot": {
            "classes": 10,
            "images": 130,
            "chance": 0.1,
            "tower": {"generated": {"top1": 0.4321, "agreement": 0.81}, "true": {"top1": 0.4432}},
        },
        "drawings": {
            "images": 64,
            "split": "validation",
            "by": "linear read-out of the training split",
            "ceiling": 33.87,
            "hidden_half": {
                "shares": {
                    "true": {"digit": 0.9219, "nothing": 0.0625, "specks": 0.0156},
                    "mean": {"digit": 0.1094, "nothing": 0.2031, "specks": 0.6875},
                },
                "reader_on_true_tokens": {"digit": 0.9712, "nothing": 0.9955},
                "draws": {
                    "samples": 4,
                    "images": 16,
                    "different_halves": 2.3125,
                    "different_halves_of_as_many_true_images": 3.9375,
                },
            },
            "rows": [
                {
                    "title": f"{kind}: img-{kind}",
                    "drawings": [
                        {"label": "picture", "picture": PICTURE},
                        {"label": "true tokens", "picture": PICTURE},
                        {"label": "mean", "picture": PICTURE, "cosine": 0.9876},
                        {"label": "sample 1", "picture": PICTURE, "cosine": 0.9765},
                        {"label": "sample 2", "picture": PICTURE, "cosine": 0.9754},
                    ],
                }
                for kind in ("best", "median", "worst")
            ],
        },
        "samples": {
            "solver": "heun-10",
            "images": 48,
            "coverage": 0.6123,
            "coverage_expected": 0.6667,
            "pairwise_cosine": 0.9444,
        },
        "time_bins": [{"t": [0.0, 0.5], "loss": 0.3131}, {"t": [0.5, 1.0], "loss": 0.1414}],
        "paired": {
            "run": "rival",
            "cosine": {"mean": {"difference": 0.0123, "ci95": [0.01, 0.02], "p_value": 0.0009}},
        },
        "against": {
            "mean": {
                "regression": {"difference": -0.0121, "ci95": [-0.013, -0.0117], "images": 512}
            }
        },
        "swapped": {"images": 64, "random_pairs": 0.7111, "mean": 0.7222},
        "worst": [{"key": "img-7", "cosine": 0.7007, "caption": "a red seven", "source": "s7"}],
        "examples": {
            "best": [{"key": "img-1", "cosine": 0.9911, "caption": "one", "picture": PICTURE}],
            "worst": [{"key": "img-7", "cosine": 0.7007, "caption_generated": "a two"}],
        },
        "position_std": [[0.01 + 0.001 * j for j in range(16)] for _ in range(16)],
        "surprise": {"depth": {"answer": 42.5}},
    }


class Page(HTMLParser):
    """Elements, text outside scripts and styles, and the nesting of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.open: list[str] = []
        self.data: dict[str, str] = {}
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("script", "style"):
            identifier = self.elements[-1][1].get("id")
            if identifier:
                self.data[identifier] = self.data.get(identifier, "") + data
        else:
            self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.elements if name == tag]
