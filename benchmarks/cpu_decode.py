"""Sparse beside stock llama.cpp on the CPU: synthetic models of real shapes, interleaved, same file, same threads.

    python benchmarks/cpu_decode.py --quick --jsonl rows.jsonl
    python benchmarks/cpu_decode.py --shapes llama2-7b mistral-7b --types Q4_0 Q8_0 F16 Q4_K_M --jsonl rows.jsonl
    python benchmarks/cpu_decode.py --jsonl rows.jsonl --plot docs/images/cpu-decode.png

Whole models where they fit (llama2-7b and mistral-7b in 4 bits), else cuts of 6 layers; --quick cuts everything and
takes shorter tests, about ten minutes on two cores. A GGUF may stand among the shapes. Rows are those of
`prosparse-pipe bench`.
"""

import argparse
import json
import tempfile
from pathlib import Path

from synthetic_model import SHAPES, file_name, write_model

from prosparse_pipe.bench import run_bench
from prosparse_pipe.hardware import usable_cores

CUT = 6  # layers
WHOLE_BYTES = 5 << 30  # a file of at most this size is not cut
BITS = {"F16": 16, "BF16": 16, "Q8_0": 8.5, "Q6_K": 6.56, "Q5_0": 5.5, "Q5_1": 6, "Q5_K_M": 5.7, "Q4_K_M": 4.85}


def layers_of(name: str, kind: str, quick: bool) -> int:
    """All layers if the whole file is small enough, else a cut."""
    shape = SHAPES[name]
    weights = shape.n_layer * shape.n_embd * (3 * shape.n_ff + 2 * shape.n_embd * (1 + shape.n_head_kv / shape.n_head))
    whole = weights * BITS.get(kind, 4.5) / 8 <= WHOLE_BYTES
    return shape.n_layer if whole and not quick else CUT


def measure(path: Path, arguments: argparse.Namespace) -> None:
    """Appends the rows of one file."""
    quick = arguments.quick
    kwargs = {"n_batch": 512, "flash_attn": False}
    rows = run_bench(
        path,
        [128 if quick else 512],
        [32 if quick else 128],
        [arguments.threads],
        3 if quick else arguments.repetitions,
        kwargs,
        parallel_sizes=[8],
    )
    for row in rows:
        row["bench"] = "benchmarks/cpu_decode.py"
        with open(arguments.jsonl, "a") as file:
            file.write(json.dumps(row) + "\n")
        print(
            f"{row['shape']} {row['file_type']} {row['test']}: {row['value']} against {row['peer_value']} tok/s,"
            f" {row['ratio']}x at {row['sparsity']:.1%}",
            flush=True,
        )


def plot(rows: list[dict], target: Path) -> None:
    """Ratio to stock by shape and type, a panel for each kind of test."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    kinds = [kind for kind in ("tg", "par", "pp") if any(row["test"].startswith(kind) for row in rows)]
    titles = {"tg": "decode", "par": "8 parallel sequences", "pp": "prefill"}
    models = list(dict.fromkeys(row["shape"].replace(" synthetic", "") for row in rows))
    types = list(dict.fromkeys(row["file_type"] for row in rows))
    figure, axes = pyplot.subplots(1, len(kinds), figsize=(4.5 * len(kinds), 1 + 0.9 * len(models)), sharey=True)
    for axis, kind in zip([axes] if len(kinds) == 1 else axes, kinds, strict=True):
        for i, file_type in enumerate(types):
            found = {
                row["shape"].replace(" synthetic", ""): row["ratio"]
                for row in rows
                if row["file_type"] == file_type and row["test"].startswith(kind)
            }
            places = [models.index(model) + (i - (len(types) - 1) / 2) * 0.8 / len(types) for model in found]
            bars = axis.barh(places, list(found.values()), 0.75 / len(types), label=file_type)
            axis.bar_label(bars, fmt="%.2f", fontsize=7, padding=2)
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set_title(titles[kind])
        axis.set_xlabel("speed, stock llama.cpp = 1")
        axis.set_yticks(range(len(models)), models)
        axis.margins(x=0.15)
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=len(types), frameon=False)
    machine = rows[-1]["machine"]
    figure.suptitle(f"{machine['cpu']}, {rows[-1]['threads']} threads", fontsize=9)
    figure.set_layout_engine("constrained")
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", help=f"of {', '.join(SHAPES)}, or .gguf files")
    parser.add_argument("--types", nargs="+", default=["Q4_0", "Q8_0", "F16", "Q4_K_M"])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--models", type=Path, help="folder that keeps the synthetic models; default: none is kept")
    parser.add_argument("--jsonl", type=Path, required=True, help="rows are appended to it")
    parser.add_argument("--plot", type=Path, help="draw the rows of --jsonl and measure nothing")
    arguments = parser.parse_args()
    if arguments.plot:
        plot([json.loads(line) for line in arguments.jsonl.read_text().splitlines()], arguments.plot)
        return
    shapes = arguments.shapes or (["llama2-7b", "mistral-7b"] if arguments.quick else list(SHAPES))
    with tempfile.TemporaryDirectory() as temporary:
        for name in shapes:
            if name.endswith(".gguf"):
                measure(Path(name), arguments)
                continue
            for kind in arguments.types:
                n_layer = layers_of(name, kind, arguments.quick)
                path = (arguments.models or Path(temporary)) / file_name(name, kind, n_layer)
                if not path.exists():
                    write_model(path, name, SHAPES[name], kind, n_layer)
                measure(path, arguments)
                if arguments.models is None:
                    path.unlink()


if __name__ == "__main__":
    main()
