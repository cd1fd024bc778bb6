"""Labels, colours, goals and pictures of every op."""

import dataclasses
import textwrap
from collections.abc import Callable
from typing import Any

from benchmarks.baselines import route_and_mix
from benchmarks.baselines.attention import PROVIDERS as ATTENTION_PROVIDERS
from benchmarks.baselines.encoders import FROZEN
from benchmarks.baselines.mope_baf import PLAIN
from benchmarks.baselines.mope_baf import PROVIDERS as BAF_PROVIDERS
from benchmarks.baselines.window_attention import PROVIDERS as WINDOW_PROVIDERS
from benchmarks.cases import MODES
from benchmarks.cases.models import INFERENCE, TRAINING
from benchmarks.cases.mope_baf import MODES as BAF_MODES
from benchmarks.report.model import Goal, Group, Profile, Ratio, Row, optional, overlap, speed

BOTH = MODES[1]


def like(**wanted: Any) -> Callable[[dict[str, Any]], bool]:
    return lambda info: all(info[name] == value for name, value in wanted.items())


def everywhere(info: dict[str, Any]) -> bool:
    return True


def _gbps(row: Row) -> str:
    return f"{row.gbps:.1f}"


def _copy_share(row: Row) -> str:
    return f"{row.copy_share:.1%}"


def _peak_mib(row: Row) -> str:
    memory = row.info["peak_memory"]
    return optional(None if memory is None else memory / 2**20, "{:.1f}")


def _tflops(row: Row) -> str:
    return f"{row.tflops:.3g}"


def _roofline_share(row: Row) -> str:
    return optional(row.roofline_share, "{:.1%}")


def over_eager(group: Group) -> float | None:
    return speed(group, route_and_mix.EAGER)


def _level_with_eager(group: Group) -> bool:
    return overlap(group, route_and_mix.EAGER)


def _over_compiled(group: Group) -> float | None:
    return speed(group, route_and_mix.COMPILED)


def _our_copy_share(group: Group) -> float | None:
    return None if group.ours is None else group.ours.copy_share


PAPER_SIZE = like(B=64, K=16, L=6, M=768, gram=False)
LARGE_SIZE = like(B=8192, K=16, L=6, M=768, gram=False)
ROUTE_AND_MIX = Profile(
    op="route_and_mix",
    labels={
        "literal": "paper-literal eager",
        "matmul": "matmul eager",
        "literal-compiled": "paper-literal, torch.compile",
        "matmul-compiled": "matmul, torch.compile",
        "mope_fast": "mope_fast",
    },
    colours=dict(zip(route_and_mix.NAMES, ["#b0b7c3", "#6b7a90", "#e3c29b", "#c98a3c", "#1f6fb4"], strict=True)),
    ours="mope_fast",
    peers=tuple(route_and_mix.EAGER),
    peers_text="best eager",
    rivals=lambda group: [*route_and_mix.EAGER, *route_and_mix.COMPILED],
    columns={"GB/s": _gbps, "of copy": _copy_share, "peak MiB": _peak_mib},
    goals=[
        Goal("the best eager form, paper's size", "cuda", BOTH, "replay", PAPER_SIZE, over_eager, 2.5),
        Goal("the best eager form, paper's size", "cuda", BOTH, "called", PAPER_SIZE, over_eager, 1.2),
        Goal("the best torch.compile, paper's size", "cuda", BOTH, "replay", PAPER_SIZE, _over_compiled, 1.5),
        Goal("copy bandwidth, B=8192 K=16", "cuda", "forward", "replay", LARGE_SIZE, _our_copy_share, 0.85),
        Goal("copy bandwidth, B=8192 K=16", "cuda", BOTH, "replay", LARGE_SIZE, _our_copy_share, 0.70),
        *(
            Goal("not slower than the best eager form", "cpu", mode, "called", everywhere, over_eager, 1.0, _level_with_eager)
            for mode in MODES
        ),
    ],
    notes="""\
Every provider's outputs and gradients were checked against float64 before it was timed. GB/s counts each input read
once and each output written once; a share of copy above 100 % means that caches served some of it.""",
    ratios=[
        Ratio("speedup.svg", "Speed of mope_fast over the best eager form", "times the speed of the best eager form", over_eager),
        Ratio(
            "copy_share.svg", "mope_fast: compulsory bytes a second, as a share of a large copy's", "share of copy bandwidth",
            _our_copy_share,
        ),
    ],
    axis_label=lambda case: case.replace(" L=", "\nL=").replace(" gram", "\ngram"),
)  # fmt: skip


