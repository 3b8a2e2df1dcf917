"""Images and recordings of a data set of the hub: what is drawn, that it resumes, what a bad network does."""

import json

import numpy as np
import pytest

from arbitor.data.audio import open_training_audio
from arbitor.data.hub import PAUSES, HubExamples
from arbitor.data.hub_media import StreamSampler
from arbitor.data.images import Geometry, open_images, open_training_images
from arbitor.errors import UserError
from testing.fake_hub import failing_at, install, png, rows_of

GREY = Geometry(size=8, channels=1)


@pytest.fixture
def hub(monkeypatch):
    """hub(rows): the hub has one data set, of these; small blocks, and no waiting."""
    monkeypatch.setattr("arbitor.data.hub_media.OPENING", 20)
    monkeypatch.setattr("arbitor.data.hub_media.BLOCK_ITEMS", 7)
    return lambda rows: install(monkeypatch, rows)


def sampler_of(batch=3, seed=0, held_out=None, kind="image"):
    if kind == "image":
        corpus = open_training_images(["hf:some/media"], held_out, GREY)
    else:
        corpus = open_training_audio(["hf:some/media"], held_out, 2000)
    return StreamSampler(corpus.train.media, batch, seed)


def numbers_of(items):
    """The examples that items were made of, by their texts; images hold the number as well."""
    numbers = [int(text.split()[1]) for text, _ in items]
    for number, (_, content) in zip(numbers, items, strict=True):
        if content.ndim == 3:
            assert (content == number).all()
    return numbers


def drawn(sampler, count):
    return [number for _ in range(count) for number in numbers_of(sampler.next_items()[0])]


@pytest.mark.parametrize("kind", ["image", "audio"])
def test_every_example_but_the_held_out_ones_is_drawn_once_an_epoch(kind, hub):
    hub(rows_of(45))
    usual = [n for n in range(45) if n not in (9, 19)]
    epochs = drawn(sampler_of(batch=43, kind=kind), 2)
    first, second = epochs[:43], epochs[43:]
    assert sorted(first) == sorted(second) == usual
    assert first != second != usual != first
    # Blocks of seven examples that were learnt from.
    for place in range(0, 42, 7):
        assert sorted(first[place : place + 7]) == usual[place : place + 7]
    assert drawn(sampler_of(batch=43, kind=kind), 1) == first
    assert drawn(sampler_of(batch=43, kind=kind, seed=1), 1) != first
    assert drawn(sampler_of(batch=1, kind=kind), 86) == epochs


@pytest.mark.parametrize("draws", range(40))
def test_a_stream_goes_on_from_any_position(draws, hub):
    rows = rows_of(31)
    rows[5]["image"] = {"bytes": b"damaged", "path": None}
    hub(rows)
    whole = sampler_of()
    for _ in range(draws):
        whole.next_items()
    again = sampler_of(seed=5)
    again.restore(json.loads(json.dumps(whole.state())))
    for _ in range(25):
        (items, bits), (others, other_bits) = whole.next_items(), again.next_items()
        assert numbers_of(items) == numbers_of(others)
        assert np.array_equal(bits, other_bits)
    assert whole.state() == again.state()


def test_two_blocks_are_read_at_most_and_one_example_for_each_that_is_drawn(hub):
    stream = hub(rows_of(200))
    sampler = sampler_of(batch=1)
    opened = len(stream.read)
    assert opened <= 21 + 2  # the kinds of two fields are looked at
    sampler.next_items()
    assert len(stream.read) == opened + 7
    for number in range(1, 100):
        before = len(stream.read)
        sampler.next_items()
        # A held-out one, or that of another block, may come in between.
        assert len(stream.read) - before <= 3
        assert len(stream.read) - opened <= number + 2 * 7 + 2


def test_a_block_is_bounded_in_bytes_as_well(hub, monkeypatch):
    monkeypatch.setattr("arbitor.data.hub_media.BLOCK_BYTES", 3 * 64)
    hub(rows_of(30))
    sampler = sampler_of(batch=1)
    assert sorted(drawn(sampler, 3)) == [0, 1, 2]
    assert sorted(drawn(sampler, 3)) == [3, 4, 5]


