"""Multiple choice: how often a model finds the right answer the most probable one.

A line of the file is a question: {"question": str or "context": str, "choices": [str, ...], "answer": index}. The model
reads the question, a space where there is none, and a choice. The choice's score is the log-probability of its tokens
(`acc`), or that divided by its length in characters (`acc_norm`), as in lm-evaluation-harness.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from prosparse_pipe.data import DataError, leading_bos, read_numbered_jsonl
from prosparse_pipe.scoring import Scorer, log_softmax

FORMAT = 'a line is {"question": "...", "choices": ["...", "..."], "answer": 0}; see docs/eval.md'


@dataclasses.dataclass(frozen=True)
class Question:
    """What the choices follow, the choices, the index of the right one, and where it stands."""

    context: str
    choices: list[str]
    answer: int
    where: str


def read_questions(path: Path) -> list[Question]:
    """The questions of a jsonl file.

    Raises:
        DataError: the file cannot be read, holds no question, or a line is malformed; the message names the line.
    """
    questions = []
    try:
        for number, row in read_numbered_jsonl(path):
            questions.append(_question(row, f"{path}, line {number}"))
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}", "give a .jsonl file of questions") from None
    if not questions:
        raise DataError(f"{path} holds no questions", FORMAT)
    return questions


def _question(row: Any, where: str) -> Question:
    if not isinstance(row, dict):
        raise DataError(f"{where} is not an object", FORMAT)
    parts = [row[key] for key in ("context", "question") if key in row]
    choices, answer = row.get("choices"), row.get("answer")
    if not parts or not all(isinstance(part, str) for part in parts):
        raise DataError(f"{where} has no `question` or `context` that is text", FORMAT)
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c for c in choices):
        raise DataError(f"{where}: `choices` is not a list of two or more texts", FORMAT)
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
        raise DataError(f"{where}: `answer` is not an index into the {len(choices)} choices, from 0", FORMAT)
    return Question("\n".join(parts), choices, answer, where)


def encode_choice(tokenizer: Any, question: Question, choice: str, n_ctx: int) -> tuple[list[int], int]:
    """The tokens of question and choice, and how many of them come before the choice's own.

    The space between them is the choice's, and so is a token that spans the border. If there are more than n_ctx, the
    question loses its beginning.

    Raises:
        DataError: the choice alone does not fit.
    """
    space = "" if not question.context or question.context[-1].isspace() or choice[0].isspace() else " "
    alone, ids = (
        list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        for text in (question.context.rstrip(), question.context + space + choice)
    )
    bos = leading_bos(tokenizer)
    if ids[:1] == bos:
        bos = []
    shared = 0
    while shared < min(len(alone), len(ids) - 1) and alone[shared] == ids[shared]:
        shared += 1
    if not bos and not shared:  # something must come before the first token: what ends a document
        bos = [tokenizer.eos_token_id if tokenizer.eos_token_id is not None else 0]
    dropped = max(0, len(bos) + len(ids) - n_ctx)
    if dropped > shared or len(bos) + shared - dropped < 1:
        raise DataError(f"{question.where}: a choice is longer than the context of {n_ctx} tokens", "raise --context")
    return bos + ids[dropped:], len(bos) + shared - dropped


def choice_scores(model: Scorer, question: Question, n_ctx: int) -> np.ndarray:
    """Log-probability of each choice given the question, nats, float64 (n_choices,)."""
    scores = np.zeros(len(question.choices))
    # choices of one token share their input
    alike: dict[tuple[tuple[int, ...], int], list[tuple[int, np.ndarray]]] = {}
    for i, choice in enumerate(question.choices):
        ids, start = encode_choice(model.tokenizer, question, choice, n_ctx)
        alike.setdefault((tuple(ids[:-1]), start), []).append((i, np.array(ids[start:])))
    for (ids_before, start), choices in alike.items():
        place = 0
        for piece in model.logits(np.array(ids_before), start - 1):
            log_p = log_softmax(piece)
            for i, targets in choices:
                part = targets[place : place + len(piece)]
                scores[i] += log_p[np.arange(len(part)), part].sum(dtype=np.float64)
            place += len(piece)
    return scores


@dataclasses.dataclass
class TaskScore:
    """Accuracy of a model on questions; the last eight are None without a dense model.

    Attributes:
        tasks: the file.
        questions: how many.
        acc, acc_norm: share of right answers, 0 to 1, by log-probability, and by log-probability per character.
        *_stderr: standard error of the mean; None for a single question.
        dense_*: of the dense model.
        *_difference: model minus dense model, in points (hundredths); its standard error is that of the paired answers.
    """

    tasks: str
    questions: int
    acc: float
    acc_stderr: float | None
    acc_norm: float
    acc_norm_stderr: float | None
    dense_acc: float | None = None
    dense_acc_stderr: float | None = None
    dense_acc_norm: float | None = None
    dense_acc_norm_stderr: float | None = None
    acc_difference: float | None = None
    acc_difference_stderr: float | None = None
    acc_norm_difference: float | None = None
    acc_norm_difference_stderr: float | None = None


def _mean(values: np.ndarray) -> tuple[float, float | None]:
    """Mean and its standard error."""
    n = len(values)
    return float(values.mean()), float(values.std(ddof=1) / np.sqrt(n)) if n > 1 else None


def _answers(model: Scorer, question: Question, n_ctx: int) -> tuple[float, float]:
    """(right by log-probability, right by log-probability per character), 1 or 0."""
    scores = choice_scores(model, question, n_ctx)
    lengths = np.array([len(choice) for choice in question.choices])
    return float(scores.argmax() == question.answer), float((scores / lengths).argmax() == question.answer)


def score_tasks(
    model: Scorer,
    name: str,
    questions: list[Question],
    n_ctx: int,
    dense: Scorer | None = None,
    seen: Callable[[int], None] | None = None,
) -> TaskScore:
    """Lets the models answer.

    Args:
        name: of the questions.
        n_ctx: most tokens of a question with a choice.
        dense: the model to compare with.
        seen: called with 1 after each question.

    Raises:
        DataError: a choice is longer than the context.
    """
    scorers = [model] if dense is None else [model, dense]
    right = np.zeros((len(scorers), 2, len(questions)))  # (model, acc or acc_norm, question)
    for q, question in enumerate(questions):
        for s, scorer in enumerate(scorers):
            right[s, :, q] = _answers(scorer, question, n_ctx)
        if seen is not None:
            seen(1)
    score = TaskScore(name, len(questions), *_mean(right[0, 0]), *_mean(right[0, 1]))
    if dense is not None:
        score.dense_acc, score.dense_acc_stderr = _mean(right[1, 0])
        score.dense_acc_norm, score.dense_acc_norm_stderr = _mean(right[1, 1])
        score.acc_difference, score.acc_difference_stderr = _mean(100 * (right[0, 0] - right[1, 0]))
        score.acc_norm_difference, score.acc_norm_difference_stderr = _mean(100 * (right[0, 1] - right[1, 1]))
    return score
