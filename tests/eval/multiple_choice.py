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
    "together": "group: together\ntask: [both, plain]\naggregate_metric_list:\n  - metric: acc\n    weight_by_size: true\n",
}
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


def questions() -> list[dict[str, object]]:
    """Sums with four answers of different lengths."""
    draw = random.Random(0)
    rows = []
    for _ in range(QUESTIONS):
        one, other = draw.randrange(10, 90), draw.randrange(10, 90)
        choices = [f"{one + other}", f"{one}", f"the number {one - other}", f"{one * other} in all"]
        answer = draw.randrange(4)
        choices[0], choices[answer] = choices[answer], choices[0]
        rows.append({"question": f"What is {one} + {other}? It is", "choices": choices, "answer": answer})
    return rows


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
    rows = questions()
    found = [[loglikelihood(endpoint, row["question"], choice) for choice in row["choices"]] for row in rows]  # type: ignore[arg-type, attr-defined]
    best = [max(range(4), key=values.__getitem__) for values in found]
    normed = [
        max(range(4), key=lambda place, values=values, row=row: values[place] / len(row["choices"][place]))  # type: ignore[misc, index]
        for values, row in zip(found, rows, strict=True)
    ]
    plain, by_length = (
        sum(place == row["answer"] for place, row in zip(places, rows, strict=True)) / QUESTIONS
        for places in (best, normed)
    )
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        for name, text in TASKS.items():
            (folder / f"{name}.yaml").write_text(text.format(COMMON.format(file=folder / "rows.jsonl")))
        # lm-eval finds tasks in its own folder and in one that it is told of.
        program = folder / "python"
        program.write_text(f'#!/bin/sh\nexec {sys.executable} "$@" --include_path {folder}\n')
        program.chmod(0o755)
        sys.executable = str(program)
        evaluation.MULTIPLE_CHOICE = tuple(TASKS)  # type: ignore[attr-defined]
        os.environ["HF_DATASETS_CACHE"] = str(folder / "cache")
        cells = evaluation._run_lm_eval(Subject("m", model, None), endpoint, Settings(), folder / "out")
    for name, wanted in (("both", by_length), ("plain", plain), ("together", plain)):
        cell = cells[name]
        print(f"{name}: lm-eval {cell.figure}, by hand {wanted:.4f}, {cell.reason or cell.notes[0]}")
        assert cell.figure is not None and abs(cell.figure.value - wanted) < 1e-9, name


if __name__ == "__main__":
    main()