def test_what_cannot_be_used_is_skipped_counted_once_and_told(hub):
    rows = rows_of(40)
    rows[3]["image"] = {"bytes": b"damaged", "path": None}
    rows[4]["image"] = None
    rows[6]["text"] = None
    rows[9]["text"] = "  "  # held out
    rows[25]["image"] = {"bytes": None, "path": "/nowhere.png"}
    hub(rows)
    corpus = open_training_images(["hf:some/media"], None, GREY)
    assert corpus.held_out.captions == [b"number 19"]
    assert "1 held out (one of 10 of its first 20); skipped 1 with an empty caption" in corpus.description
    sampler = StreamSampler(corpus.train.media, 1, 0)
    assert sorted(drawn(sampler, 34)) == [n for n in range(40) if n not in (3, 4, 6, 9, 19, 25)]
    assert sampler.news() == [
        "hf:some/media:train; skipped 1 damaged, 1 with an empty caption, 2 without content so far"
    ]
    drawn(sampler, 34)
    assert sampler.news() == []


def test_a_stream_without_anything_to_use_ends(hub, monkeypatch):
    rows = rows_of(30)
    for row in rows:
        if row["text"] != "number 9":
            row["image"] = {"bytes": b"damaged", "path": None}
    hub(rows)
    with pytest.raises(UserError, match="no example can be used to train on; skipped 28 damaged"):
        sampler_of().next_items()
    monkeypatch.setattr("arbitor.data.hub_media.MAX_UNUSABLE", 11)
    with pytest.raises(UserError, match="12 examples in a row cannot be used; skipped 12 damaged"):
        sampler_of().next_items()


@pytest.mark.parametrize(
    ("held_out", "expected"),
    [("0.25", [3, 7, 11, 15, 19]), ("3", [0, 1, 2]), (None, [9, 19])],
)
def test_what_is_held_out(held_out, expected, hub):
    hub(rows_of(60))
    corpus = open_training_images(["hf:some/media"], held_out, GREY)
    assert corpus.held_out.captions == [f"number {n}".encode() for n in expected]
    assert corpus.held_out.images(np.arange(len(expected)))[:, 0, 0, 0].tolist() == expected
    sampler = StreamSampler(corpus.train.media, 60 - len(expected), 0)
    assert sorted(drawn(sampler, 1)) == [n for n in range(60) if n not in expected]


def test_a_path_is_held_out_of_a_stream(hub, tmp_path):
    hub(rows_of(30))
    for name in ("a", "b"):
        (tmp_path / f"{name}.png").write_bytes(png(200))
        (tmp_path / f"{name}.txt").write_text("apart")
    corpus = open_training_images(["hf:some/media"], str(tmp_path), GREY)
    assert corpus.held_out.captions == [b"apart", b"apart"]
    assert sorted(drawn(StreamSampler(corpus.train.media, 30, 0), 1)) == [*range(30)]


@pytest.mark.parametrize(
    ("data", "held_out", "count", "why"),
    [
        (["hf:some/media", "more"], None, 30, "stands alone"),
        (["hf:some/media"], "1.5", 30, "must be a path, a share"),
        (["hf:some/media"], "5000", 30, "a number of examples below 20"),
        (["hf:some/media"], "12", 12, "no more than the 12 examples that are held out"),
        (["hf:some/media"], None, 0, "no more than the 0 examples"),
        (["hf:some/media"], None, 5, "no (image|recording) that is held out can be used"),
        (["hf:some/media:train:body"], None, 30, "no field 'body'"),
    ],
)
def test_streams_that_cannot_be_used_are_one_line(data, held_out, count, why, hub):
    hub(rows_of(count))
    for opens, third in ((open_training_images, GREY), (open_training_audio, 2000)):
        with pytest.raises(UserError, match=why) as caught:
            opens(data, held_out, third)
        assert "\n" not in str(caught.value)


def test_the_field_of_a_stream_stands_in_its_name(hub):
    hub(rows_of(30))
    with pytest.raises(UserError, match="--field body is for files; of the hub: hf:some/media:SPLIT:body"):
        open_training_images(["hf:some/media"], None, GREY, "body")


def test_speakers_of_a_stream_are_not_known(hub):
    hub(rows_of(30))
    with pytest.raises(UserError, match="speakers of a data set of the hub are not known"):
        open_training_audio(["hf:some/media"], "speaker:theo", 2000)


