"""A compressed folder in lm-evaluation-harness, on a task that needs no download."""

import json

import pytest
import torch

from tests.language_models import PROSE, make_model, make_tokenizer, transformers
from vitoats import api
from vitoats.loading import load

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

TASK = """
task: tiny
dataset_path: json
dataset_kwargs: {{data_files: {{test: {questions}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc}}]
"""
QUESTIONS = [
    {"question": "The 3 ships sailed past", "choices": ["island", "winter"], "answer": 0},
    {"question": "and 5 of them came back", "choices": ["in winter", "past island"], "answer": 0},
    {"question": "sailed past island 16, and 7", "choices": ["line", "of them came"], "answer": 1},
]


def log_likelihood(model, tokenizer, text, continuation):
    """The sum over the continuation's tokens, in nats."""
    before, tokens = tokenizer(text).input_ids, tokenizer(f"{text} {continuation}").input_ids
    log_p = model(input_ids=torch.tensor([tokens])).logits.log_softmax(-1)[0]
    return sum(log_p[i - 1, tokens[i]].item() for i in range(len(before), len(tokens)))


def test_a_task_of_ones_own_runs_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    lm_eval = pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (the extra lm-eval)")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    small = api.compress(
        make_model("llama"), [PROSE], tokenizer=make_tokenizer(), method="oats", iterations=2, seq_len=16, nsamples=16
    )
    small.save(tmp_path / "out")
    questions = tmp_path / "questions.jsonl"
    questions.write_text("\n".join(map(json.dumps, QUESTIONS)))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "tiny.yaml").write_text(TASK.format(questions=questions))

    model = load.load(tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    found = lm_eval.simple_evaluate(
        HFLM(pretrained=model, tokenizer=tokenizer, device="cpu", max_length=64),
        tasks=["tiny"],
        task_manager=TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False),
        log_samples=True,
    )
    expected = [[log_likelihood(model, tokenizer, q["question"], c) for c in q["choices"]] for q in QUESTIONS]
    samples = sorted(found["samples"]["tiny"], key=lambda sample: sample["doc_id"])
    got = [[float(answer[0]) for answer in sample["filtered_resps"]] for sample in samples]
    assert got == [pytest.approx(pair, rel=1e-3) for pair in expected]
    right = sum(int(pair[1] > pair[0]) == q["answer"] for pair, q in zip(expected, QUESTIONS, strict=True))
    assert found["results"]["tiny"]["acc,none"] == pytest.approx(right / 3)
