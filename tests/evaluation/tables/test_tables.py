"""Files of benchmarks: laziness, damage, and data that wants to read or run what it must not."""

from __future__ import annotations

import base64
import json
import os
import sys
import types

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phivision_jax.evaluation.benchmarks import registry
from phivision_jax.evaluation.tables import benchmark as table_benchmark
from phivision_jax.evaluation.tables import json_file, locate, tsv_file
from phivision_jax.evaluation.tables.row import python_list
from tests.support import benchmark_sets as sets
from tests.support.benchmark_sets_of_questions import SETS
from tests.support.records import png


def items(name: str, path) -> table_benchmark.Items:
    return registry.find(name).items(str(path))


def ai2d(path, **changes) -> None:
    """A parquet file of AI2D with other values of a column in its third row."""
    row = {"question": "What?", "options": sets.COLOURS, "answer": "0", "image": sets.image(0)}
    sets.parquet(path / "data/test-00000-of-00001.parquet", [row, row, {**row, **changes}])


def open_files() -> set[str]:
    return {
        os.readlink(f"/proc/self/fd/{fd}")
        for fd in os.listdir("/proc/self/fd")
        if os.path.exists(f"/proc/self/fd/{fd}")
    }


@pytest.mark.parametrize("form", ["hub", "tsv"])
def test_images_are_read_when_an_item_is_indexed(tmp_path, monkeypatch, form):
    read = []
    original = table_benchmark.Row.read
    monkeypatch.setattr(table_benchmark.Row, "read", lambda row, given: read.append(row.number) or original(row, given))
    found = items("chartqa", SETS["chartqa", form](tmp_path).path)
    assert len(found) == 6 and len(found.ids) == 6 and read == []
    assert found[3].images and found[1].images
    assert read == [4, 2]


def test_memory_holds_the_images_of_few_items(tmp_path):
    """200 images of 300 kB are 60 MB; reading all of them one after the other must not keep them."""
    import tracemalloc

    content = os.urandom(300_000)
    start = png(8, 8)
    rows = [
        {"query": "?", "label": ["1"], "human_or_machine": 0, "image": {"bytes": start + content, "path": None}}
    ] * 200
    sets.parquet(tmp_path / "test-0.parquet", rows)
    found = items("chartqa", tmp_path)
    tracemalloc.start()
    assert sum(len(item.images[0]) for item in found) == 200 * (len(start) + 300_000)
    assert tracemalloc.get_traced_memory()[1] < 30e6
    tracemalloc.stop()


def test_files_are_not_left_open(tmp_path):
    before = open_files()
    for form in ("hub", "tsv"):
        found = items("ai2d", SETS["ai2d", form](tmp_path / form).path)
        assert len(list(found)) == 6
    assert len(open_files() - before) <= 1  # of the row group that is being read


def test_rows_are_read_in_any_order(tmp_path):
    found = items("ai2d", SETS["ai2d", "hub"](tmp_path).path)
    forwards = [item.images for item in found]
    assert len(set(forwards)) == 6
    assert [found[k].images for k in (5, 0, 3, 4, 2, 1)] == [forwards[k] for k in (5, 0, 3, 4, 2, 1)]


@pytest.mark.parametrize(
    "change, problem",
    [
        ({"answer": "9"}, "row 3: column 'answer' is '9', none of 4 options"),
        ({"answer": None}, "row 3: column 'answer' is empty"),
        ({"question": None}, "row 3: column 'question' is empty"),
        ({"options": []}, "row 3: column 'answer'"),
    ],
)
def test_unusable_value_names_file_row_and_column(tmp_path, change, problem):
    ai2d(tmp_path, **change)
    with pytest.raises(ValueError, match=rf"test-00000-of-00001\.parquet, {problem}"):
        items("ai2d", tmp_path)


