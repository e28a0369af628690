"""Retrieval accuracy on scores with known ranks, and the judge on a network with known towers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cachequant.errors import UserError
from cachequant.evaluation.retrieval import load_judge, retrieval_accuracy


def test_the_right_column_counts_when_few_enough_are_as_similar() -> None:
    scores = torch.tensor([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0], [3.0, 2.0, 1.0]])
    answers = torch.tensor([0, 1, 2])  # ranks 1, 2, 3
    assert [retrieval_accuracy(scores, answers, top) for top in (1, 2, 3)] == pytest.approx([1 / 3, 2 / 3, 1.0])


def test_ties_count_against() -> None:
    assert retrieval_accuracy(torch.zeros(4, 5), torch.tensor([0, 1, 2, 3])) == 0.0
    assert retrieval_accuracy(torch.zeros(4, 5), torch.tensor([0, 1, 2, 3]), top=5) == 1.0


def test_random_scores_find_their_answer_by_chance() -> None:
    scores = torch.rand(20_000, 10, generator=torch.Generator().manual_seed(0))
    answers = torch.randint(10, (20_000,), generator=torch.Generator().manual_seed(1))
    assert retrieval_accuracy(scores, answers, top=3) == pytest.approx(0.3, abs=0.015)


@pytest.mark.parametrize(("rows", "answers"), [(0, 0), (3, 2)])
def test_wrong_sizes_are_refused(rows: int, answers: int) -> None:
    with pytest.raises(UserError, match="expected"):
        retrieval_accuracy(torch.zeros(rows, 4), torch.zeros(answers, dtype=torch.long))


def test_a_missing_judge_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="train_drawings_clip"):
        load_judge(tmp_path)
