"""Multiple-choice questions for `prosparse-pipe eval --tasks`, from the PyPI package bigbench (Apache-2.0).

    python recipes/smollm2-135m/prepare_tasks.py --out data/tasks

writes OUT/NAME.jsonl, zero-shot, in each task's own prompt format. The package carries the canary of a benchmark: its
text is for evaluation and must never be trained on.
"""

import argparse
import json
import random
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

PACKAGE = "bigbench==1.0.0"
MOST = 300  # questions of a task, a random choice with a fixed seed
# Of the tasks that score one correct choice, those with English questions short enough for a model of 135M weights.
TASKS = (
    "cause_and_effect/one_sentence",
    "general_knowledge",
    "hindu_knowledge",
    "intent_recognition",
    "movie_recommendation",
    "odd_one_out",
    "phrase_relatedness",
    "social_iqa",
    "understanding_fables",
)


def questions(task: dict[str, Any]) -> list[dict[str, Any]]:
    """The task's examples with exactly one correct choice, as `eval` reads them."""
    question_prefix = task.get("example_input_prefix", "\nQ: ")
    answer_prefix = task.get("example_output_prefix", "\nA: ")
    rows = []
    for example in task["examples"]:
        scores = example["target_scores"]
        choices = sorted(scores)  # the order of the file often gives the answer away
        correct = [i for i, choice in enumerate(choices) if scores[choice] == max(scores.values())]
        if len(correct) == 1:
            context = f"{question_prefix}{example['input']}{answer_prefix}".strip()
            rows.append({"context": context, "choices": choices, "answer": correct[0]})
    return random.Random(0).sample(rows, min(MOST, len(rows)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    archive = next(iter(out.glob("bigbench-*.tar.gz")), None)
    if archive is None:  # an sdist: pip runs its setup.py for the metadata; nothing of it is installed
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", out, PACKAGE]
        subprocess.run(pip, check=True)
        archive = next(iter(out.glob("bigbench-*.tar.gz")))
    wanted = {f"/{name}/task.json": name.replace("/", "_") for name in TASKS}
    with tarfile.open(archive) as members:
        for member in members:
            name = next((name for path, name in wanted.items() if member.name.endswith(f"benchmark_tasks{path}")), None)
            content = members.extractfile(member) if name else None
            if content is not None:
                rows = questions(json.load(content))
                (out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
                print(f"{name}: {len(rows)} questions")


if __name__ == "__main__":
    main()
