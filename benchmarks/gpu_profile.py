"""Where the time of a step goes, by kernel and by what kernels are for. Used by `gpu_train.py --profile`."""

from __future__ import annotations

import functools
import re
from collections import Counter
from pathlib import Path

#: Steps that a profile is of.
PROFILED_STEPS = 2
#: Gaps that are told one by one, the largest; and microseconds of those that are but a launch.
GAPS, SHORT_US = 12, 20.0
#: What the kernels of a file in deltaw/kernels are for; the others are elementwise.
OWN_GROUPS = {"nf4": "dequantise", "fp8": "dequantise", "low_rank": "low-rank"}
#: What a kernel is for, by the first pattern that its name has.
GROUPS = {
    "dequantise": r"nf4|dequant|quantize",
    "low-rank": r"project|outer_sum|low_rank",
    "attention": r"flash|fmha|attention|sdpa|attn",
    "optimizer": r"adam|optimizer|multi_tensor|foreach",
    "GEMM": r"gemm|nvjet|cutlass|wgmma|xmma|cublas|splitk|::\w*mm_?$|matmul|::linear$",
    "copies": r"memcpy|memset|aten::_?(?:to_)?copy_?$",
    "elementwise": r"elementwise|norm|rotat|rotar|rope|gated|swiglu|silu|gelu|softmax|cross_entropy|loss|reduce|triton_"
    r"|index|embedding|cat|aten::(?:add|mul|neg|pow|rsqrt|mean|sub|div|cos|sin|sum|where|fill_|zero_)",
}


def profile_of(profiler, wall_s: float, cuda: bool) -> dict:
    """Shares of the wall time: by group, by kernel, and of gaps, in which nothing ran."""
    times: Counter[str] = Counter()
    spans: list[tuple[float, float, str]] = []
    if cuda:
        for event in profiler.events():
            # Ranges that programs name appear on the device's track too.
            if "CUDA" in str(event.device_type) and not event.is_user_annotation:
                times[event.name] += event.time_range.elapsed_us()
                spans.append((event.time_range.start, event.time_range.end, event.name))
    else:
        for event in profiler.key_averages():
            times[event.key] += event.self_cpu_time_total
    busy, until, last = (0.0, float("-inf"), "") if cuda else (float(sum(times.values())), 0.0, "")
    gaps: list[tuple[float, str, str]] = []
    for begin, end, name in sorted(spans):
        busy += max(0.0, end - max(begin, until))
        if last and begin > until:
            gaps.append((begin - until, last, name))
        if end > until:
            until, last = end, name
    wall = wall_s * 1e6
    groups = dict.fromkeys(("GEMM", "attention", "elementwise", "low-rank", "dequantise", "optimizer"), 0.0)
    for name, spent in times.items():
        group = group_of(name)
        groups[group] = groups.get(group, 0.0) + spent / wall
    kernels = [[name[:100], group_of(name), spent / wall] for name, spent in times.most_common(25)]
    return {
        "groups": groups,
        "gaps": max(0.0, 1 - busy / wall),
        "short_gaps": sum(gap for gap, *_ in gaps if gap < SHORT_US) / wall,
        "largest_gaps": [[gap / wall, one[:60], two[:60]] for gap, one, two in sorted(gaps)[: -GAPS - 1 : -1]],
        "kernels": kernels,
    }


@functools.cache
def own_kernels() -> dict[str, str]:
    """What the Triton kernels here are for, by their functions' names."""
    import deltaw.kernels

    found: dict[str, str] = {}
    for file in sorted(Path(deltaw.kernels.__path__[0]).glob("*_triton.py")):
        group = OWN_GROUPS.get(file.name.removesuffix("_triton.py"), "elementwise")
        found |= dict.fromkeys(
            re.findall(r"^def (\w+_kernel)\(", file.read_text(encoding="utf-8"), re.MULTILINE), group
        )
    return found


def group_of(kernel: str) -> str:
    """What a kernel is for."""
    if kernel in own_kernels():
        return own_kernels()[kernel]
    return next((group for group, names in GROUPS.items() if re.search(names, kernel, re.IGNORECASE)), "other")


def profile_table(name: str, found: dict) -> str:
    """A row's profile as Markdown."""
    lines = [f"\n{name}: share of the time of {PROFILED_STEPS} steps under the profiler\n", "| | |", "|---|---|"]
    lines += [f"| {group} | {share:.1%} |" for group, share in found["groups"].items()]
    lines += [f"| gaps | {found['gaps']:.1%} |", f"| of them under {SHORT_US:g} us each | {found['short_gaps']:.1%} |"]
    if found["largest_gaps"]:
        lines += ["", "| largest gaps | after | before |", "|---|---|---|"]
        lines += [f"| {share:.2%} | `{before}` | `{after}` |" for share, before, after in found["largest_gaps"]]
    lines += ["", "| kernel | group | share |", "|---|---|---|"]
    lines += [f"| `{kernel}` | {group} | {share:.1%} |" for kernel, group, share in found["kernels"]]
    return "\n".join(lines)
