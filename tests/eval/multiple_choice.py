"""lm-eval against a served model, on questions in a file, held to log-likelihoods asked for here: multiple_choice.py URL MODEL.

Its own data sets come from the hub; what is shown is that the arguments it is given, what it asks a server and the results that are read
from it fit together. Run by a Python that has reapkit, `lm-eval[api]` and transformers; MODEL is the folder that URL serves.
"""

from __future__ import annotations

import json
import os
import random
import sys
import tempfile
import urllib.request
from pathlib import Path

from reapkit import evaluation
from reapkit.endpoints import Endpoint, connect
from reapkit.evaluation import Settings, Subject

QUESTIONS = 12
# As the tasks of the suite are: with both measures, with the plain one alone, and a group of tasks.
TASKS = {
    "both": "task: both\n{}metric_list:\n  - metric: acc\n  - metric: acc_norm\n",
    "plain": "task: plain\n{}metric_list:\n  - metric: acc\n",
    "together": "group: together\ntask: [part]\naggregate_metric_list:\n  - metric: acc\n    weight_by_size: true\n",
}
PARTS = {"part": "task: part\n{}metric_list:\n  - metric: acc\n"}
COMMON = """dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
"""


def questions() -> list[tuple[str, list[str]]]:
    """Sums with four answers of different lengths."""
    draw = random.Random(0)
    pairs = [(draw.randrange(10, 90), draw.randrange(10, 90)) for _ in range(QUESTIONS)]
    return [
        (f"What is {a} + {b}? It is", [f"{a + b}", f"{a}", f"the number {a - b}", f"{a * b} in all"]) for a, b in pairs
    ]


def loglikelihood(endpoint: Endpoint, question: str, choice: str) -> float:
    """Of a choice behind its question, from what the server says of a text that it only reads."""
    body = {
        "model": endpoint.model,
        "prompt": f"{question} {choice}",
        "max_tokens": 1,
        "echo": True,
        "logprobs": 1,
        "temperature": 0,
    }
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{endpoint.url}/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request) as reply:
        said = json.load(reply)["choices"][0]["logprobs"]
    places = zip(said["text_offset"], said["token_logprobs"], strict=True)
    # The last one is what the server had to add.
    return sum(value for offset, value in list(places)[:-1] if offset >= len(question))


def main() -> None:
    url, model = sys.argv[1:]
    endpoint = connect(url)
    rows, plain, by_length = [], 0, 0
    for number, (question, choices) in enumerate(questions()):
        found = [loglikelihood(endpoint, question, choice) for choice in choices]
        best = found.index(max(found))
        normed = [value / len(choice) for value, choice in zip(found, choices, strict=True)]
        # The right answer is the model's own but for every third question: what is tested is not what the model knows.
        answer = best if number % 3 else (best + 1) % 4
        rows.append({"question": question, "choices": choices, "answer": answer})
        plain += best == answer
        by_length += normed.index(max(normed)) == answer
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        for name, text in (TASKS | PARTS).items():
            (folder / f"{name}.yaml").write_text(text.format(COMMON.format(file=folder / "rows.jsonl")))
        # lm-eval finds tasks in its own folder and in one that it is told of.
        program = folder / "python"
        program.write_text(f'#!/bin/sh\nexec {sys.executable} "$@" --include_path {folder}\n')
        program.chmod(0o755)
        sys.executable = str(program)
        evaluation.MULTIPLE_CHOICE = tuple(TASKS)  # type: ignore[attr-defined]
        os.environ["HF_DATASETS_CACHE"] = str(folder / "cache")
        cells = evaluation._run_lm_eval(Subject("m", model, None), endpoint, Settings(), folder / "out")
    for name, right in (("both", by_length), ("plain", plain), ("together", plain)):
        cell = cells[name]
        print(f"{name}: lm-eval {cell.figure}, by hand {right} of {QUESTIONS}, {cell.reason or cell.notes[0]}")
        assert cell.figure is not None and abs(cell.figure.value - right / QUESTIONS) < 1e-9, name


if __name__ == "__main__":
    main()