@pytest.mark.parametrize("key", SETS, ids="-".join)
def test_missing_column_is_named(tmp_path, key):
    """Without its question, in every form."""
    names = ("question", "query", "question_text", "text", "instruction", "task", "task_en", "question_for_eval")
    path = SETS[key](tmp_path / "set").path
    for file in [path] if path.is_file() else sorted(path.rglob("*")):
        if file.suffix == ".parquet":
            table = pq.read_table(file)
            pq.write_table(table.drop_columns([name for name in names if name in table.column_names]), file)
        elif file.suffix == ".tsv":
            header, _, rest = file.read_text().partition("\n")
            file.write_text("\t".join(f"{n}_" if n in names else n for n in header.split("\t")) + "\n" + rest)
        elif file.suffix in (".json", ".jsonl"):
            text = file.read_text()
            for name in names:
                text = text.replace(f'"{name}":', f'"{name}_":')
            file.write_text(text)
    with pytest.raises(ValueError, match=r"\.(parquet|tsv|jsonl?), row 1: column '\w+' is missing; the columns are "):
        items(key[0], path)


def test_equal_ids_are_refused(tmp_path):
    row = {"pid": "1", "query": "?", "decoded_image": sets.image(0), "question_type": "free_form", "answer": "x"}
    sets.parquet(tmp_path / "testmini-0.parquet", [{**row, "answer_type": "text"}] * 2)
    with pytest.raises(ValueError, match=r"row 2: column 'id' 1 is also that of testmini-0\.parquet, row 1"):
        items("mathvista", tmp_path)


@pytest.mark.parametrize("content", [b"", b"PAR1", b"version https://git-lfs.github.com/spec/v1\n", b"<!doctype html>"])
def test_file_that_is_no_parquet(tmp_path, content):
    (tmp_path / "test-0.parquet").write_bytes(content)
    with pytest.raises(ValueError, match=r"test-0\.parquet"):
        items("ai2d", tmp_path)


def test_parquet_cut_short(tmp_path):
    file = tmp_path / "data/test-00000-of-00001.parquet"
    ai2d(tmp_path)
    found = items("ai2d", tmp_path)
    content = bytearray(file.read_bytes())
    content[4:2000] = bytes(1996)
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"test-00000-of-00001\.parquet, row 1"):
        _ = found[0]


@pytest.mark.parametrize(
    "image, problem",
    [
        ({"bytes": b"no image", "path": None}, "image 0 is not an image"),
        ({"bytes": None, "path": "/etc/passwd"}, "leads out of the image folder"),
        ({"bytes": None, "path": "../secret.png"}, "leads out of the image folder"),
        ({"bytes": None, "path": "http://127.0.0.1/x.png"}, "URLs need"),
        ({"bytes": None, "path": "gone.png"}, "there is no file gone.png"),
    ],
)
def test_hostile_image_of_parquet(tmp_path, image, problem):
    (tmp_path / "secret.png").write_bytes(png(4, 4))
    ai2d(tmp_path / "set", image=image)
    found = items("ai2d", tmp_path / "set")
    with pytest.raises(ValueError, match=rf"row 3: .*{problem}"):
        _ = found[2]


@pytest.mark.parametrize("path", ["/etc/passwd", "../secret.png", "link.png", "file:///etc/passwd", "a\0b.png"])
def test_hostile_path_of_annotations(tmp_path, path):
    (tmp_path / "secret.png").write_bytes(png(4, 4))
    folder = SETS["screenspot_pro", "json"](tmp_path / "set").path
    (folder / "images/link.png").symlink_to(tmp_path / "secret.png")
    file = folder / "annotations/excel_macos.json"
    rows = json.loads(file.read_text())
    rows[0]["img_filename"] = path
    file.write_text(json.dumps(rows))
    with pytest.raises(ValueError, match=r"excel_macos\.json, row 1"):
        _ = items("screenspot_pro", folder)[3]


