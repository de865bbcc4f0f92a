"""Figures that others published, to be shown beside ours; only what was found, with its source.

A cell that nobody's text at hand holds is None and shown empty."""

from __future__ import annotations

from dataclasses import dataclass

PAPER = "Xiao, Lin and Han, Offsite-Tuning: Transfer Learning without Full Model (arXiv:2302.04870)"
CODE = "the scripts and emulator folders of github.com/mit-han-lab/offsite-tuning"
LATER = "CRaSh (arXiv:2310.15477) and GradOT (arXiv:2507.04455)"


@dataclass(frozen=True)
class TextFigures:
    """WikiText perplexity and mean accuracy (%) over eight tasks in one setting."""

    perplexity: float | None
    mean: float | None


TABLE_1: dict[str, dict[str, TextFigures]] = {
    "OPT-1.3B 2-8-2": {
        "full_zero_shot": TextFigures(31.48, 42.5),
        "full_fine_tuned": TextFigures(12.52, 49.9),
        "ot_emulator": TextFigures(15.54, 46.6),
        "ot_plug_in": TextFigures(13.15, 49.0),
    },
    "GPT2-XL 2-16-2": {"ot_plug_in": TextFigures(14.94, 48.3)},
}
"""The paper's Table 1: two models of a billion parameters, emulators distilled."""

TABLE_2: dict[str, dict[str, TextFigures]] = {
    "OPT-6.7B 2-18-2": {"ot_plug_in": TextFigures(10.78, 53.0)},
    "BLOOM-7.1B 2-12-2": {"ot_plug_in": TextFigures(14.58, 52.1)},
}
"""The paper's Table 2: two larger models, layers dropped and nothing distilled."""

TABLE_3_SPLITS = {"CLIP ViT-H/14": "4-16-4", "EVA-CLIP ViT-g/14": "4-22-4"}
"""The models and splits of the paper's Table 3; its accuracies are not at hand."""
TABLE_3_SETS = ("Flowers", "Cars", "Pets", "Food", "CIFAR-10", "CIFAR-100")

TABLE_4 = {
    "layers dropped uniformly": 46.5,
    "layers dropped by similarity (CRaSh)": 48.4,
    "distilled": 49.0,
    "compressed by gradient (GradOT)": 49.8,
    "full fine-tuning": 49.9,
}
"""OPT-1.3B: the plug-in's mean accuracy (%) over eight tasks, by how the emulator was made."""


@dataclass(frozen=True)
class MethodFigures:
    """Trainable parameters of a tuning method with two adapter layers at each end, as printed."""

    gpt2_xl: str
    opt_1b: str


TABLE_5: dict[str, MethodFigures] = {
    "full": MethodFigures("123M", "201M"),
    "bottleneck": MethodFigures("1.65M", "2.11M"),
    "lora": MethodFigures("410K", "590K"),
    "bitfit": MethodFigures("83K", "106K"),
}
"""The paper's Table 5; its perplexities are not at hand."""


@dataclass(frozen=True)
class Cost:
    """Tokens a second and peak memory (MiB) of a training step: batch 1, length 512, one A6000."""

    tokens_per_s: float
    memory_mib: float


TABLE_6: dict[str, dict[str, Cost]] = {
    "OPT-1.3B": {
        "FT": Cost(1316, 30458),
        "FT+LoRA": Cost(3379, 12470),
        "OT": Cost(5207, 9336),
        "OT+LoRA": Cost(8525, 6192),
    },
    "GPT2-XL": {
        "FT": Cost(957, 39922),
        "FT+LoRA": Cost(1992, 17113),
        "OT": Cost(4905, 8966),
        "OT+LoRA": Cost(6257, 7155),
    },
}
"""The paper's Table 6."""
TABLE_6_STEP = (1, 512)
"""Sequences of a step and tokens of a sequence in it."""

FIGURE_3 = (
    "The paper's Figure 3 varies OPT-1.3B on WikiText-2 without distilling: 2, 4, 6 and 8 adapter layers at the bottom "
    "or at the top, and 1 to 4 at both ends."
)
FIGURE_4 = (
    "The paper's Figure 4 varies OPT-1.3B 2-k-2 on WikiText-2: layers dropped, weights pruned (0 to 99 %), weights "
    "quantized."
)
