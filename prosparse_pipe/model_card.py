"""The README.md of a run: a model card with the numbers."""

from pathlib import Path

from prosparse_pipe.atomic import atomic_path
from prosparse_pipe.checkpoint import SparseInfo


def write_model_card(run: Path, info: SparseInfo) -> Path:
    """Writes run/README.md from what the checkpoint says of itself."""
    provenance, evaluation = info.provenance, info.evaluation
    config = provenance["config"]
    name = f"{provenance['base_model']}-ProSparse"
    layers = "\n".join(
        "| " + " | ".join(f"{il}: {sparsity:.1%}" for il, sparsity in row) + " |"
        for row in _rows(list(enumerate(info.sparsity)), 6)
    )
    schedule = config["schedule"]
    if config["schedule_scale"] != 1:
        schedule = f"{schedule}, every λ times {config['schedule_scale']:g}"
    text = f"""---
base_model: {provenance["base_model"]}
library_name: transformers
pipeline_tag: text-generation
tags: [prosparse, relu, sparse, gguf]
---
# {name}

{provenance["base_model"]} with ReLU feed-forward networks, trained with ProSparse (arXiv 2402.13516) to leave most
neurons at zero. A runtime that knows it reads only the active ones.

| on {evaluation["tokens"]:,} tokens, {evaluation["text"]} | perplexity | sparsity of x1 |
| --- | --- | --- |
| dense | {evaluation["perplexity_dense"]:.2f} | 0 |
| ReLU substituted, untrained | {evaluation["perplexity_substituted"]:.2f} | {evaluation["sparsity_substituted"]:.1%} |
| **this model** | **{evaluation["perplexity"]:.2f}** | **{sum(info.sparsity) / len(info.sparsity):.1%}** |

- Activation: {info.activation}, threshold {info.threshold:g} on the gate; the row is measured with it. Plain
  transformers computes ReLU without it: somewhat less sparse, perplexity within the threshold's tolerance
- Trained on {provenance["tokens"]:,} tokens of {provenance["data"]} in {config["steps"]:,} steps
- Trainable weights: {config["trainable"]}
- Schedule: {schedule}; distillation weight {config["distill"]:g}, cross entropy weight {config["ce_weight"]:g}
- prosparse-pipe {provenance["version"]}, {provenance["created"]}; every setting is in prosparse.json
- The licence is the base model's; check that of the data, too

Sparsity per layer:

| | | | | | |
| --- | --- | --- | --- | --- | --- |
{layers}

![training](training.png)

## Use

    prosparse-pipe export --gguf {run}
    prosparse-pipe chat {run}

or in transformers: `AutoModelForCausalLM.from_pretrained("{run.name}")`.
"""
    target = run / "README.md"
    with atomic_path(target) as path:
        path.write_text(text)
    return target


def _rows(items: list, n: int) -> list[list]:
    return [items[i : i + n] for i in range(0, len(items), n)]
