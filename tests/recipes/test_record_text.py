"""The recipes write what rows and problems say, unless `--no_record_text` is given."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("trl")

from datasets import Dataset  # noqa: E402

from onlinesel.recipes import grpo, sft  # noqa: E402
from tests.callbacks.hosts import make_tokenizer  # noqa: E402


@pytest.mark.parametrize("wanted", [True, False])
def test_texts_are_written_if_they_are_wanted(tmp_path: Path, wanted: bool) -> None:
    columns = {
        "input_ids": [[5, 6], [7]], "source": ["a", "b"], "kind": ["a", "b"],
        "prompt": ["w5 w6", "w7"],
    }  # fmt: skip
    trainer = SimpleNamespace(
        train_dataset=Dataset.from_dict(columns), processing_class=make_tokenizer(),
        args=SimpleNamespace(resume_from_checkpoint=None),
    )  # fmt: skip
    for recipe in (sft, grpo):
        folder = tmp_path / recipe.__name__
        recipe._record_rows(trainer, str(folder), wanted)
        lines = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
        assert [line["source"] for line in lines] == ["a", "b"]
        assert [line["text"] for line in lines] == (["w5 w6", "w7"] if wanted else ["", ""])