def attention_rivals(group: Group) -> list[str]:
    """Return all providers except ``auto`` and the implementation that it chose; mope_fast's SDPA is not the SDPA provider."""
    itself = None if group.ours is None or group.ours.info["implementation"] == "sdpa" else group.ours.info["implementation"]
    return [name for name in group.profile.labels if name not in ("auto", itself)]


def over_rivals(group: Group) -> float | None:
    return speed(group, attention_rivals(group))


def _level_with_rivals(group: Group) -> bool:
    return overlap(group, attention_rivals(group))


NOT_TRITON = [name for name in ATTENTION_PROVIDERS if name not in ("triton", "auto")]


def _triton_lead(group: Group) -> float | None:
    return speed(group, NOT_TRITON, of="triton")


def _triton_level(group: Group) -> bool:
    return overlap(group, NOT_TRITON, of="triton")


def over_mask(group: Group) -> float | None:
    return speed(group, ["sdpa-mask"])


def _level_with_mask(group: Group) -> bool:
    return overlap(group, ["sdpa-mask"])


def _our_roofline_share(group: Group) -> float | None:
    return None if group.ours is None else group.ours.roofline_share


def _memory_saved(group: Group) -> float | None:
    sdpa = group.rows.get("sdpa")
    return None if sdpa is None or group.ours is None else sdpa.info["peak_memory"] / group.ours.info["peak_memory"]


def not_slower(mode: str, timing: str) -> Goal:
    text = "auto not slower than the best other"
    return Goal(text, "cuda", mode, timing, everywhere, over_rivals, 1.0, _level_with_rivals, summary=True)


def triton_first(mode: str) -> Goal:
    text = "triton the fastest, S <= 512"
    return Goal(text, "cuda", mode, "replay", lambda info: info["S"] <= 512, _triton_lead, 1.0, _triton_level, summary=True)


def not_more_memory(mode: str) -> Goal:
    text = "memory of SDPA, mask only where needed, over ours"
    return Goal(text, "cuda", mode, "called", everywhere, _memory_saved, 1.0, summary=True)


def not_slower_on_cpu(mode: str) -> Goal:
    text = "not slower than SDPA with a mask"
    return Goal(text, "cpu", mode, "called", everywhere, over_mask, 1.0, _level_with_mask, summary=True)


class _AttentionProfile(Profile):
    def label(self, row: Row) -> str:
        name = super().label(row)
        return f"{name} ({row.info['implementation']})" if row.info["provider"] == self.ours else name


