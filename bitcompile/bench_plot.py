"""A picture of a bench report: what was reached beside the roofs, and where a token's time goes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bitcompile.errors import ToolchainError, UsageError, writing

FORMATS = (".png", ".svg")


def check(path: Path) -> None:
    """Raises UsageError for another kind of file, ToolchainError if matplotlib is missing."""
    if path.suffix.lower() not in FORMATS:
        raise UsageError(f"{path} must end in {' or '.join(FORMATS)}: choose such a name")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ToolchainError('--plot needs matplotlib: pip install "bitcompile[plot]"') from None


def plot(report: Mapping[str, Any], path: Path) -> None:
    """Draw ``report`` (of :func:`bitcompile.bench.bench`) into ``path``, .png or .svg."""
    check(path)
    from matplotlib.figure import Figure

    operators = report.get("operators", [])
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    known = {
        "decode\nof reads": "decode_roof_share",
        "prefill\nof multiplies": "prefill_peak_share",
    }
    shares = {label: report[key] for label, key in known.items() if key in report}
    where = report.get("device") or f"{report['threads']} threads, {report['isa']}"
    left.bar(list(shares), [100 * share for share in shares.values()], color="tab:blue")
    left.axhline(100, color="black", linewidth=0.8)
    left.set_ylabel("% of the machine's roof")
    left.set_title(
        f"{report['decode_tokens_per_s']:.1f} decode, {report['prefill_tokens_per_s']:.0f} prefill "
        f"tokens/s\n{where}",
        fontsize=9,
    )
    if operators:
        names = [row["op"] for row in operators][::-1]
        right.barh(names, [1e3 * row["seconds"] for row in operators][::-1], color="tab:orange")
        right.set_xlabel("ms of a decoded step")
    else:
        right.set_axis_off()
    with writing(path):
        figure.savefig(path, metadata={"Date": None} if path.suffix.lower() == ".svg" else None)