def test_a_stream_that_has_changed_is_refused(hub):
    rows = rows_of(40)
    hub(rows)
    sampler = sampler_of()
    drawn(sampler, 4)
    state = sampler.state()
    other = [dict(row) for row in rows]
    other[9]["text"] = "number 99"  # held out
    hub(other)
    with pytest.raises(UserError, match="is not what it was"):
        sampler_of().restore(state)
    other[9]["text"] = "number 9"
    other[8]["text"] = "number 88"  # of the block that the position is in
    hub(other)
    changed = sampler_of()
    changed.restore(state)
    with pytest.raises(UserError, match="is not what it was"):
        changed.next_items()
    hub(rows[:5] + rows[9:10] * 25)
    with pytest.raises(UserError, match="is not what it was"):
        sampler_of().restore(state)
    for bad in ({}, state | {"place": -1}, state | {"epoch": "x"}, {"seed": 0, "drawn": 3}):
        with pytest.raises(UserError, match="sampler state"):
            sampler_of().restore(bad)


def test_a_failing_network_is_tried_again_from_the_same_example(hub):
    rows = rows_of(60)
    hub(rows)
    whole = drawn(sampler_of(), 18)
    stream = hub(rows)
    sampler = sampler_of()
    stream.failing = failing_at(33, 3, ConnectionError("network is down"))
    assert drawn(sampler, 18) == whole
    assert stream.slept == list(PAUSES[:3])
    assert sampler.news() == ["hf:some/media:train: example 33 was read after 3 failures"]


def test_a_network_that_stays_away_ends_with_one_line(hub):
    stream = hub(rows_of(60))
    sampler = sampler_of()
    stream.failing = failing_at(33, 99, TimeoutError("took too long\nmore"))
    with pytest.raises(UserError) as caught:
        drawn(sampler, 18)
    assert str(caught.value) == (
        "cannot read example 33 of the data set hf:some/media:train: took too long (tried 6 times)"
    )
    assert stream.slept == list(PAUSES)


def test_what_is_wrong_with_the_data_is_not_tried_again(hub):
    stream = hub(rows_of(60))
    stream.failing = failing_at(5, 99, ValueError("not a table"))
    with pytest.raises(UserError, match=r"cannot read example 5 .*: not a table$"):
        list(HubExamples("hf:some/media").from_number(0))
    assert stream.slept == []


def test_a_bounded_part_is_read_where_a_stream_is_of_no_use(hub):
    hub(rows_of(20))
    corpus = open_images(["hf:some/media"], "0.1", GREY)
    assert (len(corpus.train), len(corpus.held_out)) == (18, 2)


# --- the library itself


def test_local_data_sets_through_the_library_itself(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets", reason="needs datasets (the extra hub)")
    import pyarrow as arrow
    from pyarrow import parquet

    monkeypatch.setattr("arbitor.data.hub_media.OPENING", 20)
    monkeypatch.setattr("arbitor.data.hub_media.BLOCK_ITEMS", 7)
    rows = rows_of(45)
    features = datasets.Features(
        {
            "image": datasets.Image(decode=False),
            "audio": datasets.Audio(decode=False),
            "text": datasets.Value("string"),
        }
    )
    whole = arrow.Table.from_pylist(rows, schema=features.arrow_schema)
    for name in ("tables", "arrow", "files"):
        (tmp_path / name).mkdir()
    for part in range(3):
        path = tmp_path / "tables" / f"train-{part:05}-of-00003.parquet"
        parquet.write_table(whole.slice(15 * part, 15), path, row_group_size=4)
    with arrow.ipc.new_stream(str(tmp_path / "arrow" / "train.arrow"), whole.schema) as writer:
        writer.write_table(whole, max_chunksize=4)
    lines = []
    for number, row in enumerate(rows):
        (tmp_path / "files" / f"{number:02}.png").write_bytes(row["image"]["bytes"])
        lines.append({"file_name": f"{number:02}.png", "text": row["text"]})
    (tmp_path / "files" / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    expected = [n for n in range(45) if n not in (9, 19)]
    for folder in ("tables", "arrow", "files"):
        name = [f"hf:{tmp_path / folder}"]
        corpora = [open_training_images(name, None, GREY)]
        if folder != "files":
            corpora.append(open_training_audio(name, None, 2000))
        for corpus in corpora:
            sampler = StreamSampler(corpus.train.media, 1, 3)
            first = drawn(sampler, 20)
            again = StreamSampler(corpus.train.media, 1, 0)
            again.restore(json.loads(json.dumps(sampler.state())))
            rest = drawn(sampler, 60)
            assert drawn(again, 60) == rest
            assert sorted((first + rest)[:43]) == expected