def _attention(op: str, own_goals: list[Goal]) -> Profile:
    return _AttentionProfile(
        op=op,
        labels={
            "sdpa": "SDPA, mask only where needed",
            "sdpa-mask": "SDPA with a boolean mask",
            "flex": "FlexAttention",
            "xformers-bias": "xformers with a tensor bias",
            "xformers": "mope_fast xformers",
            "triton": "mope_fast triton",
            "auto": "mope_fast auto",
        },
        colours=dict(
            zip(
                ATTENTION_PROVIDERS,
                ["#6b7a90", "#b0b7c3", "#c98a3c", "#a9c9a4", "#5f9a57", "#8fb8de", "#1f6fb4"],
                strict=True,
            )
        ),
        ours="auto",
        peers=("sdpa-mask",),
        peers_text="SDPA with mask",
        rivals=attention_rivals,
        columns={"GB/s": _gbps, "TFLOP/s": _tflops, "of roofline": _roofline_share, "peak MiB": _peak_mib},
        goals=[
            *(not_slower(mode, timing) for mode in MODES for timing in ("replay", "called")),
            *(triton_first(mode) for mode in MODES),
            *own_goals,
            *(not_more_memory(mode) for mode in MODES),
            *(not_slower_on_cpu(mode) for mode in MODES),
        ],
        notes="""\
Every provider's outputs and gradients were checked against float64 before it was timed. GB/s counts each input read once and
each output written once, TFLOP/s the products over pairs of a query and a key that it sees. Of roofline: the larger of the shares
of the copy bandwidth and of the peak of arithmetic.""",
        ratios=[
            Ratio("speedup.svg", "Speed of mope_fast auto over the best other", "times the best other's speed", over_rivals),
            Ratio("speedup_mask.svg", "Speed of mope_fast auto over SDPA with a mask", "times its speed", over_mask),
            Ratio("roofline_share.svg", "mope_fast auto: share of the roofline", "share of the roofline", _our_roofline_share),
        ],
        axis_label=lambda case: textwrap.fill(case, 14, break_on_hyphens=False),
    )  # fmt: skip


PROMPT_ATTENTION = _attention(
    "prompt_attention",
    [
        Goal(
            "share of the roofline, ViT-B B=64", "cuda", "forward", "replay", like(model="ViT-B", B=64, gradients="all"),
            _our_roofline_share, 0.5,
        )
    ],
)  # fmt: skip
RECEPTIVE_FIELD_ATTENTION = _attention(
    "receptive_field_attention",
    [
        Goal(
            "SDPA with a mask, VLMo B=64", "cuda", mode, "replay", like(model="VLMo-B+", B=64, Dh=34, ragged=False), over_mask, 1.5
        )
        for mode in MODES
    ],
)  # fmt: skip


def prompted_rivals(group: Group) -> list[str]:
    return [name for name in attention_rivals(group) if WINDOW_PROVIDERS[name].prompted]


def over_prompted(group: Group) -> float | None:
    return speed(group, prompted_rivals(group))


def over_timm(group: Group) -> float | None:
    return speed(group, ["timm"])


def not_slower_in_windows(mode: str, timing: str, device_type: str) -> list[Goal]:
    """Return goals to be not slower than other providers with prompts, and than a frozen Swin without prompts."""
    rivals: dict[str, Callable[[Group], list[str]]] = {
        "auto not slower than the best other with prompts": prompted_rivals,
        "auto not slower than timm on SDPA without prompts": lambda group: ["timm"],
        "auto not slower than timm's default without prompts": lambda group: ["timm-eager"],
    }

    def goal(text: str, names: Callable[[Group], list[str]]) -> Goal:
        def over(group: Group) -> float | None:
            return speed(group, names(group))

        def level(group: Group) -> bool:
            return overlap(group, names(group))

        def fits(info: dict[str, Any]) -> bool:
            return info["gradients"] == "all" or names is prompted_rivals

        return Goal(text, device_type, mode, timing, fits, over, 1.0, level, summary=True)

    return [goal(*each) for each in rivals.items()]


WINDOW_PROMPT_ATTENTION = dataclasses.replace(
    PROMPT_ATTENTION,
    op="window_prompt_attention",
    labels={
        "timm": "timm on SDPA, no prompts",
        "timm-eager": "timm's default, no prompts",
        "sdpa-concat": "SDPA, prompts in every window",
        "flex": "FlexAttention, prompts in every window",
        "triton": "mope_fast triton",
        "auto": "mope_fast auto",
    },
    colours=dict(zip(WINDOW_PROVIDERS, ["#6b7a90", "#b0b7c3", "#e3c29b", "#c98a3c", "#8fb8de", "#1f6fb4"], strict=True)),
    peers=("timm",),
    peers_text="timm on SDPA",
    goals=[
        *(goal for mode in MODES for timing in ("replay", "called") for goal in not_slower_in_windows(mode, timing, "cuda")),
        *(goal for mode in MODES for goal in not_slower_in_windows(mode, "called", "cpu")),
    ],
    notes=f"""\
{PROMPT_ATTENTION.notes} Providers without prompts do less work, but
are given the same counts. All but FlexAttention and mope_fast get the projection of windows, and move the image's tokens into
windows before it.""",
    ratios=[
        Ratio("speedup.svg", "Speed of mope_fast auto over the best other with prompts", "times its speed", over_prompted),
        Ratio("speedup_timm.svg", "Speed of mope_fast auto over timm on SDPA, without prompts", "times its speed", over_timm),
        Ratio("roofline_share.svg", "mope_fast auto: share of the roofline", "share of the roofline", _our_roofline_share),
    ],
)