def test_box_outside_of_its_image(tmp_path):
    folder = SETS["screenspot_pro", "json"](tmp_path).path
    file = folder / "annotations/excel_macos.json"
    file.write_text(file.read_text().replace("[10, 10, 20, 18]", "[10, -1, 20, 99]", 1))
    assert items("screenspot_pro", folder)[3].record["bbox_xyxy_norm"] == [0.25, 0, 0.5, 1]
    file.write_text(file.read_text().replace("[10, -1, 20, 99]", "[10, 30, 20, 99]", 1))
    with pytest.raises(ValueError, match=r"row 1: column 'bbox' is \[10, 30, 20, 99\], outside of the image of 40x20"):
        _ = items("screenspot_pro", folder)[3]
    file.write_text(file.read_text().replace("[10, 30, 20, 99]", '["import os", 1, 2, 3]', 1))
    with pytest.raises(ValueError, match=r"row 1: column 'bbox' is .*, not four coordinates"):
        items("screenspot_pro", folder)


@pytest.mark.parametrize(
    "text, problem",
    [
        ("", "has no header"),
        ("index question", "has no header"),
        ("index\timage\tquestion\n0\tx\n", "row 1: 2 values, but the header has 3 names"),
        ('index\timage\tquestion\n0\tx\t"no end\n\n', "a value in quotes that has no end"),
        ("index\timage\tquestion\tA\tB\tanswer\n0\t7\t?\tx\ty\tA\n", "column 'image' is 7, which is no image"),
        (f"index\timage\tquestion\tA\tB\tanswer\n0\t{'!' * 99}\t?\tx\ty\tA\n", "column 'image' is not base64"),
        ("index\timage\tquestion\tA\tB\tanswer\n0\t1\t?\tx\ty\tA\n0\t1\t?\tx\ty\tA\n", "column 'index' has 0 again"),
        ("index\timage\tquestion\tA\tB\tanswer\n", "has no items of AI2D"),
    ],
)
def test_damaged_tsv(tmp_path, text, problem):
    (tmp_path / "AI2D_TEST.tsv").write_text(text)
    with pytest.raises(ValueError, match=rf"AI2D_TEST\.tsv.*{problem}"):
        _ = items("ai2d", tmp_path)[0]


def test_tsv_record_beyond_the_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(tsv_file, "LARGEST", 1000)
    (tmp_path / "AI2D_TEST.tsv").write_text('index\timage\tquestion\n0\t1\t"' + "x\n" * 2000 + '"\n')
    with pytest.raises(ValueError, match="a record of more than 1,000 bytes, from byte 21 on"):
        items("ai2d", tmp_path)


def test_tsv_quotes_inside_of_values(tmp_path):
    image = base64.b64encode(png(4, 4)).decode()
    rows = f'0\t{image}\ta 5" pipe\t""""\t"b\n\tb"\tA\r\n1\t0\tb 6" pipe\tx\ty\tB\n'
    (tmp_path / "AI2D_TEST.tsv").write_text(f"index\timage\tquestion\tA\tB\tanswer\n{rows}", newline="")
    first, second = items("ai2d", tmp_path)
    assert first.record == {"options": {"A": '"', "B": "b\n\tb"}, "answer": "A"}
    assert second.question.startswith('Question: b 6" pipe\n') and second.images == first.images


@settings(max_examples=200, deadline=None)
@given(st.lists(st.lists(st.text('a"\t\n,é', max_size=6), min_size=2, max_size=2), min_size=1, max_size=6))
def test_tsv_as_pythons_csv_writes_it(tmp_path_factory, texts):
    """Values with quotes, tabs and line breaks come back, record by record, also from the middle of a file."""
    file = tmp_path_factory.mktemp("tsv") / "x.tsv"
    rows = [{"index": k, "image": "x" * 99, "question": a, "answer": b} for k, (a, b) in enumerate(texts)]
    sets.tsv(file, rows)
    table = tsv_file.TsvFile(file, file.parent)
    read = list(table)
    assert [[row.values["question"], row.values["answer"]] for row in read] == texts
    assert [table._cell(str(k), "question").decode() for k in range(len(rows))] == [text for text, _ in texts]


