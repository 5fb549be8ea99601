import json

from phivision_jax.evaluation.accuracy import Answer, accuracy, accuracy_by_task, accuracy_section, write_report


def test_report_counts_by_mode_and_task(tmp_path):
    answers = [Answer(str(i), "general", "nothink", "q", "a", "a" if i else "b", bool(i)) for i in range(4)]
    assert accuracy(answers) == 0.75 and accuracy_by_task(answers) == {"nothink/general": (0.75, 4)}
    assert accuracy_section("c on d", answers).table.rows == [("nothink/general", "75.0%", "4"), ("all", "75.0%", "4")]
    write_report(tmp_path / "out", answers, checkpoint="c", data="d", mode="auto")
    lines = (tmp_path / "out" / "answers.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in lines] == ["0", "1", "2", "3"]
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == {
        "checkpoint": "c", "data": "d", "mode": "auto",
        "accuracy": 0.75, "count": 4, "by_task": {"nothink/general": [0.75, 4]},
    }  # fmt: skip