def tax_of(provider: str) -> Callable[[Group], float | None]:
    return lambda group: group.rows[provider].info["tax"] if provider in group.rows else None


def at_most(
    bound: float, provider: str, device_type: str, mode: str, timing: str, model: str, batch: int, closing: str = ""
) -> Goal:
    def level(group: Group) -> bool:
        return group.rows[provider].info["tax_low"] <= bound

    text, fits = f"tax of {END_TO_END_LABELS[provider]}, {model} B={batch}", like(model=model, B=batch, S=TOKENS[model])
    return Goal(text, device_type, mode, timing, fits, tax_of(provider), bound, level, at_most=True, closing=closing)


def over_literal(group: Group) -> float | None:
    """Return the paper-literal form's time relative to ours; both are relative to the frozen encoder, timed in turns with them."""
    literal = group.rows.get("paper-literal")
    return None if literal is None or group.ours is None else literal.info["tax"] / group.ours.info["tax"]


def faster_than_literal(bound: float, device_type: str, model: str, closing: str) -> Goal:
    def level(group: Group) -> bool:
        return group.rows["paper-literal"].info["tax_high"] / group.ours.info["tax_low"] >= bound

    text, fits = f"times the speed of paper-literal, {model} B=16", like(model=model, B=16, S=TOKENS[model])
    return Goal(text, device_type, TRAINING, "called", fits, over_literal, bound, level, closing=closing)