@pytest.mark.parametrize("content", ["{", "[1, 2]", '["x"]', "[" * 100_000, "null", '{"a": 1} {"b": 2}'])
def test_damaged_annotations(tmp_path, content):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(ValueError, match=r"x\.json"):
        items("cuactspot", tmp_path)


def test_annotations_beyond_the_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(json_file, "LARGEST", 10)
    (tmp_path / "x.json").write_text(json.dumps(["x" * 20]))
    with pytest.raises(ValueError, match="annotations may have 10"):
        items("cuactspot", tmp_path)


def test_table_beyond_the_limits(tmp_path, monkeypatch):
    monkeypatch.setattr(table_benchmark, "MOST_ROWS", 5)
    with pytest.raises(ValueError, match="AI2D may not have more than 5 rows"):
        items("ai2d", SETS["ai2d", "hub"](tmp_path).path)


@pytest.mark.parametrize(
    "text, value",
    [
        ("['a', \"it's\", 3]", ["a", "it's", 3]),
        ("[]", []),
        ("__import__('os').system('true')", None),
        ("[__import__('os')]", None),
        ("[" * 5000, None),
        ("[" + "1," * 40_000 + "]", None),
        ("[" + "9" * 10_000 + "]", None),
        ("{'a': 1}", None),
        ("red", None),
    ],
)
def test_python_list(text, value):
    assert python_list(text) == value


@pytest.mark.parametrize("name", registry.NAMES)
def test_missing_data_names_the_files_and_the_download(tmp_path, name):
    benchmark = registry.find(name)
    with pytest.raises(FileNotFoundError) as raised:
        benchmark.items(str(tmp_path))
    assert f"has no data of {benchmark.title}: expected " in str(raised.value)
    assert locate.command(benchmark.download) in str(raised.value)


def test_download_of_the_hub(tmp_path, monkeypatch):
    folder = SETS["ai2d", "hub"](tmp_path).path
    asked = []

    def snapshot_download(name: str, **options) -> str:
        asked.append((name, options))
        return str(folder)

    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(snapshot_download=snapshot_download))
    assert len(items("ai2d", "")) == 6
    assert asked == [("lmms-lab/ai2d", {"repo_type": "dataset", "allow_patterns": ["*test*"]})]


def test_download_that_fails(monkeypatch):
    def snapshot_download(name: str, **options) -> str:
        raise OSError("no route to host")

    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(snapshot_download=snapshot_download))
    with pytest.raises(
        FileNotFoundError, match="lmms-lab/ai2d could not be downloaded: no route to host; give a folder"
    ):
        registry.find("ai2d").items("")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(FileNotFoundError, match=r"pip install 'phivision_jax\[hub\]'.* hf download lmms-lab/ai2d"):
        registry.find("ai2d").items("")
    with pytest.raises(FileNotFoundError, match=r"git clone https://github\.com/microsoft/Phi-Ground"):
        registry.find("cuactspot").items("")


def test_first_form_that_is_present_is_read(tmp_path):
    SETS["ai2d", "hub"](tmp_path)
    SETS["ai2d", "tsv"](tmp_path)
    assert items("ai2d", tmp_path).ids[0] == "test-00000-of-00002:1"


def test_images_together_beyond_the_limit(tmp_path, monkeypatch):
    from phivision_jax.evaluation.tables import row

    monkeypatch.setattr(row, "MOST_BYTES", 2000)
    found = items("zerobench", SETS["zerobench", "hub"](tmp_path).path)
    with pytest.raises(ValueError, match="row 2: its images have more than 2,000 bytes together"):
        _ = found[1]


def test_unknown_kind_of_file(tmp_path):
    (tmp_path / "x.csv").write_text("a,b\n")
    with pytest.raises(ValueError, match="is not parquet, TSV, JSON or JSON lines"):
        items("ai2d", tmp_path / "x.csv")
