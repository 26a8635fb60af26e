"""The plugin in every ONNX Runtime it claims to run in: ``python -m tests.matrix``.

Each version gets a virtual environment with that onnxruntime and numpy alone. There every operator
runs as a model of one node, by every variant that this CPU has, and must give the bits that the
NumPy reference gave here. Whole models need ``min_onnxruntime``; the plugin takes older ones.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

VERSIONS = {
    "1.17.3": "numpy<2",
    "1.19.2": "numpy",
    "1.23.2": "numpy",
    "1.28.0": "numpy",
    "": "numpy",
}
"""onnxruntime (none: the newest) to the numpy it was built for."""
IR_VERSION, OPSET = 8, 17
"""What the oldest version reads."""
VARIANTS = ("avx512-vbmi", "avx512-vnni", "avx-vnni", "avx2", "portable")
RUNNER = """
import json, os, sys
import numpy, onnxruntime
folder, library, variants = sys.argv[1], sys.argv[2], sys.argv[3].split(",")
result = {}
for name in sorted(n[:-5] for n in os.listdir(folder) if n.endswith(".onnx")):
    arrays = numpy.load(os.path.join(folder, name + ".npz"))
    expected = arrays["expected"]
    for variant in variants:
        os.environ["BITCOMPILE_ISA"] = variant
        try:
            options = onnxruntime.SessionOptions()
            options.log_severity_level = 4
            options.register_custom_ops_library(library)
            path = os.path.join(folder, name + ".onnx")
            session = onnxruntime.InferenceSession(path, options, ["CPUExecutionProvider"])
            feeds = {k: arrays[k] for k in arrays.files if k != "expected"}
            same = numpy.array_equal(session.run(None, feeds)[0], expected)
            result.setdefault(name, []).append("" if same else "differs")
        except Exception as error:
            if "is not a variant" not in str(error):
                result.setdefault(name, []).append(" ".join(str(error).split())[:120])
print(json.dumps([onnxruntime.__version__, numpy.__version__, result]))
"""


def write_models(folder: Path) -> None:
    """One model an operator, its inputs and what it must give."""
    import onnx

    from bitcompile.custom_ops import OPS
    from tests.fuzz.plugin import node, values
    from tests.single_node import model

    rng = np.random.default_rng(0)
    for name, group_size in [(op, 0) for op in OPS] + [("NormBitLinear", 64)]:
        case = node(name, 300, 70 if name != "BitGLU" else 300, 37, [3, 4], group_size)
        arrays = {k: values(k, entry, rng) for k, entry in case["inputs"].items()}
        fed = {k: arrays[k] for k in ("x", "residual") if k in arrays}
        fixed = {k: v for k, v in arrays.items() if k not in fed}
        op = OPS[name]
        attributes = op.complete(case["attributes"])
        expected = np.asarray(op.reference(arrays, attributes), np.float32)
        made = model(name, attributes, fixed)
        made.ir_version = IR_VERSION
        next(o for o in made.opset_import if not o.domain).version = OPSET
        title = f"{name} g{group_size}" if group_size else name
        onnx.save(made, folder / f"{title}.onnx")
        np.savez(folder / f"{title}.npz", expected=expected, **fed)


def run(version: str, numpy: str, models: Path, library: Path, work: Path) -> list[Any]:
    """``[onnxruntime, numpy, {operator: [error of a variant, empty if none]}]``."""
    venv = work / f"venv-{version or 'newest'}"
    subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    package = f"onnxruntime=={version}" if version else "onnxruntime"
    install = [venv / "bin" / "python", "-m", "pip", "install", "--quiet", package, numpy]
    subprocess.run(install, check=True)
    command = [venv / "bin" / "python", "-c", RUNNER, models, library, ",".join(VARIANTS)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]
        return [version or "newest", numpy, {"loading": [reason[:120]]}]
    return list(json.loads(done.stdout))


def main() -> int:
    """Print a Markdown table; 0 if every cell is good."""
    parser = argparse.ArgumentParser(prog="python -m tests.matrix", description=__doc__)
    parser.add_argument(
        "versions", nargs="*", help="onnxruntime versions [default: oldest to newest]"
    )
    chosen = parser.parse_args().versions or list(VERSIONS)
    from tests.single_node import plugin

    bad = 0
    with tempfile.TemporaryDirectory(prefix="bitcompile-matrix-") as name:
        work = Path(name)
        models = work / "models"
        models.mkdir()
        write_models(models)
        titles = sorted(path.stem for path in models.glob("*.onnx"))
        print(f"| onnxruntime | numpy | {' | '.join(titles)} |\n|{'---|' * (2 + len(titles))}")
        for version in chosen:
            numpy = VERSIONS.get(version, "numpy")
            found, array, results = run(version, numpy, models, plugin(), work)
            cells = [_cell(results.get(t, results.get("loading", ["not run"]))) for t in titles]
            bad += sum(not cell.startswith("equal") for cell in cells)
            print(f"| {found} | {array} | {' | '.join(cells)} |", flush=True)
    return min(bad, 1)


def _cell(errors: list[str]) -> str:
    wrong = [error for error in errors if error]
    return wrong[0] if wrong else f"equal, {len(errors)} variants"


if __name__ == "__main__":
    sys.exit(main())