END_TO_END_LABELS = {
    "frozen": "frozen encoder",
    "frozen-compiled": "frozen encoder compiled",
    "frozen-sdpa": "frozen encoder with SDPA",
    "paper-literal": "paper-literal",
    "concatenated": "prompts as tokens",
    "mope_fast": "mope_fast",
    "mope_fast-compiled": "mope_fast compiled",
    "folded": "mope_fast folded",
    "folded-compiled": "mope_fast folded, compiled",
    "checkpointed": "mope_fast, checkpointing",
    "head-only": "head only",
    "vpt-deep": "VPT-deep, as tokens",
    "lora": "LoRA r=8",
    "full": "full fine-tuning",
    "side": "complementary encoder alone",
}
FEWER_KERNELS = "fewer small kernels per layer; notes/end_to_end.md lists them under 'What to try'"
CPU_ATTENTION = (
    "an attention for CPUs that takes prompts' keys and values without a concatenation, and that is as fast for any number of keys "
    "as for a multiple of 16; torch's SDPA does neither"
)
OUT_OF_PYTHON = (
    "a CUDA graph or torch.compile(mode='reduce-overhead'): small batches wait for Python, and paper-literal can't be captured"
)
SHARED_WORK = (
    "nothing in this package: paper-literal adds less to the frozen encoder's step than the goal requires us to save, and most of "
    "that is saved already; the rest is the encoder, which both run"
)
VIT_BERT, SWIN = ("ViT-B/16", "BERT-B"), "Swin-B/224"
TOKENS = {"ViT-B/16": 197, "BERT-B": 128, SWIN: 3136}
"""Number of tokens of the models in goals and in the README's table."""
END_TO_END = Profile(
    op="end_to_end",
    labels=END_TO_END_LABELS,
    colours=dict(
        zip(
            END_TO_END_LABELS,
            [
                "#6b7a90", "#b0b7c3", "#3d4757", "#b2182b", "#8c6bb1", "#1f6fb4", "#8fb8de", "#2a9d8f", "#9bd5cc", "#5f9a57",
                "#dddddd", "#c9b3dd", "#e3c29b", "#c98a3c", "#eeeeaa",
            ],
            strict=True,
        )
    ),
    ours="mope_fast",
    peers=(FROZEN,),
    peers_text="frozen encoder",
    rivals=lambda group: ["paper-literal", "concatenated", "vpt-deep", "lora"],
    columns={},
    goals=[
        *(at_most(1.02, "folded", "cuda", INFERENCE, "replay", model, 64, FEWER_KERNELS) for model in VIT_BERT),
        *(at_most(1.05, "mope_fast", "cuda", INFERENCE, "replay", model, 64, FEWER_KERNELS) for model in VIT_BERT),
        *(at_most(1.05, "mope_fast", "cuda", TRAINING, "replay", model, 64, FEWER_KERNELS) for model in VIT_BERT),
        *(
            at_most(1.03, name, "cpu", INFERENCE, "called", model, 8, CPU_ATTENTION)
            for name in ("folded", "mope_fast")
            for model in VIT_BERT
        ),
        *(at_most(1.05, "mope_fast", "cpu", TRAINING, "called", model, 8, CPU_ATTENTION) for model in VIT_BERT),
        *(at_most(1.0, name, "cuda", INFERENCE, "replay", SWIN, 64, FEWER_KERNELS) for name in ("folded", "mope_fast")),
        at_most(1.0, "mope_fast", "cuda", TRAINING, "replay", SWIN, 64, FEWER_KERNELS),
        *(at_most(0.95, name, "cpu", INFERENCE, "called", SWIN, 8) for name in ("folded", "mope_fast")),
        at_most(1.05, "mope_fast", "cpu", TRAINING, "called", SWIN, 8),
        *(faster_than_literal(bound, "cuda", model, OUT_OF_PYTHON) for bound, model in ((3.0, SWIN), (2.0, "ViT-B/16"))),
        *(faster_than_literal(1.2, "cpu", model, SHARED_WORK) for model in (SWIN, "ViT-B/16")),
    ],
    notes="""\
Time: relative to the frozen encoder, timed before and after every round; the median over rounds and, in brackets, the 20th and
80th percentile. The frozen encoder's own row is a second copy of it: its difference from 1 is the resolution. Memory: a step's
peak beyond weights and inputs, relative to the frozen encoder's (and in MiB). Inference is a forward pass; training is forward,
backward and all trained parameters' gradients, without the optimizer. All have the same linear head. Logits, loss and gradients
were checked before timing. **The frozen encoder's training step goes back through every layer down to the embedding. Head only
never goes back into the encoder: it is the cost of training without anything added inside the encoder.** The
complementary encoder is in none of the others. **A frozen Swin is timm's with default settings: its attention in windows is plain
products and softmax. A separate row has timm's SDPA option turned on.** The paper-literal form can't go into a CUDA graph.""",
    ratios=[
        Ratio("speedup_literal.svg", "Speed of mope_fast over the paper-literal form", "times its speed", over_literal),
    ],
    axis_label=lambda case: textwrap.fill(case, 14, break_on_hyphens=False),
    title="MoPE in a frozen encoder",
    baseline=FROZEN,
)  # fmt: skip


def _launches(row: Row) -> str:
    return str(row.info["launches_a_layer"])


HOST = dataclasses.replace(
    END_TO_END,
    op="host",
    columns={"launches a layer": _launches},
    goals=[],
    notes="""\
Twelve layers of width 32, so that the time of calling them dominates. Time is relative to the frozen encoder, timed in turns; the
median over rounds and, in brackets, the 20th and 80th percentile. Launches are a forward's operations that do work on this device,
for one layer with everything that the row adds to it; on a CPU the op of a layer's prompts consists of torch's own operations.""",
    ratios=[],
    title="What prompts cost the host",
)  # fmt: skip


def _excess(group: Group) -> float | None:
    return None if group.ours is None else group.ours.info["excess"]


def tokens_cost_no_more(bound: float, device_type: str, mode: str, timing: str, batch: int) -> Goal:
    def level(group: Group) -> bool:
        return group.ours.info["tax_low"] / group.ours.info["token_ratio"] <= bound

    fits = like(model="VLMo-B+", B=batch)
    return Goal(f"time / tokens, VLMo-B+ B={batch}", device_type, mode, timing, fits, _excess, bound, level, at_most=True)


def over_unrestricted(group: Group) -> float | None:
    other = group.rows.get("unrestricted")
    return None if group.ours is None or other is None else group.ours.info["tax"] / other.info["tax"]


def restriction_is_free(device_type: str, mode: str, timing: str) -> Goal:
    def level(group: Group) -> bool:
        return group.ours.info["tax_low"] <= group.rows["unrestricted"].info["tax_high"]

    text = "restricted over unrestricted fields"
    return Goal(text, device_type, mode, timing, everywhere, over_unrestricted, 1.0, level, summary=True, at_most=True)


MOPE_BAF = Profile(
    op="mope_baf",
    labels={
        "plain": "plain VLMo",
        "plain-compiled": "plain VLMo compiled",
        "mope_fast": "mope_fast",
        "mope_fast-compiled": "mope_fast compiled",
        "triton": "mope_fast triton",
        "xformers": "mope_fast xformers",
        "sdpa-mask": "explicit mask, SDPA",
        "flex": "FlexAttention",
        "xformers-bias": "xformers with a tensor bias",
        "unrestricted": "mope_fast, unrestricted",
        "one-block": "mope_fast, one block",
    },
    colours=dict(
        zip(
            BAF_PROVIDERS,
            [
                "#6b7a90", "#3d4757", "#1f6fb4", "#12436d", "#8fb8de", "#5f9a57", "#b0b7c3", "#c98a3c", "#a9c9a4", "#e3c29b",
                "#8c6bb1",
            ],
            strict=True,
        )
    ),
    ours="mope_fast",
    peers=(PLAIN,),
    peers_text="plain VLMo",
    rivals=lambda group: ["sdpa-mask", "flex", "xformers-bias"],
    columns={},
    goals=[
        *(tokens_cost_no_more(1.03, "cuda", mode, timing, 32) for mode in BAF_MODES for timing in ("replay", "called")),
        *(restriction_is_free("cuda", mode, timing) for mode in BAF_MODES for timing in ("replay", "called")),
        *(tokens_cost_no_more(1.03, "cpu", mode, "called", 8) for mode in BAF_MODES),
        *(restriction_is_free("cpu", mode, "called") for mode in BAF_MODES),
    ],
    notes="""\
Time: relative to the plain VLMo, timed before and after every round; the median over rounds and, in brackets, the 20th and 80th
percentile. The plain VLMo's own row is a second copy of it: its difference from 1 is the resolution. Tokens: the length of a
layer's sequence relative to the plain VLMo's, the mean over layers; time / tokens is time divided by that. Memory: a step's
peak beyond weights and inputs, relative to the plain VLMo's (and in MiB). Training is forward, backward and the gradients of all
trained parameters, without the optimizer; training-frozen is the same with the VLMo frozen, where the plain one's gradients go down
to its embedding but to no weight. Logits, loss and every gradient were checked before timing.""",
    ratios=[],
    axis_label=lambda case: textwrap.fill(case, 14, break_on_hyphens=False),
    title="MoPE-BAF in a VLMo",
    baseline=PLAIN,
    table_per_mode=True,
)  # fmt: skip
PROFILES = {
    profile.op: profile
    for profile in (
        ROUTE_AND_MIX, PROMPT_ATTENTION, RECEPTIVE_FIELD_ATTENTION, WINDOW_PROMPT_ATTENTION, END_TO_END, HOST, MOPE_BAF,
    )
}  # fmt: skip
